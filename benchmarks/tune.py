"""Tunes polymoe's Triton kernels on the device at hand, for `experts` of the shapes named; see kernels/tuner.py."""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import inputs
from benchmarks._options import add_shapes, chosen_shapes
from benchmarks.layer import Layer, make_layer

TOKENS = (1, 16, 128, 1024, 8192)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser)
    parser.add_argument("--tokens", nargs="+", type=int, metavar="T", default=TOKENS)
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="bf16")
    parser.add_argument("--device", choices=("cuda", "xpu"), default="cuda", help="cuda is also AMD's")
    parser.add_argument("--seconds", type=float, default=600.0, help="of all shapes together; then it stops")
    parser.add_argument("--file", type=Path, default=Path("tiles.json"), help="to which it adds what it finds")
    parser.add_argument("--seed", type=int, default=0)


def main(given: argparse.Namespace, **made_up: Any) -> int:
    """made_up: `timed` and `clock` of the tuner, for tests."""
    if not made_up and not torch.get_device_module(given.device).is_available():
        raise SystemExit(f"benchmarks: --device {given.device}: torch sees no such device")
    source = inputs.generator(given.seed, given.device)
    clock, shapes = made_up.get("clock", time.monotonic), chosen_shapes(given)
    end, differing = clock() + given.seconds, 0
    for done, shape in enumerate(shapes):
        layer = make_layer(shape, inputs.DTYPES[given.dtype], source)
        share = (end - clock()) / (len(shapes) - done)
        differing += _tune(layer, given, share, **made_up)
        del layer  # or its weights stay while those of the next one are made
    print(f"{differing} choices differ from the closed form's. To use them:")
    print(f'from polymoe.kernels import tuner; tuner.load("{given.file}")')
    return 0


def _tune(layer: Layer, given: argparse.Namespace, seconds: float, **made_up: Any) -> int:
    shape, tuner = layer.shape, import_module("polymoe.kernels.tuner")  # needs Triton, which nothing else here does
    differing: int = tuner.tune_experts(
        layer.gate_up,
        layer.down,
        shape.K,
        given.tokens,
        given.file,
        seconds,
        shape.activation,
        limit=shape.limit,
        gate_up_bias=layer.gate_up_bias,
        down_bias=layer.down_bias,
        interleaved=shape.interleaved,
        **made_up,
    )
    return differing
