// Vectors of bytes: the dot product of four unsigned ones with four signed ones in every 32-bit lane, and what brings
// rows of codes into lanes.
#pragma once

#include "../formats/quantized.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// Loads stay on their side of it: where GCC mixes what brings codes into lanes, their products and what becomes of the
// sums, one waits for the other.
[[gnu::always_inline]] inline void keep_order() { asm volatile("" ::: "memory"); }

#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)

using Bytes = __m512i;
inline Bytes set_ints(int32_t x) { return _mm512_set1_epi32(x); }
inline Bytes load_bytes(const char* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(char* p, Bytes x) { _mm512_storeu_si512(p, x); }
inline Bytes add_ints(Bytes x, Bytes y) { return _mm512_add_epi32(x, y); }
inline VF to_float(Bytes x) { return {_mm512_cvtepi32_ps(x)}; }
inline Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
inline Bytes look_up(__m128i table, Bytes index) { return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), index); }
inline Bytes flip_sign(Bytes x) { return _mm512_xor_si512(x, _mm512_set1_epi8(char(0x80))); }
#if defined(POLYMOE_LEVEL_AVX512_BF16)
inline Bytes dot(Bytes acc, Bytes w, Bytes a) { return _mm512_dpbusd_epi32(acc, w, a); }
#else
inline Bytes dot(Bytes acc, Bytes w, Bytes a) {
  const __m512i low = _mm512_set1_epi16(0xff);
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, low), _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(a, 8));
  return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
}
#endif
inline Bytes dot(Bytes acc, Bytes w, int32_t a) { return dot(acc, w, set_ints(a)); }

// The e8m0 code of every lane.
inline VF from_e8m0(__m512i code) {
  const __mmask16 least = _mm512_testn_epi32_mask(code, code);
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(255));
  const __m512i usual = _mm512_mask_mov_epi32(_mm512_slli_epi32(code, 23), least, _mm512_set1_epi32(1 << 22));
  return {_mm512_castsi512_ps(_mm512_mask_mov_epi32(usual, nan, _mm512_set1_epi32(0x7fc00000)))};
}
// The e8m0 code in byte i of every lane.
inline VF e8m0_of_byte(Bytes x, int i) {
  return from_e8m0(_mm512_and_si512(_mm512_srli_epi32(x, unsigned(8 * i)), _mm512_set1_epi32(255)));
}

// 16 bytes of row r, r + 4, r + 8 and r + 12 in each of four vectors: lane r of v[i] gets bytes 4i to 4i + 3 of row r.
[[gnu::always_inline]] inline void lanes_of_fours(Bytes a, Bytes b, Bytes c, Bytes d, Bytes* v) {
  VF x[4] = {{_mm512_castsi512_ps(a)}, {_mm512_castsi512_ps(b)}, {_mm512_castsi512_ps(c)}, {_mm512_castsi512_ps(d)}};
  transpose_quarters(x);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) v[i] = _mm512_castps_si512(x[i].v);
}

// 16 bytes of each of 16 rows, line(r) those of row r: lane r of vector i has bytes 4i to 4i + 3 of row r.
template <class Line>
[[gnu::always_inline]] inline void load_lanes(Line&& line, Bytes (&v)[4]) {
  const auto four = [&](int first) {
    __m512i x = _mm512_castsi128_si512(line(first));
    x = _mm512_inserti32x4(x, line(first + 4), 1);
    x = _mm512_inserti32x4(x, line(first + 8), 2);
    return _mm512_inserti32x4(x, line(first + 12), 3);
  };
  lanes_of_fours(four(0), four(1), four(2), four(3), v);
}
inline void load_lanes(const char* const* row, int64_t at, Bytes (&v)[4]) {
  load_lanes([&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[r] + at)); }, v);
}
// The rows `stride` bytes apart, which takes few registers.
[[gnu::always_inline]] inline void load_lanes(const char* from, int64_t stride, Bytes (&v)[4]) {
  load_lanes([&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * stride)); }, v);
}
// 32 bytes of each row: half of the loads, which the dot products need as well, for a shuffle more.
[[gnu::always_inline]] inline void load_lanes(const char* from, int64_t stride, Bytes (&v)[8]) {
  const auto two = [&](int r) {
    const auto line = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * stride)); };
    return _mm512_inserti64x4(_mm512_castsi256_si512(line(r)), line(r + 4), 1);
  };
  Bytes low[4], high[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const __m512i x = two(r), y = two(r + 8);
    low[r] = _mm512_shuffle_i32x4(x, y, 0x88), high[r] = _mm512_shuffle_i32x4(x, y, 0xdd);
  }
  lanes_of_fours(low[0], low[1], low[2], low[3], v);
  lanes_of_fours(high[0], high[1], high[2], high[3], v + 4);
}

// The first `bytes` of the 16 that lie `at` bytes on in each of 16 rows, and zeros.
inline void load_lanes(const char* const* row, int64_t at, int64_t bytes, Bytes (&v)[4]) {
  const __mmask16 mask = lanes_below(bytes < 16 ? int(bytes) : 16);
  load_lanes([&](int r) { return _mm_maskz_loadu_epi8(mask, row[r] + at); }, v);
}
// Scales of 16 rows, the first `blocks` <= 16 of 32-bit ones or e8m0, by block, `stride` floats apart.
inline void scale_lanes(const char* const* scale, bool exponents, int64_t first, int64_t blocks, float* out,
                        int64_t stride) {
  Bytes v[4];
  if (exponents) {
    load_lanes(scale, first, blocks, v);
    for (int64_t b = 0; b < blocks; ++b) store(out + b * stride, e8m0_of_byte(v[b / 4], int(b % 4)));
    return;
  }
  for (int64_t b = 0; b < blocks; b += 4) {
    load_lanes(scale, (first + b) * 4, (blocks - b) * 4, v);
    for (int64_t i = 0; i < 4 && b + i < blocks; ++i) _mm512_storeu_si512(out + (b + i) * stride, v[i]);
  }
}

#elif defined(POLYMOE_LEVEL_AVX2)

using Bytes = __m256i;
inline Bytes set_ints(int32_t x) { return _mm256_set1_epi32(x); }
inline Bytes load_bytes(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_bytes(char* p, Bytes x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline Bytes add_ints(Bytes x, Bytes y) { return _mm256_add_epi32(x, y); }
inline VF to_float(Bytes x) { return {_mm256_cvtepi32_ps(x)}; }
inline Bytes low_nibbles(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
inline Bytes look_up(__m128i table, Bytes index) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), index);
}
inline Bytes flip_sign(Bytes x) { return _mm256_xor_si256(x, _mm256_set1_epi8(char(0x80))); }
inline Bytes dot(Bytes acc, Bytes w, int32_t a) {
  const __m256i x = _mm256_set1_epi32(a), low = _mm256_set1_epi16(0xff);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, low), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}

inline VF e8m0_of_byte(Bytes x, int i) {
  const __m256i code = _mm256_and_si256(_mm256_srli_epi32(x, 8 * i), _mm256_set1_epi32(255));
  const __m256i zero = _mm256_cmpeq_epi32(code, _mm256_setzero_si256());
  const __m256i nan = _mm256_cmpeq_epi32(code, _mm256_set1_epi32(255));
  __m256i bits = _mm256_or_si256(_mm256_slli_epi32(code, 23), _mm256_and_si256(zero, _mm256_set1_epi32(1 << 22)));
  bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), nan);
  return {_mm256_castsi256_ps(bits)};
}

// 16 bytes of each of 8 rows, from row(r) on: lane r of vector i has bytes 4i to 4i + 3 of row r.
template <class Row>
[[gnu::always_inline]] inline void lanes_of_rows(Row&& row, Bytes* v) {
  const auto two = [&](int first) {
    const auto line = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row(r))); };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(line(first)), line(first + 4), 1);
  };
  const __m256i a = two(0), b = two(1), c = two(2), d = two(3);
  const __m256i low0 = _mm256_unpacklo_epi32(a, b), high0 = _mm256_unpackhi_epi32(a, b);
  const __m256i low1 = _mm256_unpacklo_epi32(c, d), high1 = _mm256_unpackhi_epi32(c, d);
  v[0] = _mm256_unpacklo_epi64(low0, low1), v[1] = _mm256_unpackhi_epi64(low0, low1);
  v[2] = _mm256_unpacklo_epi64(high0, high1), v[3] = _mm256_unpackhi_epi64(high0, high1);
}

#else

struct Bytes {
  uint32_t v[VF::width];  // four bytes each
};
template <class F>
inline Bytes each_lane(F f) {
  Bytes r;
  for (int i = 0; i < VF::width; ++i) r.v[i] = uint32_t(f(i));
  return r;
}
inline Bytes set_ints(int32_t x) {
  return each_lane([&](int) { return x; });
}
inline Bytes load_bytes(const char* p) {
  Bytes r;
  __builtin_memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_bytes(char* p, Bytes x) { __builtin_memcpy(p, x.v, sizeof x.v); }
inline Bytes add_ints(Bytes x, Bytes y) {
  return each_lane([&](int i) { return x.v[i] + y.v[i]; });
}
inline VF to_float(Bytes x) {
  return map<float, VF::width>([&](int i) { return float(int32_t(x.v[i])); });
}
inline Bytes low_nibbles(Bytes x) {
  return each_lane([&](int i) { return x.v[i] & 0x0f0f0f0fu; });
}
inline Bytes high_nibbles(Bytes x) {
  return each_lane([&](int i) { return x.v[i] >> 4 & 0x0f0f0f0fu; });
}
inline Bytes flip_sign(Bytes x) {
  return each_lane([&](int i) { return x.v[i] ^ 0x80808080u; });
}
inline Bytes dot(Bytes acc, Bytes w, int32_t a) {
  for (int i = 0; i < VF::width; ++i)
    for (int k = 0; k < 32; k += 8)
      acc.v[i] += uint32_t(int32_t(w.v[i] >> k & 255) * int32_t(int8_t(uint8_t(uint32_t(a) >> k))));
  return acc;
}
inline VF e8m0_of_byte(Bytes x, int i) {
  return map<float, VF::width>([&](int r) { return from_e8m0(uint8_t(x.v[r] >> 8 * i)); });
}
template <class Row>
inline void lanes_of_rows(Row&& row, Bytes* v) {
  for (int r = 0; r < VF::width; ++r)
    for (int i = 0; i < 4; ++i) __builtin_memcpy(v[i].v + r, row(r) + 4 * i, 4);
}

#endif

#if !defined(POLYMOE_LEVEL_AVX512) && !defined(POLYMOE_LEVEL_AVX512_BF16)
inline void load_lanes(const char* const* row, int64_t at, Bytes (&v)[4]) {
  lanes_of_rows([&](int r) { return row[r] + at; }, v);
}
// The rows `stride` bytes apart: 16 bytes of each, or 32.
template <int COUNT>
inline void load_lanes(const char* from, int64_t stride, Bytes (&v)[COUNT]) {
  for (int i = 0; i < COUNT; i += 4) lanes_of_rows([&](int r) { return from + r * stride + 4 * i; }, v + i);
}
#endif

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
