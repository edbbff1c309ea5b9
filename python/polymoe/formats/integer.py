"""Weights of integer codes: int8 per output channel, and int4 in groups along the reduction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polymoe.formats.codes import pack_nibbles, quotient, unpack_nibbles
from polymoe.formats.weight import INTEGER_MODES, Format, Weight
from polymoe.ops import _check as check_that

GROUPS = (32, 64, 128)
_SMALLEST = 2.0**-126  # of a scale: subnormal ones would lose bits


class Int8(Format):
    """Symmetric int8, a scale for every output channel.

        data   int8 [..., N, D]
        scale  float32 [..., N]
        value  data[n, d] * scale[n]

    Quantising takes the scale largest magnitude of the row / 127, and the integer nearest to weight / scale, ties to
    even, so -128 is never written; it is read as itself. A row of zeros has codes 0 and the scale 2^-126.
    """

    name = "int8"
    block = (1, None)
    data_dtypes = (torch.int8,)
    scale_dtypes = (torch.float32,)
    modes = INTEGER_MODES

    def codes(self, weight: Weight) -> Tensor:
        return weight.data.float()

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = quotient(self.largest(weight), 127).clamp(min=_SMALLEST)
        return (weight / self.spread(scale, *weight.shape[-2:])).round().clamp(-127, 127).to(torch.int8), scale, None


@dataclass(frozen=True)
class Int4(Format):
    """int4, two to a byte; every G along the reduction share a scale and, if there are zero points, one of these.

        data   uint8 or int8 (the same bytes) [..., N, ceil(D / 2)]: codes 0 to 15, element 2j in the low half of byte
               j, element 2j + 1 in the high half. The half that an odd D leaves is not read.
        scale  float32 [..., N, ceil(D / G)]
        zero   uint8 [..., N, ceil(D / G)], or None, which is 8 everywhere (symmetric)
        value  (code[n, d] - zero[n, d // G]) * scale[n, d // G]

    Quantising, symmetric: the scale is the largest magnitude of the group / 7, the code 8 + weight / scale to the
    nearest, ties to even. With zero points: the scale spans the group and zero in 15 steps, the zero point is the
    nearest integer to -lowest / scale, and the code that to zero point + weight / scale. A group of zeros has the
    scale 2^-126 and the code of its zero point.

    Names: int4_g32, int4_g64, int4_g128.
    """

    group: int = 128
    zero_points: bool = False  # that `quantize` gives

    data_dtypes = (torch.uint8, torch.int8)
    scale_dtypes = (torch.float32,)
    modes = INTEGER_MODES
    codes_per_byte = 2

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            check_that.fail("formats", "group", f"one of {', '.join(map(str, GROUPS))}", self.group)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"int4_g{self.group}"

    @property
    def block(self) -> tuple[int, int | None]:  # type: ignore[override]
        return 1, self.group

    def codes(self, weight: Weight) -> Tensor:
        zero = 8.0 if weight.zero is None else self.spread(weight.zero.float(), weight.N, weight.D)
        return unpack_nibbles(weight.data, weight.D).float() - zero

    def check_zero(self, op: str, name: str, zero: Tensor) -> None:
        check_that.dtype(op, name, zero, (torch.uint8,))

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        N, D = weight.shape[-2:]
        if not self.zero_points:
            scale = quotient(self.largest(weight), 7).clamp(min=_SMALLEST)
            codes = ((weight / self.spread(scale, N, D)).round() + 8).clamp(1, 15)
            return pack_nibbles(codes.to(torch.uint8)), scale, None
        groups = self.blocks(weight)
        lowest, highest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (quotient(highest, 15) - quotient(lowest, 15)).clamp(min=_SMALLEST)
        zero = (-lowest / scale).round().clamp(0, 15)
        codes = ((weight / self.spread(scale, N, D)).round() + self.spread(zero, N, D)).clamp(0, 15)
        return pack_nibbles(codes.to(torch.uint8)), scale, zero.to(torch.uint8)


def int4_from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Weight:
    """AWQ's layout, from one matrix: int32 qweight [D, N / 8] and qzeros [D / G, N / 8], scales [D / G, N].

    Each int32 holds eight output channels, from its low bits up 0, 2, 4, 6, 1, 3, 5, 7.
    """
    N, D, group = _sizes(qweight, qzeros, scales, qweight.shape[0])
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], device=qweight.device)  # where channel c of eight lies
    codes, zero = (_nibbles(packed).unflatten(-1, (-1, 8))[..., order].flatten(-2).mT for packed in (qweight, qzeros))
    return _weight(codes, scales, zero, group, N, D)


def int4_from_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None) -> Weight:
    """GPTQ's layout, from one matrix: int32 qweight [D / 8, N] and qzeros [D / G, N / 8], which hold the zero point
    less 1, scales [D / G, N]; the first of eight in the low bits.

    Raises:
        ValueError: other shapes, or a g_idx that orders the reduction by activation (desc_act).
    """
    N, D, group = _sizes(qweight, qzeros, scales, 8 * qweight.shape[0])
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(D, device=g_idx.device) // group):
        check_that.fail("formats", "g_idx", f"groups of {group} in order", "another order (desc_act)")
    codes = _nibbles(qweight.mT)
    zero = _nibbles(qzeros).mT + 1
    return _weight(codes, scales, zero, group, N, D)


def _sizes(qweight: Tensor, qzeros: Tensor, scales: Tensor, D: int) -> tuple[int, int, int]:
    """N, D and the group size."""
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        check_that.dtype("formats", name, tensor, (torch.int32,))
    check_that.dtype("formats", "scales", scales, (torch.float16, torch.bfloat16, torch.float32))
    check_that.shape("formats", "scales", scales, {"D / G": None, "N": None})
    count, N = scales.shape
    check_that.shape("formats", "qzeros", qzeros, {"D / G": count, "N / 8": N // 8})
    if qweight.shape not in ((D, N // 8), (D // 8, N)) or N % 8:
        check_that.fail("formats", "qweight", f"8 codes to an int32 for N={N}", check_that.describe(qweight))
    if count == 0 or D % count or D // count not in GROUPS:
        check_that.fail("formats", "scales", "groups of 32, 64 or 128", f"{count} along {D}")
    return N, D, D // count


def _nibbles(packed: Tensor) -> Tensor:
    """int32 [..., n] to uint8 [..., 8 n], low bits first."""
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & 15).to(torch.uint8).flatten(-2)


def _weight(codes: Tensor, scales: Tensor, zero: Tensor, group: int, N: int, D: int) -> Weight:
    symmetric = bool((zero == 8).all())
    scale = scales.mT.float().contiguous()
    zero_points = None if symmetric else zero.contiguous()
    return Weight(pack_nibbles(codes.contiguous()), scale, zero_points, f"int4_g{group}", N, D)
