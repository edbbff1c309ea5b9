"""zentorch, AMD's library for torch: zentorch_fused_moe.

It reorders the weights that it is given in place, in its first call, so it gets copies. DeepSeek-V4's clamp is not
among its activations and is left out: the inputs here do not reach its limit.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from benchmarks.contenders.base import Plugin, Prepared, Problem, limited, not_installed, only
from benchmarks.layer import InputSet, Layer

ACTIVATIONS = {"swiglu": "silu", "swiglu_clamped": "silu", "swiglu_oai": "swigluoai"}


class Zentorch(Plugin):
    name = "zentorch"
    copies = 1

    def declined(self, problem: Problem) -> str | None:
        return (
            not_installed("zentorch")
            or limited(problem)
            or only("dtype", problem.dtype, ("bf16", "f32"))
            or only("activation", problem.shape.activation, tuple(ACTIVATIONS))
        )

    def prepare(self, layer: Layer) -> Prepared:
        import_module("zentorch")  # registers the op

        gate_up, down, activation = layer.gate_up.clone(), layer.down.clone(), ACTIVATIONS[layer.shape.activation]

        def run(inputs: InputSet) -> Tensor:
            x, weights, ids = inputs
            out = torch.empty_like(x)
            torch.ops.zentorch.zentorch_fused_moe(
                out, x, gate_up, down, layer.gate_up_bias, layer.down_bias, weights, ids, False, activation
            )
            return out

        return Prepared(run, with_f32_weights_and_i32_ids)


def with_f32_weights_and_i32_ids(inputs: InputSet) -> InputSet:
    x, weights, ids = inputs
    return x, weights.float(), ids.int()
