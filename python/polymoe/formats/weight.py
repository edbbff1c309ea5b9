"""What every quantised format has in common: a weight as plain tensors, and the blocks that share a scale."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from polymoe.formats.codes import from_e8m0
from polymoe.hal.problem import FORMAT_OPS, OpSpec
from polymoe.hal.select import kernel_of
from polymoe.ops import _check as check_that

SOURCES = (torch.float32, torch.bfloat16, torch.float16)
EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)


@dataclass(frozen=True)
class Weight:
    """A quantised weight [..., N, D], as an op takes it: `data`, `scale` and `zero` are plain tensors whose layout the
    class named by `format` documents; D is the reduction. The leading dimensions, usually the experts, are those of
    `data`."""

    data: Tensor
    scale: Tensor
    zero: Tensor | None
    format: str
    N: int
    D: int

    @property
    def shape(self) -> torch.Size:
        """[..., N, D]"""
        return torch.Size([*self.data.shape[:-2], self.N, self.D])

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes, scales and zero points."""
        return self.data.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors by name, for a safetensors file: `name`, `name`_scale and `name`_zero."""
        parts = {name: self.data, f"{name}_scale": self.scale}
        return parts if self.zero is None else parts | {f"{name}_zero": self.zero}

    def metadata(self, name: str) -> dict[str, str]:
        """What the tensors do not say, for the metadata of a safetensors file."""
        return {name: f"{self.format} {self.N} {self.D}"}

    @staticmethod
    def from_tensors(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Weight:
        """Undoes `tensors` and `metadata`.

        Raises:
            ValueError: a tensor or the metadata is missing, or a shape or dtype is not that of the format.
        """
        described = metadata.get(name, "").split()
        if len(described) != 3 or not (described[1] + described[2]).isdecimal():
            check_that.fail("formats", name, 'metadata "<format> <N> <D>"', f'"{metadata.get(name, "")}"')
        missing = [part for part in (name, f"{name}_scale") if part not in tensors]
        if missing:
            check_that.fail("formats", name, f"tensors {name} and {name}_scale", f"none named {missing[0]}")
        data, scale, zero = tensors[name], tensors[f"{name}_scale"], tensors.get(f"{name}_zero")
        weight = Weight(data, scale, zero, described[0], int(described[1]), int(described[2]))
        from polymoe.formats.names import parse

        parse(weight.format).check("formats", name, weight)
        return weight


# How products are computed, see the argument `mode` of polymoe.experts.
MODES = ("weight_only", "int8", "int8_g128", "fp8")
INTEGER_MODES = MODES[:3]  # of formats whose codes are small integers


class Format(ABC):
    """A quantised format. Element [n, d] is value(code) * scale of the block of `block` elements that it is in; blocks
    at the far edges may be cut short.

    name   as in the `weight_format` argument of polymoe.experts
    block  rows and columns that share a scale; None: the whole row
    scale_dtype, zero_points
           that `quantize` gives
    modes  that polymoe.experts and polymoe.grouped_mm compute with: those of integers are for codes that are small
           integers, up to a factor; "fp8" is for the microscaling formats
    """

    data_dtypes: ClassVar[tuple[torch.dtype, ...]]
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]]
    codes_per_byte: ClassVar[int] = 1
    modes: ClassVar[tuple[str, ...]] = MODES[:1]

    name: str
    block: tuple[int, int | None]
    scale_dtype: torch.dtype = torch.float32
    zero_points: bool = False

    def quantize(self, weight: Tensor) -> Weight:
        """Quantises a weight [..., N, D] of float32, bfloat16 or float16, by a kernel where the backend of its device
        has one. The parts are contiguous and have no gradient.

        Raises:
            ValueError: another dtype, fewer than two dimensions, or infinity or NaN among the elements.
        """
        check_that.dtype("formats", "weight", weight, SOURCES)
        if weight.dim() < 2:
            check_that.fail("formats", "weight", "a tensor [..., N, D]", check_that.describe(weight))
        if not weight.isfinite().all():
            check_that.fail("formats", "weight", "finite elements", "infinity or NaN")
        weight = weight.detach()
        kernel = kernel_of("quantize", weight, (self.name,), like="grouped_mm") if weight.numel() > 0 else None
        if kernel is None:
            data, scale, zero = self.encode(weight.float().contiguous())
        else:
            data, scale, zero = kernel(weight, self.name, self.scale_dtype, self.zero_points)
        return Weight(data, scale, zero, self.name, *weight.shape[-2:])

    def dequantize(self, weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., N, D]: code times scale, exact in float64; in other dtypes the product is rounded to float32 first."""
        self.check("formats", "weight", weight)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.codes(weight).to(compute) * self.scales(weight).to(compute)).to(dtype)

    @abstractmethod
    def codes(self, weight: Weight) -> Tensor:
        """[..., N, D] float32: what the codes stand for, before the scale and after the zero point."""

    @abstractmethod
    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """data, scale and zero of a finite float32 weight, in plain PyTorch: what kernels must give to the bit."""

    def scales(self, weight: Weight) -> Tensor:
        """[..., N, D] float32: the scale of every element."""
        scale = weight.scale
        return self.spread(scale.float() if scale.dtype == torch.float32 else from_e8m0(scale), weight.N, weight.D)

    def scale_shape(self, N: int, D: int) -> tuple[int, ...]:
        """The last dimensions of `scale`, and of `zero` where there is one."""
        rows, columns = self.block
        return (-(-N // rows),) if columns is None else (-(-N // rows), -(-D // columns))

    def data_width(self, D: int) -> int:
        """The last dimension of `data`."""
        return -(-D // self.codes_per_byte)

    def check(self, op: str, name: str, weight: Weight, scale_name: str = "", zero_name: str = "") -> None:
        """Raises ValueError unless dtypes and shapes are those of this format. The scale and the zero points are called
        `name`_scale and `name`_zero, if nothing else is given."""
        scale_name, zero_name = scale_name or f"{name}_scale", zero_name or f"{name}_zero"
        lead = weight.data.shape[:-2]
        check_that.dtype(op, name, weight.data, self.data_dtypes)
        check_that.dtype(op, scale_name, weight.scale, self.scale_dtypes)
        self._shape(op, name, weight.data, (*lead, weight.N, self.data_width(weight.D)))
        self._shape(op, scale_name, weight.scale, (*lead, *self.scale_shape(weight.N, weight.D)))
        if weight.zero is not None:
            self.check_zero(op, zero_name, weight.zero)
            self._shape(op, zero_name, weight.zero, weight.scale.shape)

    def check_zero(self, op: str, name: str, zero: Tensor) -> None:
        """Raises ValueError unless the format has zero points and `zero` has their dtype."""
        check_that.fail(op, name, f"None for {self.name}", check_that.describe(zero))

    def _shape(self, op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            expected = ", ".join(str(size) for size in shape)
            check_that.fail(op, name, f"a tensor [{expected}] for {self.name}", check_that.describe(tensor))

    def spread(self, per_block: Tensor, N: int, D: int) -> Tensor:
        """A number per block to one per element [..., N, D]."""
        rows, columns = self.block
        if columns is None:
            return per_block[..., None].repeat_interleave(rows, -2)[..., :N, :].expand(*per_block.shape[:-1], N, D)
        return per_block.repeat_interleave(rows, -2)[..., :N, :].repeat_interleave(columns, -1)[..., :D]

    def blocks(self, weight: Tensor) -> Tensor:
        """[..., N, D] to [..., blocks along N, blocks along D, elements], zeros where a block is cut short."""
        N, D = weight.shape[-2:]
        rows, columns = self.block[0], self.block[1] or max(D, 1)
        width = columns if self.block[1] is None else D + -D % columns
        padded = torch.nn.functional.pad(weight, (0, width - D, 0, -N % rows))
        cut = padded.unflatten(-1, (padded.shape[-1] // columns, columns))
        return cut.unflatten(-3, (padded.shape[-2] // rows, rows)).transpose(-3, -2).flatten(-2)

    def largest(self, weight: Tensor) -> Tensor:
        """The largest magnitude in every block, in the shape of `scale`."""
        found = self.blocks(weight.abs()).amax(-1)
        return found.squeeze(-1) if self.block[1] is None else found


FORMAT_OPS["quantize"] = OpSpec("quantize", "weight", {"weight_format": ""}, Format.quantize)
