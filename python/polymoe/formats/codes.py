"""The codes that quantised weights are made of, to and from numbers.

    e4m3  1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity; 0x7f and 0xff are NaN; largest 448, smallest 2^-9
    e2m1  1 sign, 2 exponent (bias 1), 1 mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives
    e8m0  an exponent with bias 127, no sign and no mantissa: 2^-127 to 2^127; 0xff is NaN

e4m3 and e2m1 are those of the OCP 8-bit floating point and microscaling (MX) specifications, e8m0 that of the latter.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# Halfway between neighbours, and whether a value there goes up: to the code whose last bit is 0.
_E2M1_MIDPOINTS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def to_e4m3(values: Tensor) -> Tensor:
    """Rounds float32 to the nearest e4m3, ties to even, and saturates at 448; dtype float8_e4m3fn."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_e2m1(values: Tensor) -> Tensor:
    """Rounds float32 to the nearest e2m1 code, ties to even, and saturates at 6; uint8, a code each. The sign stays,
    also that of a value that rounds to zero."""
    magnitude = values.abs()
    code = values.signbit().to(torch.uint8) << 3
    for midpoint, up in _E2M1_MIDPOINTS:
        code += magnitude >= midpoint if up else magnitude > midpoint
    return code


def from_e2m1(codes: Tensor) -> Tensor:
    """The float32 values of codes 0 to 15."""
    return torch.tensor(E2M1_VALUES, device=codes.device)[codes.int()]


def quotient(values: Tensor, divisor: float) -> Tensor:
    """values / divisor, rounded once. CUDA divides by a Python number by multiplying by its reciprocal, which rounds
    twice (torch's BinaryDivTrueKernel.cu)."""
    return values / values.new_full((), divisor)


def round_up_to_e8m0(values: Tensor) -> Tensor:
    """The smallest power of two that is not below each value; float32, positive and normal, to float8_e8m0fnu."""
    bits = values.view(torch.int32)
    code = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return code.to(torch.uint8).view(torch.float8_e8m0fnu)


def from_e8m0(codes: Tensor) -> Tensor:
    """The float32 values of float8_e8m0fnu, or of the same codes as uint8; code 0 is the subnormal 2^-127."""
    code = codes.view(torch.uint8).int()
    bits = torch.where(code == 0, 1 << 22, code << 23)
    return bits.where(code != 255, 0x7FC00000).int().view(torch.float32)


def pack_nibbles(codes: Tensor) -> Tensor:
    """[..., D] codes 0 to 15 to uint8 [..., ceil(D / 2)], the even element in the low half of a byte. The half that an
    odd D leaves is 0."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(data: Tensor, D: int) -> Tensor:
    """Undoes `pack_nibbles`; int8 data are read as the same bytes."""
    data = data.view(torch.uint8)
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)[..., :D]
