"""Elementary functions in float32, from additions, multiply-adds, correctly rounded divisions and roots alone.

Neither libdevice nor the approximate instructions of a GPU take part, and IEEE 754 fixes the result of every operation
here. So what tests show in Triton's interpreter holds, to the bit, wherever the compiler keeps these operations.

The polynomials are minimax fits for the intervals named beside them. NaN propagates; infinities give the limits; no
intermediate overflows where the result does not. Kernels that use these must be launched with _launch.OPTIONS.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.442695)
# ln 2 in two parts; the first has 16 bits, so that its product with an exponent is exact.
LN2_HIGH = tl.constexpr(0.69314575)
LN2_LOW = tl.constexpr(1.4286068e-06)
# 1.5 * 2^23: a number of magnitude below 2^22 added to it is rounded to an integer, which its lowest bits then hold.
ROUNDER = tl.constexpr(12582912.0)
ROUNDER_BITS = tl.constexpr(0x4B400000)
# Beyond this bound sigmoid is 1 in float32, or so small that no float32 factor brings the product back into range.
SIGMOID_BOUND = tl.constexpr(174.0)


@triton.jit
def at_least(x, bound):
    return tl.where(x < bound, bound, x)


@triton.jit
def at_most(x, bound):
    return tl.where(x > bound, bound, x)


@triton.jit
def _product_error(a, b, product):
    """a * b - product, which is exact where `product` is a * b rounded."""
    return tl.fma(a, b, -product)


@triton.jit
def _pow2(n):
    """2^n for an integer -126 <= n <= 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scale_pow2(x, n):
    """x * 2^n, rounded once but for a subnormal result; -252 <= n <= 128."""
    half = n >> 1
    return x * _pow2(half) * _pow2(n - half)


@triton.jit
def _exponential(high, low):
    """(m, n) with exp(high + low) = (1 + m) * 2^n, where low is at most a few ulp of high; relative error of 1 + m
    below 2^-28 plus rounding."""
    shifted = tl.fma(high, LOG2_E, ROUNDER)
    n = shifted - ROUNDER
    r = tl.fma(n, -LN2_LOW, tl.fma(n, -LN2_HIGH, high)) + low
    # exp(r) = 1 + r + r^2 q(r) for |r| <= ln(2) / 2
    q = tl.fma(r, 0.0013863734, 0.0083676055)
    q = tl.fma(q, r, 0.04166724)
    q = tl.fma(q, r, 0.16666533)
    q = tl.fma(q, r, 0.5)
    return tl.fma(r * r, q, r), shifted.to(tl.int32, bitcast=True) - ROUNDER_BITS


@triton.jit
def exp(x):
    m, n = _exponential(at_least(at_most(x, 89.0), -128.0), 0.0)
    return _scale_pow2(m + 1.0, n)


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))
    return tl.div_rn(tl.where(x < 0, e, 1.0), e + 1.0)


@triton.jit
def _times_sigmoid(x, bounded, high, low):
    """x * sigmoid(high + low), where `bounded` is x within the range in which |high| < 175, and high has the sign of x.

    It is x - x * sigmoid(-high) on the positive side, which rounds once where sigmoid is near 1. The product enters
    before the scaling by 2^n, so that nothing is lost where the exponential alone would be subnormal.
    """
    negative = high < 0
    m, n = _exponential(tl.where(negative, high, -high), tl.where(negative, low, -low))
    p = m + 1.0
    smaller = tl.div_rn(_scale_pow2(bounded * p, n), _scale_pow2(p, n) + 1.0)
    far = tl.where(negative, smaller, x - smaller)

    # Near zero x / 2 + x high T(high^2), of which the first term is exact; |high| <= 0.8.
    square = high * high
    t = tl.fma(square, 1.8231667e-05, -0.00020912198)
    t = tl.fma(t, square, 0.0020829528)
    t = tl.fma(t, square, -0.020833302)
    t = tl.fma(t, square, 0.25)
    near = tl.fma(bounded * high, t, bounded * 0.5)
    return tl.where(tl.abs(high) < 0.75, near, far)


@triton.jit
def silu(x):
    above = at_least(x, -SIGMOID_BOUND)
    bounded = at_most(above, SIGMOID_BOUND)
    return _times_sigmoid(above, bounded, bounded, 0.0)


@triton.jit
def scaled_silu(x, alpha):
    """x * sigmoid(alpha * x). The product carries more than float32: its error is multiplied by its size."""
    bound = SIGMOID_BOUND / alpha
    above = at_least(x, -bound)
    bounded = at_most(above, bound)
    high = bounded * alpha
    return _times_sigmoid(above, bounded, high, _product_error(bounded, alpha, high))


@triton.jit
def product_with_sigmoid(x, y):
    """x * sigmoid(y) for x of the sign of y, |x| < 2^100."""
    return _times_sigmoid(x, x, at_most(at_least(y, -SIGMOID_BOUND), SIGMOID_BOUND), 0.0)


@triton.jit
def tanh(x):
    # 1 - 2 / (exp(2x) + 1) where that is more than a half; near zero x + x^3 P(x^2), |x| <= 0.6. Either way the last
    # rounding is the largest.
    a = at_most(tl.abs(x), 10.0)
    m, n = _exponential(a + a, 0.0)
    far = 1.0 - tl.div_rn(2.0, _scale_pow2(m + 1.0, n) + 1.0)

    square = a * a
    q = tl.fma(square, 0.0023708413, -0.008410139)
    q = tl.fma(q, square, 0.021788344)
    q = tl.fma(q, square, -0.053961556)
    q = tl.fma(q, square, 0.13333313)
    q = tl.fma(q, square, -0.33333334)
    t = tl.where(a < 0.5625, tl.fma(square * a, q, a), far)
    return tl.where(x < 0, -t, t)


@triton.jit
def _normal_tail(a):
    """Phi(-a) * exp(a^2 / 2) for 0 <= a <= 15, as u P(u) with u = 1 / (a + 3); P is centred on the range of u.
    What the roundings of u took from it, u_low, enters by its first order: the tail is about 2.5 times as sensitive."""
    shifted = a + 3.0
    u = tl.div_rn(1.0, shifted)
    product = shifted * u
    u_low = ((1.0 - product) - _product_error(shifted, u, product)) - (a - (shifted - 3.0)) * u
    v = tl.fma(u, u_low, u - 0.203125)
    q = tl.fma(v, 3151.4717, -43.07948)
    q = tl.fma(q, v, -629.80756)
    q = tl.fma(q, v, 122.180046)
    q = tl.fma(q, v, 101.606155)
    q = tl.fma(q, v, -36.99073)
    q = tl.fma(q, v, -22.04985)
    q = tl.fma(q, v, 7.5733595)
    q = tl.fma(q, v, 9.264427)
    q = tl.fma(q, v, 3.697413)
    q = tl.fma(q, v, 0.8519742)
    return u * tl.fma(q, u_low, q)


@triton.jit
def gelu(x):
    """x * Phi(x), Phi the normal distribution function."""
    above = at_least(x, -15.0)
    bounded = at_most(above, 15.0)
    square = bounded * bounded
    m, n = _exponential(square * -0.5, _product_error(bounded, bounded, square) * -0.5)
    tail = _normal_tail(tl.abs(bounded)) * (m + 1.0)
    positive = above * (1.0 - _scale_pow2(tail, n))
    far = tl.where(above < 0, _scale_pow2(above * tail, n), positive)

    # Near zero x / 2 + x^2 P(x^2), of which the first term is exact; |x| <= 1.1.
    r = tl.fma(square, -7.3263877e-06, 0.00011266572)
    r = tl.fma(r, square, -0.0011856162)
    r = tl.fma(r, square, 0.009973072)
    r = tl.fma(r, square, -0.06649033)
    r = tl.fma(r, square, 0.3989423)
    return tl.where(tl.abs(bounded) < 0.75, tl.fma(square, r, above * 0.5), far)


@triton.jit
def gelu_tanh(x):
    """The tanh approximation of gelu: x (1 + tanh(z)) / 2 = x sigmoid(2z), where 2z = x (A + B x^2) in two parts."""
    above = at_least(x, -12.0)
    bounded = at_most(above, 12.0)
    # A = 2 sqrt(2 / pi) = 1.5957692 - 4.534068e-08 and B = 0.044715 A = 0.071354814 + 2.3988325e-09.
    square = bounded * bounded
    cubic = square * 0.071354814
    cubic_low = tl.fma(square, 2.3988325e-09, _product_error(square, 0.071354814, cubic))
    cubic_low = tl.fma(_product_error(bounded, bounded, square), 0.071354814, cubic_low)
    factor = cubic + 1.5957692
    rest = factor - 1.5957692  # the rounding of the sum is exactly (A - (factor - rest)) + (cubic - rest)
    factor_low = ((1.5957692 - (factor - rest)) + (cubic - rest)) + (cubic_low - 4.534068e-08)
    high = bounded * factor
    low = tl.fma(bounded, factor_low, _product_error(bounded, factor, high))
    return _times_sigmoid(above, bounded, high, low)


@triton.jit
def sqrt_softplus(x):
    """sqrt(log(1 + exp(x)))"""
    # Far below zero it is exp(x / 2) to less than an ulp, where exp(x) would be subnormal.
    tiny = x < -18.0
    e = exp(tl.where(tiny, x * 0.5, -tl.abs(x)))
    # log(1 + e) = 2s + s^3 P(s^2) with s = e / (2 + e), s <= 1/3.
    s = tl.div_rn(e, e + 2.0)
    square = s * s
    p = tl.fma(square, 0.28006783, 0.28003025)
    p = tl.fma(p, square, 0.40021437)
    p = tl.fma(p, square, 0.6666642)
    log1p = tl.fma(s * square, p, s + s)
    return tl.where(tiny, e, tl.sqrt_rn(at_least(x, 0.0) + log1p))
