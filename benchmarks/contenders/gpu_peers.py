"""Other libraries' experts on GPUs, each called as its own module or function documents it. None of them was at hand
when this was written: a library whose interface has changed is named as absent, and one that computes something else
is found out before it is timed."""

from __future__ import annotations

from importlib import import_module

import torch

from benchmarks.contenders.base import Plugin, Prepared, Problem, not_installed, only
from benchmarks.contenders.zentorch import with_f32_weights_and_i32_ids
from benchmarks.layer import Layer

PLAIN = ("swiglu", "swiglu_clamped")  # these inputs do not reach the clamp


class ScatterMoe(Plugin):
    """scattermoe.mlp.GLUMLP, whose first half of the columns is what polymoe calls up."""

    name = "scattermoe"
    devices = ("cuda",)
    copies = 1

    def declined(self, problem: Problem) -> str | None:
        return not_installed("scattermoe") or only("activation", problem.shape.activation, PLAIN)

    def prepare(self, layer: Layer) -> Prepared:
        shape = layer.shape
        module = import_module("scattermoe.mlp").GLUMLP(shape.H, shape.I, shape.E, shape.K)
        gate, up = layer.gate_up.chunk(2, dim=1)
        for experts, weight in ((module.experts, torch.cat([up, gate], dim=1)), (module.output_experts, layer.down)):
            experts.weight = torch.nn.Parameter(weight, requires_grad=False)
        return Prepared(lambda inputs: module(*inputs))


class Liger(Plugin):
    """LigerFusedMoEFunction of Liger-Kernel."""

    name = "liger"
    devices = ("cuda", "xpu")

    def declined(self, problem: Problem) -> str | None:
        return not_installed("liger_kernel") or only("activation", problem.shape.activation, PLAIN)

    def prepare(self, layer: Layer) -> Prepared:
        run = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction.apply
        return Prepared(
            lambda inputs: run(inputs[0], layer.gate_up, layer.down, inputs[2], inputs[1]),
            with_f32_weights_and_i32_ids,
        )


class VllmTriton(Plugin):
    """fused_experts of vLLM, with the tiles that it ships for a device or else chooses itself."""

    name = "vllm"
    devices = ("cuda", "xpu")

    def declined(self, problem: Problem) -> str | None:
        return not_installed("vllm") or only("activation", problem.shape.activation, PLAIN)

    def prepare(self, layer: Layer) -> Prepared:
        run = import_module("vllm.model_executor.layers.fused_moe.fused_moe").fused_experts
        return Prepared(
            lambda inputs: run(inputs[0], layer.gate_up, layer.down, inputs[1], inputs[2]),
            with_f32_weights_and_i32_ids,
        )
