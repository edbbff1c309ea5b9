"""float32 numbers as codes: the roundings of polymoe.formats, to the bit."""

import triton
import triton.language as tl

TO_INTEGER = tl.constexpr(1.5 * 2.0**23)  # next to it float32 numbers are integers


@triton.jit
def nearest(x):
    """The nearest integer, ties to even, of |x| < 2^22."""
    return (x + TO_INTEGER) - TO_INTEGER


@triton.jit
def _to_float(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, SIGN: tl.constexpr):
    """The nearest code with so many mantissa bits, a sign in bit SIGN and that bias of the exponent, ties to even, for
    |x| that rounds to no more than the largest."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    number = x.to(tl.int32, bitcast=True)
    magnitude = number & 0x7FFFFFFF
    half = (1 << (DROPPED - 1)) - 1 + ((magnitude >> DROPPED) & 1)
    normal = ((magnitude + half) >> DROPPED) - ((127 - BIAS) << MANTISSA)
    subnormal = nearest(magnitude.to(tl.float32, bitcast=True) * (1 << (MANTISSA + BIAS - 1)))
    code = tl.where(magnitude < (128 - BIAS) << 23, subnormal.to(tl.int32), normal)
    return (code | ((number >> (31 - SIGN)) & (1 << SIGN))).to(tl.uint8)


@triton.jit
def to_e4m3(x):
    return _to_float(x, 3, 7, 7)


@triton.jit
def to_e2m1(x):
    return _to_float(x, 1, 1, 3)
