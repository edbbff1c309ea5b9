"""MXFP4: 4-bit floating point codes, every 32 with a power of two. DeepSeek-V4's experts, gpt-oss, Kimi-K3."""

from __future__ import annotations

import torch
from torch import Tensor

from polymoe.formats.codes import (
    E2M1_MAX,
    from_e2m1,
    from_e8m0,
    pack_nibbles,
    quotient,
    round_up_to_e8m0,
    to_e2m1,
    to_e4m3,
    unpack_nibbles,
)
from polymoe.formats.fp8 import Fp8Block
from polymoe.formats.weight import EXPONENTS, MODES, Format, Weight
from polymoe.ops import _check as check_that


class Mxfp4(Format):
    """e2m1 codes, two to a byte; every 32 along the reduction share a power of two.

        data   uint8 or int8 (the same bytes) [..., N, ceil(D / 2)]: element 2j in the low half of byte j, element
               2j + 1 in the high half. The half that an odd D leaves is not read.
        scale  float8_e8m0fnu (uint8: the same codes) [..., N, ceil(D / 32)]
        value  e2m1(code[n, d]) * 2^(scale[n, d // 32] - 127)

    A scale of 0xff makes its group NaN; no code is NaN. Quantising takes the scale
    max(largest magnitude of the group, 6 * 2^-126) / 6 rounded up to a power of two, so that no code saturates, and the
    code nearest to weight / scale, ties to even; the sign stays, also that of zeros.
    """

    name = "mxfp4"
    block = (1, 32)
    data_dtypes = (torch.uint8, torch.int8)
    scale_dtypes = EXPONENTS
    scale_dtype = EXPONENTS[0]
    codes_per_byte = 2
    modes = MODES
    FLOOR = E2M1_MAX * 2.0**-126

    def codes(self, weight: Weight) -> Tensor:
        return from_e2m1(unpack_nibbles(weight.data, weight.D))

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = round_up_to_e8m0(quotient(self.largest(weight).clamp(min=self.FLOOR), E2M1_MAX))
        return pack_nibbles(to_e2m1(weight / self.spread(scale.float(), *weight.shape[-2:]))), scale, None


def mxfp4_from_blocks(blocks: Tensor, scales: Tensor) -> Weight:
    """gpt-oss's layout: uint8 blocks [..., N, D / 32, 16] and scales [..., N, D / 32]; views, nothing is copied.

    gate_up is stored with gate and up rows in turns: pass `interleaved=True` to polymoe.experts.
    """
    if blocks.dim() < 3 or blocks.shape[-1] != 16 or blocks.shape[:-1] != scales.shape:
        check_that.fail(
            "formats",
            "blocks",
            "a tensor [..., N, D / 32, 16] beside scales [..., N, D / 32]",
            f"{check_that.describe(blocks)} and {check_that.describe(scales)}",
        )
    weight = Weight(blocks.flatten(-2), scales, None, Mxfp4.name, blocks.shape[-3], 32 * blocks.shape[-2])
    Mxfp4().check("formats", "blocks", weight)
    return weight


def mxfp4_to_fp8(weight: Weight, size: int = 128) -> Weight:
    """The same numbers in blocks of size x size e4m3 codes with e8m0 scales.

    The scale of a block is 2^-6 times the largest of its groups, whose 6 becomes 384; what is 2^k below the largest
    keeps its bits down to e4m3's smallest subnormal 2^-9, so every block with scales within 2^11 of one another
    converts without loss, and none is changed silently.

    Raises:
        ValueError: a number of the weight has no code beside the others of its block; says how many, and where the
            first is.
    """
    source, target = Mxfp4(), Fp8Block(size, torch.float8_e8m0fnu)
    values = source.dequantize(weight, torch.float64)
    N, D = values.shape[-2:]
    # The exponents of groups that hold a number other than zero; a group of zeros binds nothing.
    exponent = source.spread(weight.scale.view(torch.uint8), N, D).int().where(values != 0, 0)
    code = (target.blocks(exponent).amax(-1) - 6).clamp(min=1).to(torch.uint8)
    scale = code.view(torch.float8_e8m0fnu)
    ratio = values / target.spread(from_e8m0(scale).double(), N, D)
    data = to_e4m3(ratio.float())
    lost = data.double() != ratio
    if lost.any():
        first = tuple(lost.nonzero()[0].tolist())
        check_that.fail(
            "formats",
            "weight",
            f"numbers that blocks of {size} x {size} e4m3 codes hold exactly",
            f"{int(lost.sum())} that they do not, the first {values[first].item():g} at {list(first)}",
        )
    return Weight(data, scale, None, target.name, N, D)
