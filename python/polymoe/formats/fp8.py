"""Weights of 8-bit floating point codes: in square blocks with a scale (DeepSeek-V3 and V4), and MXFP8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polymoe.formats.codes import E4M3_MAX, quotient, round_up_to_e8m0, to_e4m3
from polymoe.formats.weight import EXPONENTS, MODES, Format, Weight
from polymoe.ops import _check as check_that

BLOCKS = (32, 64, 128)


@dataclass(frozen=True)
class Fp8Block(Format):
    """e4m3 codes; every block of B x B elements shares a scale. DeepSeek-V3, DeepSeek-V4's other layers, MiniMax-M2.

        data   float8_e4m3fn [..., N, D]
        scale  float32 or float8_e8m0fnu (uint8: the same codes) [..., ceil(N / B), ceil(D / B)]
        value  data[n, d] * scale[n // B, d // B]; checkpoints call it weight_scale_inv, though it is the multiplier

    Codes 0x7f and 0xff are NaN, and so is a whole block whose e8m0 scale is 0xff. Quantising takes the scale
    max(largest magnitude in the block, 1e-4) / 448, rounded up to a power of two for e8m0 scales, and the e4m3 nearest
    to weight / scale, ties to even. A block of zeros has codes 0 and the scale of the floor.

    Names: fp8_block32, fp8_block64, fp8_block128.
    """

    size: int = 128
    scale_dtype: torch.dtype = torch.float32  # that `quantize` gives

    data_dtypes = (torch.float8_e4m3fn,)
    scale_dtypes = (torch.float32, *EXPONENTS)
    FLOOR = 1e-4

    def __post_init__(self) -> None:
        if self.size not in BLOCKS:
            check_that.fail("formats", "size", f"one of {', '.join(map(str, BLOCKS))}", self.size)
        if self.scale_dtype not in (torch.float32, torch.float8_e8m0fnu):
            check_that.fail("formats", "scale_dtype", "float32 or float8_e8m0fnu", check_that.name_of(self.scale_dtype))

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"fp8_block{self.size}"

    @property
    def block(self) -> tuple[int, int | None]:  # type: ignore[override]
        return self.size, self.size

    def codes(self, weight: Weight) -> Tensor:
        return weight.data.float()

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = quotient(self.largest(weight).clamp(min=self.FLOOR), E4M3_MAX)
        if self.scale_dtype == torch.float8_e8m0fnu:
            exponent = round_up_to_e8m0(scale)
            return to_e4m3(weight / self.spread(exponent.float(), *weight.shape[-2:])), exponent, None
        return to_e4m3(weight / self.spread(scale, *weight.shape[-2:])), scale, None


class Mxfp8(Format):
    """e4m3 codes; every 32 along the reduction share a power of two. The MXFP8 of the OCP microscaling specification.

        data   float8_e4m3fn [..., N, D]
        scale  float8_e8m0fnu (uint8: the same codes) [..., N, ceil(D / 32)]
        value  data[n, d] * 2^(scale[n, d // 32] - 127)

    NaN as in `Fp8Block`. Quantising takes the scale max(largest magnitude of the group, 448 * 2^-126) / 448 rounded up
    to a power of two, so that no code saturates, and the e4m3 nearest to weight / scale, ties to even.
    """

    name = "mxfp8"
    block = (1, 32)
    data_dtypes = (torch.float8_e4m3fn,)
    scale_dtypes = EXPONENTS
    scale_dtype = EXPONENTS[0]
    modes = (MODES[0], "fp8")
    FLOOR = E4M3_MAX * 2.0**-126

    def codes(self, weight: Weight) -> Tensor:
        return weight.data.float()

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = round_up_to_e8m0(quotient(self.largest(weight).clamp(min=self.FLOOR), E4M3_MAX))
        return to_e4m3(weight / self.spread(scale.float(), *weight.shape[-2:])), scale, None
