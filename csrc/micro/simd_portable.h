// Vectors as plain arrays: standard C++ that any compiler for any CPU takes, and the only level that serves f64.
#pragma once

#include "simd_scalar.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

template <class T, int W>
struct Array {
  static constexpr int width = W;
  T v[W];
  struct Mask {
    bool m[W];
  };
};

using VF = Array<float, 16>;
using VD = Array<double, 8>;

inline double widen(double x) { return x; }
inline void narrow(double* p, double x) { *p = x; }
inline double magnitude(double x) { return __builtin_fabs(x); }
inline float magnitude(float x) { return __builtin_fabsf(x); }
inline double root(double x) { return __builtin_sqrt(x); }
inline float root(float x) { return __builtin_sqrtf(x); }
// Adding and taking away 1.5 * 2^52 (2^23) rounds to an integer, ties to even, for the small values that occur.
inline double nearest(double x) { return (x + 0x1.8p52) - 0x1.8p52; }
inline float nearest(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

template <class T, int W, class F>
inline Array<T, W> map(F f) {
  Array<T, W> r;
  for (int i = 0; i < W; ++i) r.v[i] = f(i);
  return r;
}

template <class V>
struct Scalar;
template <class T, int W>
struct Scalar<Array<T, W>> {
  using type = T;
};

template <class V = VF>
inline V set(typename Scalar<V>::type x) {
  V r;
  for (int i = 0; i < V::width; ++i) r.v[i] = x;
  return r;
}

template <class V = VF, class S>
inline V load(const S* p) {
  V r;
  for (int i = 0; i < V::width; ++i) r.v[i] = widen(p[i]);
  return r;
}

template <class V = VF, class S>
inline V load_n(const S* p, int n) {
  V r = set<V>(0);
  for (int i = 0; i < n; ++i) r.v[i] = widen(p[i]);
  return r;
}

template <class T, int W, class S>
inline void store(S* p, Array<T, W> a) {
  for (int i = 0; i < W; ++i) narrow(p + i, a.v[i]);
}

template <class T, int W, class S>
inline void stream(S* p, Array<T, W> a) {
  store(p, a);
}

template <class T, int W, class S>
inline void store_n(S* p, Array<T, W> a, int n) {
  for (int i = 0; i < n; ++i) narrow(p + i, a.v[i]);
}

#define POLYMOE_BINARY(op)                                       \
  template <class T, int W>                                      \
  inline Array<T, W> operator op(Array<T, W> a, Array<T, W> b) { \
    return map<T, W>([&](int i) { return a.v[i] op b.v[i]; });   \
  }
POLYMOE_BINARY(+)
POLYMOE_BINARY(-)
POLYMOE_BINARY(*)
POLYMOE_BINARY(/)
#undef POLYMOE_BINARY

template <class T, int W>
inline Array<T, W> fma(Array<T, W> a, Array<T, W> b, Array<T, W> c) {
  return map<T, W>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline VF product_error(VF a, VF b, VF p) {
  return map<float, VF::width>([&](int i) { return float(double(a.v[i]) * b.v[i] - p.v[i]); });
}
template <class T, int W>
inline Array<T, W> min(Array<T, W> a, Array<T, W> b) {
  return map<T, W>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
template <class T, int W>
inline Array<T, W> max(Array<T, W> a, Array<T, W> b) {
  return map<T, W>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
template <class T, int W>
inline Array<T, W> abs(Array<T, W> a) {
  return map<T, W>([&](int i) { return magnitude(a.v[i]); });
}
template <class T, int W>
inline Array<T, W> sqrt(Array<T, W> a) {
  return map<T, W>([&](int i) { return root(a.v[i]); });
}
template <class T, int W>
inline Array<T, W> round_even(Array<T, W> a) {
  return map<T, W>([&](int i) { return nearest(a.v[i]); });
}

template <class T, int W>
inline typename Array<T, W>::Mask less(Array<T, W> a, Array<T, W> b) {
  typename Array<T, W>::Mask r;
  for (int i = 0; i < W; ++i) r.m[i] = a.v[i] < b.v[i];
  return r;
}
template <class T, int W>
inline Array<T, W> select(typename Array<T, W>::Mask m, Array<T, W> a, Array<T, W> b) {
  return map<T, W>([&](int i) { return m.m[i] ? a.v[i] : b.v[i]; });
}

// Two factors, since 2^n itself leaves the normal range where v * 2^n does not.
inline VF scale_pow2(VF a, VF n) {
  return map<float, VF::width>([&](int i) {
    const int whole = n.v[i] == n.v[i] ? int(n.v[i]) : 0, half = whole / 2;
    return a.v[i] * bits_float(uint32_t(half + 127) << 23) * bits_float(uint32_t(whole - half + 127) << 23);
  });
}

template <class T, int W>
inline T sum(Array<T, W> a) {
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] + a.v[i + half];
  return a.v[0];
}
template <class T, int W>
inline void sum4(T* out, Array<T, W> a, Array<T, W> b, Array<T, W> c, Array<T, W> d) {
  out[0] = sum(a);
  out[1] = sum(b);
  out[2] = sum(c);
  out[3] = sum(d);
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
