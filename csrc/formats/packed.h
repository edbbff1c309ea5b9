// Prepacked dense weights: panels of kPanel output columns, each stored step by step along the reduction, so that the
// lanes of a vector are columns and nothing is ever added across lanes. For each dtype: how a step of one row of A is
// broadcast, how a step of a vector's columns of W is loaded, and how their products are added to an accumulator.
//
// Rows of A are packed by steps: `pack` does one of them; where there are vectors, `gather` loads as many steps of a
// row as a vector has lanes, and `spread` turns n such lanes, by then in their final order, into packed ones.
//
// A step is one element of the reduction, or a pair for bf16, which is what the dot product instruction takes and what
// widens by a shift and a mask elsewhere. The layout is the same at every ISA level.
#pragma once

#include "../micro/simd.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

template <class T, class Vector, class Lane>
struct PackedWidened {
  using Stored = T;
  using V = Vector;
  using Sum = Lane;
  static constexpr int step = 1;
  static constexpr int parts = 1;         // multiply-adds that a step takes, one after the other
  static constexpr int packed_lanes = 1;  // accumulator lanes' worth of memory that a step of a row of A takes

  using X = V;
  using W = V;
  static X load_x(const Lane* p, int) { return set<V>(*p); }
  static W load_w(const char* p, int) { return load<V>(reinterpret_cast<const T*>(p)); }
  static V multiply_add(V acc, X x, W w) { return fma(x, w, acc); }

  static void pack(const T* p, Lane* out) { *out = widen(*p); }
#if !defined(POLYMOE_LEVEL_PORTABLE)
  static V gather(const T* p) { return load<V>(p); }
  static void spread(const float* gathered, int64_t n, float* out) { __builtin_memcpy(out, gathered, size_t(n) * 4); }
#endif
};

using PackedF32 = PackedWidened<float, VF, float>;
using PackedF16 = PackedWidened<f16, VF, float>;

#if defined(POLYMOE_LEVEL_AVX512_BF16)

struct PackedBf16 {
  using Stored = bf16;
  using V = VF;
  using Sum = float;
  static constexpr int step = 2;
  static constexpr int parts = 1;
  static constexpr int packed_lanes = 1;

  using X = __m512i;
  using W = __m512i;
  static X load_x(const float* p, int) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static W load_w(const char* p, int) { return _mm512_loadu_si512(p); }
  static V multiply_add(V acc, X x, W w) { return {_mm512_dpbf16_ps(acc.v, __m512bh(x), __m512bh(w))}; }

  static VF gather(const bf16* p) { return load<VF>(reinterpret_cast<const float*>(p)); }
  static void spread(const float* gathered, int64_t n, float* out) { __builtin_memcpy(out, gathered, size_t(n) * 4); }
};

#else

struct PackedBf16 {
  using Stored = bf16;
  using V = VF;
  using Sum = float;
  static constexpr int step = 2;
  static constexpr int parts = 2;  // the even elements, then the odd ones: both at once would not fit the registers
  static constexpr int packed_lanes = 2;

  using X = VF;
  using W = VF;
  static X load_x(const float* p, int part) { return set<VF>(p[part]); }
  static W load_w(const char* p, int part) {
#if defined(POLYMOE_LEVEL_AVX512)
    const __m512i v = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(part == 0 ? _mm512_slli_epi32(v, 16)
                                          : _mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000u))))};
#elif defined(POLYMOE_LEVEL_AVX2)
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(part == 0 ? _mm256_slli_epi32(v, 16)
                                          : _mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000u))))};
#else
    const bf16* const b = reinterpret_cast<const bf16*>(p) + part;
    W w;
    for (int i = 0; i < VF::width; ++i) w.v[i] = widen(b[2 * i]);
    return w;
#endif
  }
  static V multiply_add(V acc, X x, W w) { return fma(x, w, acc); }

  static void pack(const bf16* p, float* out) {
    out[0] = widen(p[0]);
    out[1] = widen(p[1]);
  }
#if !defined(POLYMOE_LEVEL_PORTABLE)
  static VF gather(const bf16* p) { return load<VF>(reinterpret_cast<const float*>(p)); }
  static void spread(const float* gathered, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t pair = float_bits(gathered[i]);
      out[2 * i] = bits_float(pair << 16);
      out[2 * i + 1] = bits_float(pair & 0xffff0000u);
    }
  }
#endif
};

#endif

#if defined(POLYMOE_LEVEL_PORTABLE)
using PackedF64 = PackedWidened<double, VD, double>;
#endif

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
