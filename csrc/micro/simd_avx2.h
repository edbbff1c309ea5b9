// Eight lanes on AVX2 + FMA + F16C.
#pragma once

#include <immintrin.h>

#include "simd_scalar.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

struct VF {
  static constexpr int width = 8;
  using Mask = __m256;
  __m256 v;
};

template <class V = VF>
inline V set(float x) {
  return {_mm256_set1_ps(x)};
}

inline __m256i lanes_below(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline VF widen8(const bf16*, __m128i x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
inline VF widen8(const f16*, __m128i x) { return {_mm256_cvtph_ps(x)}; }

template <class V = VF>
inline V load(const float* p) {
  return {_mm256_loadu_ps(p)};
}
template <class V = VF, class T>
inline V load(const T* p) {
  return widen8(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <class V = VF>
inline V load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, lanes_below(n))};
}
template <class V = VF, class T>
inline V load_n(const T* p, int n) {
  alignas(16) uint16_t tail[8] = {};
  for (int i = 0; i < n; ++i) tail[i] = p[i].bits;
  return widen8(p, _mm_load_si128(reinterpret_cast<const __m128i*>(tail)));
}

inline __m128i narrow8(const bf16*, VF a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i narrow8(const f16*, VF a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store(float* p, VF a) { _mm256_storeu_ps(p, a.v); }
template <class T>
inline void store(T* p, VF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow8(p, a));
}
// Past the caches; aligned to a stored vector.
inline void stream(float* p, VF a) { _mm256_stream_ps(p, a.v); }
template <class T>
inline void stream(T* p, VF a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow8(p, a));
}
inline void store_n(float* p, VF a, int n) { _mm256_maskstore_ps(p, lanes_below(n), a.v); }
template <class T>
inline void store_n(T* p, VF a, int n) {
  alignas(16) uint16_t tail[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(tail), narrow8(p, a));
  for (int i = 0; i < n; ++i) p[i].bits = tail[i];
}

inline VF operator+(VF a, VF b) { return {_mm256_add_ps(a.v, b.v)}; }
inline VF operator-(VF a, VF b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline VF operator*(VF a, VF b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline VF operator/(VF a, VF b) { return {_mm256_div_ps(a.v, b.v)}; }
inline VF fma(VF a, VF b, VF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline VF product_error(VF a, VF b, VF p) { return {_mm256_fmsub_ps(a.v, b.v, p.v)}; }
inline VF min(VF a, VF b) { return {_mm256_min_ps(a.v, b.v)}; }
inline VF max(VF a, VF b) { return {_mm256_max_ps(a.v, b.v)}; }
inline VF abs(VF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline VF sqrt(VF a) { return {_mm256_sqrt_ps(a.v)}; }
inline VF round_even(VF a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline VF::Mask less(VF a, VF b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
inline VF select(VF::Mask m, VF a, VF b) { return {_mm256_blendv_ps(b.v, a.v, m)}; }

// Two factors, since 2^n itself leaves the normal range where v * 2^n does not.
inline VF scale_pow2(VF a, VF n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127), rest = _mm256_sub_epi32(whole, half);
  const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, low), high)};
}

// Per 128-bit half: (x0 + x2) + (x1 + x3) of each of the four vectors.
inline __m256 sum_quads(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)),
                       _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2)));
}
inline void sum4(float* out, VF a, VF b, VF c, VF d) {
  const __m256 q = sum_quads(a.v, b.v, c.v, d.v);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1)));
}
inline float sum(VF a) {
  float out[4];
  sum4(out, a, a, a, a);
  return out[0];
}

// Lane j of vector i goes to lane i of vector j.
inline void transpose(VF (&v)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(v[2 * i].v, v[2 * i + 1].v);
    a[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i].v, v[2 * i + 1].v);
  }
  const auto low = [](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, _MM_SHUFFLE(1, 0, 1, 0)); };
  const auto high = [](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, _MM_SHUFFLE(3, 2, 3, 2)); };
  for (int i = 0; i < 2; ++i) {  // b[4i + c]: lane c of each half of vectors 4i to 4i + 3
    b[4 * i] = low(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = high(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = low(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = high(a[4 * i + 1], a[4 * i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    v[c].v = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    v[4 + c].v = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
