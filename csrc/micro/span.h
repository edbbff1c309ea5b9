// A row as full vectors and one masked tail: the same code, hence the same arithmetic per element, for both.
#pragma once

#include "simd.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

struct Full {};
struct Tail {
  int n;
};

template <class V, class T>
inline V read(const T* p, Full) {
  return load<V>(p);
}
template <class V, class T>
inline V read(const T* p, Tail tail) {
  return load_n<V>(p, tail.n);
}

template <class V, class T>
inline void write(T* p, V v, Full) {
  store(p, v);
}
template <class V, class T>
inline void write(T* p, V v, Tail tail) {
  store_n(p, v, tail.n);
}

// Two vectors that follow one another. A level may have a faster way for a type, with the same bits.
template <class T, class V>
inline void stream(T* p, V a, V b) {
  stream(p, a);
  stream(p + V::width, b);
}

// f(i, Full{}) for every whole vector at element i, and f(i, Tail{left}) for the rest.
template <class V, class F>
inline void for_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) f(i, Full{});
  if (i < n) f(i, Tail{int(n - i)});
}

// The type sums are kept in, and its vector, by the type of a row.
template <class T>
struct Compute {
  using Vector = VF;
  using Value = float;
};
#if defined(POLYMOE_LEVEL_PORTABLE)
template <>
struct Compute<double> {
  using Vector = VD;
  using Value = double;
};
#endif

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
