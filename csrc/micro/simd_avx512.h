// Sixteen lanes on AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "simd_scalar.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

struct VF {
  static constexpr int width = 16;
  using Mask = __mmask16;
  __m512 v;
};

template <class V = VF>
inline V set(float x) {
  return {_mm512_set1_ps(x)};
}

inline __mmask16 lanes_below(int n) { return __mmask16((1u << n) - 1u); }

inline VF widen16(const bf16*, __m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
inline VF widen16(const f16*, __m256i x) { return {_mm512_cvtph_ps(x)}; }

template <class V = VF>
inline V load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
template <class V = VF, class T>
inline V load(const T* p) {
  return widen16(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <class V = VF>
inline V load_n(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(lanes_below(n), p)};
}
template <class V = VF, class T>
inline V load_n(const T* p, int n) {
  return widen16(p, _mm256_maskz_loadu_epi16(lanes_below(n), p));
}

inline __m256i narrow16(const bf16*, VF a) {
  // Not vcvtneps2bf16: that one flushes subnormals, and torch's conversion does not.
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
inline __m256i narrow16(const f16*, VF a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void store(float* p, VF a) { _mm512_storeu_ps(p, a.v); }
template <class T>
inline void store(T* p, VF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow16(p, a));
}
// Past the caches; aligned to a stored vector.
inline void stream(float* p, VF a) { _mm512_stream_ps(p, a.v); }
template <class T>
inline void stream(T* p, VF a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow16(p, a));
}
#if defined(POLYMOE_LEVEL_AVX512_BF16)
[[gnu::noinline, gnu::cold]] inline void stream_small(bf16* p, VF a, VF b) {
  __m256i* const to = reinterpret_cast<__m256i*>(p);
  _mm256_stream_si256(to, narrow16(p, a));
  _mm256_stream_si256(to + 1, narrow16(p, b));
}
// Two vectors by one instruction and one store, unless a number is so small that the instruction would flush it.
[[gnu::always_inline]] inline void stream(bf16* p, VF a, VF b) {
  const __m512i exponent = _mm512_set1_epi32(0x7f800000);
  const __mmask16 small = _mm512_testn_epi32_mask(_mm512_castps_si512(a.v), exponent) |
                          _mm512_testn_epi32_mask(_mm512_castps_si512(b.v), exponent);
  if (__builtin_expect(small == 0 && reinterpret_cast<uintptr_t>(p) % 64 == 0, 1))
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), __m512i(_mm512_cvtne2ps_pbh(b.v, a.v)));
  else
    stream_small(p, a, b);
}
#endif
inline void store_n(float* p, VF a, int n) { _mm512_mask_storeu_ps(p, lanes_below(n), a.v); }
template <class T>
inline void store_n(T* p, VF a, int n) {
  _mm256_mask_storeu_epi16(p, lanes_below(n), narrow16(p, a));
}

inline VF operator+(VF a, VF b) { return {_mm512_add_ps(a.v, b.v)}; }
inline VF operator-(VF a, VF b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline VF operator*(VF a, VF b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline VF operator/(VF a, VF b) { return {_mm512_div_ps(a.v, b.v)}; }
inline VF fma(VF a, VF b, VF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline VF product_error(VF a, VF b, VF p) { return {_mm512_fmsub_ps(a.v, b.v, p.v)}; }
inline VF min(VF a, VF b) { return {_mm512_min_ps(a.v, b.v)}; }
inline VF max(VF a, VF b) { return {_mm512_max_ps(a.v, b.v)}; }
inline VF abs(VF a) { return {_mm512_abs_ps(a.v)}; }
inline VF sqrt(VF a) { return {_mm512_sqrt_ps(a.v)}; }
inline VF round_even(VF a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VF::Mask less(VF a, VF b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline VF select(VF::Mask m, VF a, VF b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }

inline VF scale_pow2(VF a, VF n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// Per 128-bit quarter: (x0 + x2) + (x1 + x3) of each of the four vectors.
inline __m512 sum_quads(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)),
                       _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2)));
}
inline void sum4(float* out, VF a, VF b, VF c, VF d) {
  const __m512 q = sum_quads(a.v, b.v, c.v, d.v);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(q), _mm512_extractf32x8_ps(q, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
inline float sum(VF a) {
  float out[4];
  sum4(out, a, a, a, a);
  return out[0];
}

// In each quarter by itself: lane i of vector c has what was lane c of vector i.
[[gnu::always_inline]] inline void transpose_quarters(VF (&v)[4]) {
  const __m512 low01 = _mm512_unpacklo_ps(v[0].v, v[1].v), high01 = _mm512_unpackhi_ps(v[0].v, v[1].v);
  const __m512 low23 = _mm512_unpacklo_ps(v[2].v, v[3].v), high23 = _mm512_unpackhi_ps(v[2].v, v[3].v);
  v[0].v = _mm512_shuffle_ps(low01, low23, _MM_SHUFFLE(1, 0, 1, 0));
  v[1].v = _mm512_shuffle_ps(low01, low23, _MM_SHUFFLE(3, 2, 3, 2));
  v[2].v = _mm512_shuffle_ps(high01, high23, _MM_SHUFFLE(1, 0, 1, 0));
  v[3].v = _mm512_shuffle_ps(high01, high23, _MM_SHUFFLE(3, 2, 3, 2));
}

// Quarter i of vector c has what was quarter c of vector i.
[[gnu::always_inline]] inline void exchange_quarters(VF (&v)[4]) {
  const __m512 even01 = _mm512_shuffle_f32x4(v[0].v, v[1].v, 0x88), odd01 = _mm512_shuffle_f32x4(v[0].v, v[1].v, 0xdd);
  const __m512 even23 = _mm512_shuffle_f32x4(v[2].v, v[3].v, 0x88), odd23 = _mm512_shuffle_f32x4(v[2].v, v[3].v, 0xdd);
  v[0].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
  v[1].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
  v[2].v = _mm512_shuffle_f32x4(even01, even23, 0xdd);
  v[3].v = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
}

// Lane j of vector i goes to lane i of vector j.
inline void transpose(VF (&v)[16]) {
  VF fours[4][4];
  for (int q = 0; q < 4; ++q) {
    for (int i = 0; i < 4; ++i) fours[q][i] = v[4 * q + i];
    transpose_quarters(fours[q]);
  }
  for (int c = 0; c < 4; ++c) {
    VF x[4] = {fours[0][c], fours[1][c], fours[2][c], fours[3][c]};
    exchange_quarters(x);
    for (int q = 0; q < 4; ++q) v[4 * q + c] = x[q];
  }
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
