"""polymoe.experts with quantised weights beside the same layer in bf16: milliseconds, the share of what memory and
arithmetic allow, in stored bytes (codes, scales and zero points), and how many times as fast as bf16.

    python -m benchmarks.bench_quantized --shapes w1,w2,w3 --tokens 1,16,128

All formats of a shape take turns in one process, with the probes between them. The bound of weight-only products is the
larger of bytes over bandwidth and operations over the peak of bf16 dot products; for int8 activations bytes alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import polymoe
from benchmarks import bounds, inputs
from benchmarks._case import Seen
from benchmarks._harness import cpu_name, isa_level, say, torch_threads
from benchmarks._options import supported_levels
from benchmarks._report import markdown, other_cpu
from benchmarks._timing import FULL, QUICK, Effort, OtherCpuUse, rounds, timing
from benchmarks.inputs import SETS
from benchmarks.layer import InputSet, Layer, make_layer, make_set
from benchmarks.models import ALIASES, SHAPES, shape_of
from benchmarks.probes import BandwidthProbe, PeakProbe
from polymoe import formats
from polymoe.formats import Weight
from polymoe.ops._weights import INT8_FORMATS, QUANTIZED

FORMATS = ("mxfp4", "fp8_block128", "mxfp8", "int8", "int4_g128", "int4_g32")


@dataclass(frozen=True)
class Stored:
    """A layer in one format and mode: how to call it, and bytes of all its weights."""

    name: str
    call: Callable[[InputSet], Tensor]
    bytes: int
    counts_flops: bool


def stored(layer: Layer, name: str, nbytes: int, mode: str, gate_up: Tensor, down: Tensor, **how: Any) -> Stored:
    def call(given: InputSet) -> Tensor:
        x, weights, ids = given
        return polymoe.experts(
            x,
            gate_up,
            down,
            weights,
            ids,
            layer.shape.activation,
            limit=layer.shape.limit,
            interleaved=layer.shape.interleaved,
            gate_up_bias=layer.gate_up_bias,
            down_bias=layer.down_bias,
            mode=mode,
            **how,
        )

    return Stored(name, call, nbytes, mode == "weight_only")


def contenders(layer: Layer, names: Sequence[str]) -> Iterator[Stored]:
    dense = layer.gate_up, layer.down
    yield stored(layer, "bf16", sum(weight.nbytes for weight in dense), "weight_only", *dense)
    for name in names:
        up, down = (_quantized(formats.parse(name), weight) for weight in dense)
        scales = {"gate_up_scale": up.scale, "down_scale": down.scale}
        for mode in ("weight_only", "int8") if name in INT8_FORMATS else ("weight_only",):
            label = name if mode == "weight_only" else f"{name}, int8"
            yield stored(layer, label, up.nbytes + down.nbytes, mode, up.data, down.data, weight_format=name, **scales)


def _quantized(format: formats.Format, weight: Tensor) -> Weight:
    """Expert by expert, for the memory that it takes."""
    parts = [format.quantize(expert) for expert in weight]
    data, scale = torch.stack([part.data for part in parts]), torch.stack([part.scale for part in parts])
    return Weight(data, scale, None, format.name, *weight.shape[-2:])


def measure(layer: Layer, found: Sequence[Stored], T: int, effort: Effort, probes: Seen, seed: int) -> list[list[str]]:
    shape = layer.shape
    source = inputs.generator(seed + T)
    sets = [make_set(shape, T, torch.bfloat16, source) for _ in range(SETS)]
    hit = sum(ids.unique().numel() for _, _, ids in sets) / SETS / shape.E
    flops = 2.0 * T * shape.K * shape.expert_elements
    calls = [lambda i, one=one: one.call(sets[i]) for one in found]
    first = len(probes.bandwidths)
    with OtherCpuUse() as others:
        *samples, _ = rounds([*calls, probes], SETS, effort)
    count = len(samples[0])
    bandwidths, peaks = probes.bandwidths[first:][-count:], probes.peaks[first:][-count:]
    base = timing(samples[0]).median
    lines = []
    for one, taken in zip(found, samples, strict=True):
        bytes_ = one.bytes * hit + 2 * sets[0][0].nbytes
        share = bounds.share(taken, bytes_, flops if one.counts_flops else 0.0, bandwidths, peaks)
        median = timing(taken).median
        cells = [shape.name, str(T), one.name, f"{median * 1e3:.3f}", f"{share:.2f}", f"{base / median:.2f}"]
        lines.append([*cells, f"{flops / median / 1e9:.0f}", other_cpu(others.share)])
        say(" ".join(lines[-1]))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_quantized", allow_abbrev=False)
    parser.add_argument("--shapes", default="w1,w2,w3", help=f"of {', '.join([*ALIASES, *SHAPES])}")
    parser.add_argument("--tokens", default="1,16,128")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"of {', '.join(QUANTIZED)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=supported_levels()[-1], help=f"of {', '.join(supported_levels())}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    given = parser.parse_args(arguments)
    lines = []
    probe = closing(BandwidthProbe(32 if given.quick else 1024, given.threads))
    with torch.no_grad(), torch_threads(given.threads), isa_level(given.isa), probe as bandwidth:
        bandwidth.survey()
        probes = Seen(bandwidth, PeakProbe(bounds.instruction(given.isa, "bf16"), given.threads))
        for name in given.shapes.split(","):
            layer = make_layer(shape_of(name), torch.bfloat16, inputs.generator(given.seed))
            found = list(contenders(layer, given.formats.split(",")))
            for T in map(int, given.tokens.split(",")):
                lines += measure(layer, found, T, QUICK if given.quick else FULL, probes, given.seed)
    print(f"polymoe.experts, quantised: {cpu_name()}, {given.threads} threads, ISA level {given.isa}.\n")
    header = ["shape", "T", "weights", "ms", "of bound", "times bf16", "GFLOP/s", "other CPU"]
    print(markdown(header, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
