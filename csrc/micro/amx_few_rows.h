// Products of few rows of bf16 with quantised weights in the order of tile products, but without tiles: a lane is a row
// of W. Within a step the tile product adds even and odd elements in two chains of fused multiply-adds from zero, and
// then their sum to C. It reads and writes subnormal numbers as zero, which f32 arithmetic does not: so this serves
// rows whose elements are far enough from the ends of the range that no sum can be subnormal, nor overflow.
#pragma once

#include "../formats/quantized.h"
#include "amx_product.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kFewRows = 3;     // where tiles begin to win
constexpr int kMostBelow = 30;  // what a group may be below the largest of its block

// A few rows of A as f32, zeros up to whole steps.
class FewRows {
 public:
  static int64_t bytes(int64_t d) { return kFewRows * steps_of(d) * kStep * int64_t(sizeof(float)); }

  // From one group as the right operand of tile products.
  FewRows(const Rows& rows, char* memory) : stride_(rows.steps() * kStep), x_(reinterpret_cast<float*>(memory)) {
    const int count = rows.groups.rows(0);
    const uint32_t* pair = reinterpret_cast<const uint32_t*>(rows.a);
    uint32_t least = 0x7f800000u, most = 0;
    for (int64_t k = 0; k < stride_; k += 2)
      for (int m = 0; m < count; ++m, ++pair)
        for (int odd = 0; odd < 2; ++odd) {
          const uint32_t bits = odd ? *pair & 0xffff0000u : *pair << 16, magnitude = bits & 0x7fffffffu;
          x_[m * stride_ + k + odd] = bits_float(bits);
          if (magnitude && magnitude < least) least = magnitude;
          if (magnitude > most) most = magnitude;
        }
    narrow_ = least >= (127u - 80u) << 23 && most <= (127u + 80u) << 23;
  }

  const float* row(int m, int64_t step) const { return x_ + m * stride_ + step * kStep; }
  // Whether products with codes of 2^-9 to 2^9 times factors of 2^-kMostBelow to 1 have sums that f32 holds.
  bool narrow() const { return narrow_; }

 private:
  int64_t stride_;
  float* x_;
  bool narrow_;
};

// 16 bytes of each of 16 rows: lane r of vector i has bytes 4i to 4i + 3 of row r.
inline void load_lanes(const char* const* row, int64_t at, __m512i (&v)[4]) {
  const auto four = [&](int first) {
    const auto line = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[first + 4 * i] + at)); };
    __m512i x = _mm512_castsi128_si512(line(0));
    x = _mm512_inserti32x4(x, line(1), 1);
    x = _mm512_inserti32x4(x, line(2), 2);
    return _mm512_inserti32x4(x, line(3), 3);
  };
  const __m512i a = four(0), b = four(1), c = four(2), d = four(3);
  const __m512i low0 = _mm512_unpacklo_epi32(a, b), high0 = _mm512_unpackhi_epi32(a, b);
  const __m512i low1 = _mm512_unpacklo_epi32(c, d), high1 = _mm512_unpackhi_epi32(c, d);
  v[0] = _mm512_unpacklo_epi64(low0, low1), v[1] = _mm512_unpackhi_epi64(low0, low1);
  v[2] = _mm512_unpacklo_epi64(high0, high1), v[3] = _mm512_unpackhi_epi64(high0, high1);
}

// The e8m0 scales of a block's groups, in bytes from scale[r] on for row r of 16. Those of a row as factors of the
// largest, which is its multiplier: lane r is row r's. False if one is more than kMostBelow below the largest.
inline bool factors_of_lanes(const char* const* scale, int groups, VF* factor, VF& multiplier) {
  __m512i v[4];
  load_lanes(scale, 0, v);
  __m512i most = _mm512_max_epu8(_mm512_max_epu8(v[0], v[1]), _mm512_max_epu8(v[2], v[3]));
  most = _mm512_max_epu8(most, _mm512_srli_epi32(most, 16));
  most = _mm512_max_epu8(most, _mm512_srli_epi32(most, 8));
  const __m512i byte = _mm512_set1_epi32(0xff), largest = _mm512_and_si512(most, byte);
  __m512i furthest = _mm512_setzero_si512();
#pragma GCC unroll 16
  for (int g = 0; g < int(kGroups); ++g) {
    if (g >= groups) break;
    const __m512i code = _mm512_and_si512(_mm512_srli_epi32(v[g / 4], unsigned(g % 4 * 8)), byte);
    const __m512i below = _mm512_sub_epi32(largest, code);
    furthest = _mm512_max_epu32(furthest, below);
    factor[g] = {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(127), below), 23))};
  }
  if (_mm512_reduce_max_epu32(furthest) > kMostBelow) return false;
  alignas(64) uint32_t codes[kTileRows];
  alignas(64) float scales[kTileRows];
  _mm512_store_si512(codes, largest);
  for (int r = 0; r < kTileRows; ++r) scales[r] = from_e8m0(uint8_t(codes[r]));
  multiplier = load<VF>(scales);
  return true;
}

// A step of e2m1 codes times M rows: the sums of even and odd elements together.
template <int M>
[[gnu::always_inline]] inline void step_of_e2m1(const char* const* row, int64_t at, const float* const* x, VF* sums) {
  const __m512 values = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, 0, -0.5f, -1, -1.5f, -2, -3, -4, -6);
  __m512i v[4];
  load_lanes(row, at, v);
  VF even[M], odd[M];
  for (int m = 0; m < M; ++m) even[m] = odd[m] = set<VF>(0);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      // An index has four bits.
      const VF w{_mm512_permutexvar_ps(j == 0 ? v[i] : _mm512_srli_epi32(v[i], unsigned(4 * j)), values)};
#pragma GCC unroll 3
      for (int m = 0; m < M; ++m) {
        VF& sum = j % 2 ? odd[m] : even[m];
        sum = fma(set<VF>(x[m][8 * i + j]), w, sum);
      }
    }
  for (int m = 0; m < M; ++m) sums[m] = even[m] + odd[m];
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
