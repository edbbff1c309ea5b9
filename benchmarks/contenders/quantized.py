"""Other libraries with quantised experts, for the benchmark of these. They get what polymoe.formats stores, where their
layout holds the same numbers, or quantise the layer themselves."""

from __future__ import annotations

from abc import abstractmethod
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.contenders.base import Plugin, Prepared, Problem, limited, not_installed, only
from benchmarks.contenders.kt_kernel import prepared as kt_prepared
from benchmarks.contenders.zentorch import ACTIVATIONS, with_f32_weights_and_i32_ids
from benchmarks.layer import InputSet, Layer
from polymoe import formats
from polymoe.formats import Weight


class Quantized(Plugin):
    """A plug-in that computes with weights in one format.

    format  of polymoe.formats, whose bytes it reads
    own     it quantises the layer in its own way, so that its result is not that of the format
    """

    format: ClassVar[str]
    own: ClassVar[bool] = False

    def prepare(self, layer: Layer) -> Prepared:
        return self.take(layer, *(quantized(self.format, weight) for weight in (layer.gate_up, layer.down)))

    @abstractmethod
    def take(self, layer: Layer, gate_up: Weight, down: Weight) -> Prepared:
        """As `prepare`, with the weights of the layer in this format."""


def quantized(name: str, weight: Tensor) -> Weight:
    """Expert by expert, for the memory that it takes."""
    format = formats.parse(name)
    parts = [format.quantize(expert) for expert in weight]
    data, scale = torch.stack([part.data for part in parts]), torch.stack([part.scale for part in parts])
    return Weight(data, scale, None, format.name, *weight.shape[-2:])


class ZentorchInt8(Quantized):
    """Its activations are int8, too."""

    name = "zentorch int8"
    format = "int8"
    copies = 1

    def declined(self, problem: Problem) -> str | None:
        return (
            not_installed("zentorch")
            or limited(problem)
            or only("activation", problem.shape.activation, tuple(ACTIVATIONS))
        )

    def take(self, layer: Layer, gate_up: Weight, down: Weight) -> Prepared:
        import_module("zentorch")  # registers the op

        activation = ACTIVATIONS[layer.shape.activation]
        up, back = gate_up.data.clone(), down.data.clone()  # it reorders them in its first call

        def run(inputs: InputSet) -> Tensor:
            x, weights, ids = inputs
            out = torch.empty_like(x)
            torch.ops.zentorch.zentorch_fused_moe(
                out,
                x,
                up,
                back,
                layer.gate_up_bias,
                layer.down_bias,
                weights,
                ids,
                False,
                activation,
                gate_up.scale,
                down.scale,
            )
            return out

        return Prepared(run, with_f32_weights_and_i32_ids)


class KtKernelQuantized(Quantized):
    """One of its classes for AVX-512 or AMX, by name, and the scales that it takes."""

    isolated = True
    copies = 1
    kernel: ClassVar[str]
    scale_dtype: ClassVar[torch.dtype]
    group: ClassVar[int]

    def declined(self, problem: Problem) -> str | None:
        return (
            not_installed("kt_kernel")
            or limited(problem)
            or only("level", problem.level, ("avx512_bf16", "amx"))
            or only("activation", problem.shape.activation, ("swiglu", "swiglu_clamped"))
            or (None if hasattr(import_module("kt_kernel").kt_kernel_ext.moe, self.kernel) else f"no {self.kernel}")
        )

    def take(self, layer: Layer, gate_up: Weight, down: Weight) -> Prepared:
        halves: list[dict[str, Tensor]] = []
        for tensor, of_down in ((gate_up.data, down.data), (self._scales(gate_up), self._scales(down))):
            gate, up = (half.contiguous() for half in tensor.view(torch.uint8).chunk(2, dim=1))
            halves.append({"gate": gate, "up": up, "down": of_down})
        weights, scales = halves

        def configure(config: Any) -> None:
            config.quant_config.bits = 8 // formats.parse(self.format).codes_per_byte
            config.quant_config.group_size, config.quant_config.zero_point = self.group, False
            for name in weights:
                setattr(config, f"{name}_projs", [[expert.data_ptr() for expert in weights[name]]])
                setattr(config, f"{name}_scales", [[expert.data_ptr() for expert in scales[name]]])

        return kt_prepared(layer.shape, self.kernel, configure)

    def _scales(self, weight: Weight) -> Tensor:
        scale = weight.scale
        return scale.view(torch.uint8) if self.scale_dtype == torch.uint8 else scale.to(self.scale_dtype)


class KtKernelMxfp4(KtKernelQuantized):
    name, format, kernel = "kt-kernel mxfp4", "mxfp4", "AMXFP4_KGroup_MOE"
    scale_dtype, group = torch.bfloat16, 32


class KtKernelMxfp8(KtKernelQuantized):
    name, format, kernel = "kt-kernel mxfp8", "mxfp8", "AMXMXFP8_KGroup_MOE"
    scale_dtype, group = torch.uint8, 32


class KtKernelFp8(KtKernelQuantized):
    name, format, kernel = "kt-kernel fp8", "fp8_block128", "AMXFP8_MOE"
    scale_dtype, group = torch.float32, 128


class KtKernelInt8(KtKernelQuantized):
    """It quantises bf16 weights itself, and its activations to int8."""

    name, format, kernel = "kt-kernel int8", "int8", "AMXInt8_MOE"
    own = True

    def prepare(self, layer: Layer) -> Prepared:
        gate, up = (half.contiguous() for half in layer.gate_up.chunk(2, dim=1))

        def configure(config: Any) -> None:
            for name, weight in (("gate", gate), ("up", up), ("down", layer.down)):
                setattr(config, f"{name}_proj", weight.data_ptr())

        return kt_prepared(layer.shape, self.kernel, configure)


class KtKernelInt4(KtKernelInt8):
    """One scale for a row, which is coarser than groups."""

    name, format, kernel = "kt-kernel int4", "int4_g128", "AMXInt4_MOE"


QUANTIZED: dict[str, Quantized] = {
    plugin.name: plugin
    for plugin in (ZentorchInt8(), KtKernelMxfp4(), KtKernelMxfp8(), KtKernelFp8(), KtKernelInt8(), KtKernelInt4())
}
