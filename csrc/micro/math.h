// Elementary functions on vectors, the same formulas at every ISA level: no lane ever goes through libm, except in f64.
//
// The f32 polynomials are minimax fits for the intervals named beside them, with coefficients rounded to f32 one by
// one. NaN propagates; infinities give the limits; no intermediate overflows where the result does not.
#pragma once

#include "simd.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// exp(hi + lo) = (1 + m1) * 2^n, where lo is at most a few ulp of hi; relative error of 1 + m1 below 2^-28 plus
// rounding.
struct Exponential {
  VF m1;
  VF n;
};

inline Exponential exponential(VF hi, VF lo) {
  const VF n = round_even(hi * set(0x1.715476p+0f));
  // ln 2 in two parts; the first has 16 bits, so that its product with n is exact.
  const VF r = fma(n, set(-0x1.7f7d1cp-20f), fma(n, set(-0x1.62e4p-1f), hi)) + lo;
  // exp(r) = 1 + r + r^2 q(r) for |r| <= ln(2) / 2
  VF q = fma(r, set(0x1.6b6df2p-10f), set(0x1.12309p-7f));
  q = fma(q, r, set(0x1.55568ap-5f));
  q = fma(q, r, set(0x1.5554a2p-3f));
  q = fma(q, r, set(0.5f));
  return {fma(r * r, q, r), n};
}

inline VF exp(VF x) {
  const Exponential e = exponential(max(set(-128.0f), min(set(89.0f), x)), set(0.0f));
  return scale_pow2(e.m1 + set(1.0f), e.n);
}

// x * sigmoid(hi + lo), where `bounded` is x within the range in which |hi| < 175, and hi has the sign of x. It is
// x - x * sigmoid(-hi) on the positive side, which rounds once where sigmoid is near 1. The product enters before the
// scaling by 2^n, so that nothing is lost where the exponential alone would be subnormal.
inline VF times_sigmoid(VF x, VF bounded, VF hi, VF lo) {
  const VF::Mask negative = less(hi, set(0.0f));
  const VF zero = set(0.0f), one = set(1.0f);
  const Exponential e = exponential(select(negative, hi, zero - hi), select(negative, lo, zero - lo));
  const VF p = e.m1 + one;
  const VF smaller = scale_pow2(bounded * p, e.n) / (one + scale_pow2(p, e.n));
  const VF far = select(negative, smaller, x - smaller);

  // Near zero x / 2 + x hi T(hi^2), of which the first term is exact; relative error of T 2^-29.3 for |hi| <= 0.8.
  const VF square = hi * hi;
  VF t = fma(square, set(0x1.31e06ap-16f), set(-0x1.b68f82p-13f));
  t = fma(t, square, set(0x1.11044cp-9f));
  t = fma(t, square, set(-0x1.555534p-6f));
  t = fma(t, square, set(0x1p-2f));
  return select(less(abs(hi), set(0.75f)), fma(bounded * hi, t, bounded * set(0.5f)), far);
}

// Beyond this bound sigmoid is 1 in f32, or so small that no f32 factor brings the product back into range.
constexpr float kSigmoidBound = 174.0f;

inline VF silu(VF x) {
  const VF low = max(set(-kSigmoidBound), x);
  const VF both = min(set(kSigmoidBound), low);
  return times_sigmoid(low, both, both, set(0.0f));
}

// x * sigmoid(alpha * x). The product needs more than f32: the error of an exponent is multiplied by its size.
template <class V>
struct SigmoidScale;

template <>
struct SigmoidScale<VF> {
  explicit SigmoidScale(double factor)
      : alpha(set(float(factor))),
        alpha_low(set(float(factor - double(float(factor))))),
        bound(set(float(kSigmoidBound / factor))) {}
  VF alpha, alpha_low, bound;
};

inline VF scaled_silu(VF x, const SigmoidScale<VF>& scale) {
  const VF low = max(set(0.0f) - scale.bound, x);
  const VF both = min(scale.bound, low);
  const VF hi = scale.alpha * both;
  return times_sigmoid(low, both, hi, fma(scale.alpha_low, both, product_error(scale.alpha, both, hi)));
}

// x * sigmoid(y) for x of the sign of y.
inline VF product_with_sigmoid(VF x, VF y) {
  return times_sigmoid(x, x, min(set(kSigmoidBound), max(set(-kSigmoidBound), y)), set(0.0f));
}

inline VF sigmoid(VF x) {
  const VF e = exp(set(0.0f) - abs(x));
  const VF one = set(1.0f);
  return select(less(x, set(0.0f)), e, one) / (one + e);
}

// 1 - 2 / (exp(2x) + 1) where that is more than a half; near zero x + x^3 P(x^2), relative error of P 2^-28.2 for
// |x| <= 0.6. Either way the last rounding is the largest.
inline VF tanh(VF x) {
  const VF a = min(set(10.0f), abs(x)), one = set(1.0f);
  const Exponential e = exponential(a + a, set(0.0f));
  const VF far = one - set(2.0f) / (scale_pow2(e.m1 + one, e.n) + one);

  const VF square = a * a;
  VF q = fma(square, set(0x1.36c03cp-9f), set(-0x1.13955cp-7f));
  q = fma(q, square, set(0x1.64faf0p-6f));
  q = fma(q, square, set(-0x1.ba0d96p-5f));
  q = fma(q, square, set(0x1.1110f6p-3f));
  q = fma(q, square, set(-0x1.555556p-2f));
  const VF t = select(less(a, set(0.5625f)), fma(square * a, q, a), far);
  return select(less(x, set(0.0f)), set(0.0f) - t, t);
}

// x * Phi(x), Phi the normal distribution function. Phi(-a) = exp(-a^2 / 2) * u * P(u) with u = 1 / (a + 3), where P
// is a polynomial around the middle of u's range; relative error 2^-26.7 for a <= 15.
inline VF gelu(VF x) {
  const VF low = max(set(-15.0f), x);
  const VF both = min(set(15.0f), low);
  const VF square = both * both, half = set(-0.5f);
  const Exponential e = exponential(half * square, half * product_error(both, both, square));
  const VF p = e.m1 + set(1.0f);

  const VF a = abs(both), three = set(3.0f), one = set(1.0f);
  const VF shifted = a + three;
  const VF u = one / shifted;
  // What the two roundings above took from u, relative to u: the tail is about 2.5 times as sensitive to it.
  const VF product = shifted * u;
  const VF u_low = ((one - product) - product_error(shifted, u, product)) - (a - (shifted - three)) * u;
  const VF v = fma(u, u_low, u - set(0.203125f));
  VF q = fma(v, set(0x1.89ef18p+11f), set(-0x1.58a2c6p+5f));
  q = fma(q, v, set(-0x1.3ae75ep+9f));
  q = fma(q, v, set(0x1.e8b85ep+6f));
  q = fma(q, v, set(0x1.966cb4p+6f));
  q = fma(q, v, set(-0x1.27ed04p+5f));
  q = fma(q, v, set(-0x1.60cc3p+4f));
  q = fma(q, v, set(0x1.e4b1ecp+2f));
  q = fma(q, v, set(0x1.28763p+3f));
  q = fma(q, v, set(0x1.d944d4p+1f));
  q = fma(q, v, set(0x1.b435f6p-1f));
  const VF tail = u * fma(q, u_low, q) * p;

  const VF positive = low * (one - scale_pow2(tail, e.n));
  const VF far = select(less(low, set(0.0f)), scale_pow2(low * tail, e.n), positive);

  // Near zero x / 2 + x^2 P(x^2), of which the first term is exact; relative error of P 2^-28.7 for |x| <= 1.1.
  VF r = fma(square, set(-0x1.ebaa62p-18f), set(0x1.d88de6p-14f));
  r = fma(r, square, set(-0x1.36cd5cp-10f));
  r = fma(r, square, set(0x1.46cc32p-7f));
  r = fma(r, square, set(-0x1.10582ap-4f));
  r = fma(r, square, set(0x1.988454p-2f));
  return select(less(a, set(0.75f)), fma(square, r, low * set(0.5f)), far);
}

// The tanh approximation of gelu: x * (1 + tanh(z)) / 2 = x * sigmoid(2z), 2z = x * (A + B x^2) carried in two parts.
inline VF gelu_tanh(VF x) {
  const VF low = max(set(-12.0f), x);
  const VF both = min(set(12.0f), low);
  // A = 2 sqrt(2 / pi) and B = 0.044715 A, each less its f32 value below.
  const VF a = set(0x1.988454p+0f), a_low = set(-0x1.857936p-25f);
  const VF b = set(0x1.2444f2p-4f), b_low = set(0x1.49b16ap-29f);
  const VF square = both * both;
  const VF cubic = b * square;
  const VF cubic_low = fma(b, product_error(both, both, square), fma(b_low, square, product_error(b, square, cubic)));
  const VF factor = a + cubic;
  const VF rest = factor - a;  // the rounding of a + cubic is exactly (a - (factor - rest)) + (cubic - rest)
  const VF factor_low = ((a - (factor - rest)) + (cubic - rest)) + (cubic_low + a_low);
  const VF hi = both * factor;
  return times_sigmoid(low, both, hi, fma(both, factor_low, product_error(both, factor, hi)));
}

// sqrt(log(1 + exp(x))). log(1 + e) = 2s + s^3 P(s^2) with s = e / (2 + e), s <= 1/3; relative error 2^-27.7.
inline VF sqrt_softplus(VF x) {
  const VF zero = set(0.0f);
  // Far below zero it is exp(x / 2) to less than an ulp, where exp(x) would be subnormal.
  const VF::Mask tiny = less(x, set(-18.0f));
  const VF e = exp(select(tiny, set(0.5f) * x, zero - abs(x)));
  const VF s = e / (e + set(2.0f));
  const VF square = s * s;
  VF p = fma(square, set(0x1.1eca1ap-2f), set(0x1.1ec04p-2f));
  p = fma(p, square, set(0x1.99d1ccp-2f));
  p = fma(p, square, set(0x1.555502p-1f));
  const VF log1p = fma(s * square, p, s + s);
  return select(tiny, e, sqrt(max(zero, x) + log1p));
}

#if defined(POLYMOE_LEVEL_PORTABLE)

inline VD exp(VD x) {
  return map<double, VD::width>([&](int i) { return __builtin_exp(x.v[i]); });
}
inline VD tanh(VD x) {
  return map<double, VD::width>([&](int i) { return __builtin_tanh(x.v[i]); });
}

// x * sigmoid(y) for x and y of one sign, x bounded below.
inline double times_sigmoid(double x, double y) {
  const double e = __builtin_exp(-__builtin_fabs(y));
  return (y < 0 ? x * e : x) / (1 + e);
}
inline double bounded(double x, double bound) { return x < bound ? bound : x; }

inline VD sigmoid(VD x) {
  return map<double, VD::width>([&](int i) {
    const double e = __builtin_exp(-__builtin_fabs(x.v[i]));
    return (x.v[i] < 0 ? e : 1.0) / (1 + e);
  });
}
inline VD product_with_sigmoid(VD x, VD y) { return x * sigmoid(y); }
inline VD silu(VD x) {
  return map<double, VD::width>([&](int i) {
    const double low = bounded(x.v[i], -1000.0);
    return times_sigmoid(low, low);
  });
}

template <>
struct SigmoidScale<VD> {
  explicit SigmoidScale(double factor) : alpha(factor) {}
  double alpha;
};

inline VD scaled_silu(VD x, const SigmoidScale<VD>& scale) {
  return map<double, VD::width>([&](int i) {
    const double low = bounded(x.v[i], -1000.0 / scale.alpha);
    return times_sigmoid(low, scale.alpha * low);
  });
}
inline VD gelu(VD x) {
  return map<double, VD::width>([&](int i) {
    const double low = bounded(x.v[i], -40.0);
    return 0.5 * low * __builtin_erfc(low * -0x1.6a09e667f3bcdp-1);
  });
}
inline VD gelu_tanh(VD x) {
  return map<double, VD::width>([&](int i) {
    const double low = bounded(x.v[i], -40.0);
    return times_sigmoid(low, low * (0x1.9884533d43651p+0 + 0x1.9884533d43651p+0 * 0.044715 * low * low));
  });
}
inline VD sqrt_softplus(VD x) {
  return map<double, VD::width>([&](int i) {
    const double z = x.v[i];
    if (z < -37) return __builtin_exp(0.5 * z);
    return __builtin_sqrt((z > 0 ? z : 0.0) + __builtin_log1p(__builtin_exp(-__builtin_fabs(z))));
  });
}

#endif

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
