"""polymoe itself."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

import polymoe
from benchmarks import inputs
from benchmarks._case import contender_name
from benchmarks.contenders.base import Plugin, Prepared, Problem
from benchmarks.layer import InputSet, Layer
from polymoe.formats import pack_
from polymoe.hal.problem import OPS
from polymoe.hal.problem import Problem as Selection
from polymoe.hal.select import decide


class PolymoePlain(Plugin):
    """On weights in the layout of nn.Linear, as Transformers holds them."""

    peer = False
    devices = ("cpu", "cuda", "xpu")

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend
        self.name = contender_name(backend)

    def declined(self, problem: Problem) -> str | None:
        return _declined(problem, "plain", self.backend)

    def prepare(self, layer: Layer) -> Prepared:
        return _prepared(layer, "plain", self.backend)


class PolymoePrepacked(Plugin):
    """On copies of the weights that polymoe.formats.pack_ packed."""

    name = "polymoe prepacked"
    peer = False
    copies = 1

    def declined(self, problem: Problem) -> str | None:
        return _declined(problem, "packed", None)

    def prepare(self, layer: Layer) -> Prepared:
        gate_up = pack_(layer.gate_up.clone(), gate_up=True, interleaved=layer.shape.interleaved)
        return _prepared(replace(layer, gate_up=gate_up, down=pack_(layer.down.clone())), "packed", None)


def _declined(problem: Problem, weight_format: str, backend: str | None) -> str | None:
    strings = {**OPS["experts"].options, "activation": problem.shape.activation, "weight_format": weight_format}
    try:
        decide(Selection("experts", problem.device, inputs.DTYPES[problem.dtype], tuple(strings.values())), backend)
    except ValueError as error:
        return str(error)
    return None


def _prepared(layer: Layer, weight_format: str, backend: str | None) -> Prepared:
    shape = layer.shape

    def run(given: InputSet) -> Tensor:
        x, weights, ids = given
        return polymoe.experts(
            x,
            layer.gate_up,
            layer.down,
            weights,
            ids,
            shape.activation,
            limit=shape.limit,
            gate_up_bias=layer.gate_up_bias,
            down_bias=layer.down_bias,
            interleaved=shape.interleaved,
            weight_format=weight_format,
            backend=backend,
        )

    return Prepared(run)
