// Plain weights, read as they are stored. For each dtype: how one step of a packed row of A and of a stored row of W is
// loaded, and how their products are added to an accumulator of type `V`.
#pragma once

#include "../micro/simd.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// Types that widen one to one: a packed element is an accumulator lane.
template <class T, class Vector, class Lane>
struct PlainWidened {
  using Stored = T;
  using V = Vector;
  using Sum = Lane;
  using Packed = Lane;
  static constexpr int step = V::width;

  using X = V;
  static X load_x(const char* p) { return load<V>(reinterpret_cast<const Lane*>(p)); }
  static X load_w(const char* p) { return load<V>(reinterpret_cast<const T*>(p)); }
  static V multiply_add(V acc, X x, X w) { return fma(x, w, acc); }

  static void pack(const char* p, char* out) { store(reinterpret_cast<Lane*>(out), load_w(p)); }
};

using PlainF32 = PlainWidened<float, VF, float>;
using PlainF16 = PlainWidened<f16, VF, float>;

#if defined(POLYMOE_LEVEL_AVX512_BF16)

struct PlainBf16 {
  using Stored = bf16;
  using V = VF;
  using Sum = float;
  using Packed = bf16;
  static constexpr int step = 32;

  using X = __m512i;
  static X load_x(const char* p) { return _mm512_loadu_si512(p); }
  static X load_w(const char* p) { return _mm512_loadu_si512(p); }
  static V multiply_add(V acc, X x, X w) { return {_mm512_dpbf16_ps(acc.v, __m512bh(x), __m512bh(w))}; }

  static void pack(const char* p, char* out) { _mm512_storeu_si512(out, load_w(p)); }
};

#else

// Two bf16 in 32 bits widen by a shift (the even one) and a mask (the odd one), with no lane crossing; rows of A are
// packed in the same order, all even elements of a step before all odd ones.
struct PlainBf16 {
  using Stored = bf16;
  using V = VF;
  using Sum = float;
  using Packed = float;
  static constexpr int step = 2 * VF::width;

  struct X {
    VF even, odd;
  };
  static X load_x(const char* p) {
    const float* const f = reinterpret_cast<const float*>(p);
    return {load<VF>(f), load<VF>(f + VF::width)};
  }
  static X load_w(const char* p) {
#if defined(POLYMOE_LEVEL_AVX512)
    const __m512i v = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(v, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000u))))}};
#elif defined(POLYMOE_LEVEL_AVX2)
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(v, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000u))))}};
#else
    const bf16* const b = reinterpret_cast<const bf16*>(p);
    X x;
    for (int i = 0; i < VF::width; ++i) {
      x.even.v[i] = widen(b[2 * i]);
      x.odd.v[i] = widen(b[2 * i + 1]);
    }
    return x;
#endif
  }
  static V multiply_add(V acc, X x, X w) { return fma(x.odd, w.odd, fma(x.even, w.even, acc)); }

  static void pack(const char* p, char* out) {
    const X x = load_w(p);
    store(reinterpret_cast<float*>(out), x.even);
    store(reinterpret_cast<float*>(out) + VF::width, x.odd);
  }
};

#endif

#if defined(POLYMOE_LEVEL_PORTABLE)
using PlainF64 = PlainWidened<double, VD, double>;
#endif

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
