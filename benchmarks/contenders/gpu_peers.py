"""Other libraries' experts on GPUs, each called as its own module or function documents it. None of them was at hand
when this was written: a library whose interface has changed is named as absent, and one that computes something else
is found out before it is timed."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from benchmarks.contenders.base import Plugin, Prepared, Problem, not_installed, only
from benchmarks.contenders.zentorch import with_f32_weights_and_i32_ids
from benchmarks.layer import OAI_ALPHA, InputSet, Layer, gated

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


class MoeOps(Plugin):
    """permute, grouped_gemm and unpermute of moe-ops, with torch's activation between: it has none."""

    name = "moe-ops"
    devices = ("cuda",)

    def declined(self, problem: Problem) -> str | None:
        return not_installed("moe_ops") or only("activation", problem.shape.activation, PLAIN)

    def prepare(self, layer: Layer) -> Prepared:
        ops, (E, K) = import_module("moe_ops"), (layer.shape.E, layer.shape.K)

        def run(inputs: InputSet) -> Tensor:
            x, weights, ids = inputs
            rows, row_id_map, offsets = ops.permute(x, ids, 0, E)
            h = ops.grouped_gemm(rows, layer.gate_up, offsets)
            y = ops.grouped_gemm(gated(h, layer.shape), layer.down, offsets)
            out: Tensor = ops.unpermute(y, row_id_map, weights, len(x), K)
            return out

        return Prepared(run, with_f32_weights_and_i32_ids)


class TritonKernels(Plugin):
    """matmul of triton_kernels with its activation fused, which is gpt-oss's. It routes from logits; here the ids are
    given, so torch sorts them and sums over the slots."""

    name = "triton_kernels"
    devices = ("cuda",)

    def declined(self, problem: Problem) -> str | None:
        return not_installed("triton_kernels") or only("activation", problem.shape.activation, ("swiglu_oai",))

    def prepare(self, layer: Layer) -> Prepared:
        library, swiglu = (import_module(f"triton_kernels.{name}") for name in ("matmul", "swiglu"))
        ragged = import_module("triton_kernels.tensor").make_ragged_tensor_metadata
        shape = layer.shape
        specs = library.FnSpecs("swiglu", swiglu.swiglu_fn, ("alpha", "limit"), reduction_n=2)
        activation = library.FusedActivation(specs, (OAI_ALPHA, shape.limit))
        biases = [None if bias is None else bias.float() for bias in (layer.gate_up_bias, layer.down_bias)]
        experts = torch.arange(shape.E, device=layer.down.device)

        def run(inputs: InputSet) -> Tensor:
            x, weights, ids = inputs
            slots = ids.flatten().argsort(stable=True).int()
            sizes = (ids.flatten()[:, None] == experts).sum(0, dtype=torch.int32)
            groups = ragged(sizes, slots.numel())
            a = library.matmul(
                x, layer.gate_up.mT, biases[0], a_ragged_metadata=groups, gather_indx=slots // shape.K,
                fused_activation=activation,
            )  # fmt: skip
            y = library.matmul(a, layer.down.mT, biases[1], a_ragged_metadata=groups, scatter_indx=slots)
            return (y.view(*ids.shape, -1) * weights[..., None]).sum(1).to(x.dtype)

        return Prepared(run, with_f32_weights_and_i32_ids)
