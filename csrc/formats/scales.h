// Scales of quantised weights, block by block: the multiplier of what a block of a row sums to, and what a codec needs
// to decode it.
#pragma once

#include "quantized.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// Elements that a block takes: those that share a scale, or any number, since then the groups of a block are taken
// relative to one another, or the whole row shares one.
template <class C>
int64_t block_of(const QuantizedMatrix& m) {
  return C::adjust == Adjust::groups || m.scale_columns == 0 ? kBlock : m.scale_columns;
}

// Of kGroups codes.
inline uint8_t largest_of(const uint8_t* codes) {
#if defined(POLYMOE_LEVEL_PORTABLE)
  uint8_t largest = 0;
  for (int i = 0; i < kGroups; ++i) largest = codes[i] > largest ? codes[i] : largest;
  return largest;
#else
  __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  v = _mm_max_epu8(v, _mm_srli_si128(v, 8));
  v = _mm_max_epu8(v, _mm_srli_si128(v, 4));
  v = _mm_max_epu8(v, _mm_srli_si128(v, 2));
  v = _mm_max_epu8(v, _mm_srli_si128(v, 1));
  return uint8_t(_mm_cvtsi128_si32(v));
#endif
}

// The largest scale of a block of groups is its multiplier; the groups get what they are below it.
template <class A>
float prepare_groups(const uint8_t* codes, uint32_t* adjust) {
  const uint8_t largest = largest_of(codes);
  A::below(codes, largest, adjust);
  return from_e8m0(largest);
}

// Scales and zero points of a row.
struct RowScales {
  const char* scale;
  const uint8_t* zero;  // or null

  RowScales() = default;
  RowScales(const QuantizedMatrix& m, int64_t n)
      : scale(m.scale + n / m.scale_rows * m.scale_stride),
        zero(m.zero ? reinterpret_cast<const uint8_t*>(m.zero + n * m.zero_stride) : nullptr) {}
};

// The multiplier of block b of a row of d elements. `adjust` gets kGroups elements where groups differ, and one where
// blocks have zero points.
template <class A, class C>
float prepare_block(const QuantizedMatrix& m, const RowScales& row, int64_t b, int64_t d, uint32_t* adjust) {
  if (C::adjust == Adjust::groups) {
    const uint8_t* const codes = reinterpret_cast<const uint8_t*>(row.scale) + b * kGroups;
    const int64_t groups = (d + kGroup - 1) / kGroup - b * kGroups;
    if (groups >= kGroups) return prepare_groups<A>(codes, adjust);
    uint8_t last[kGroups] = {};
    for (int64_t i = 0; i < groups; ++i) last[i] = codes[i];
    return prepare_groups<A>(last, adjust);
  }
  if (C::adjust == Adjust::blocks) *adjust = A::zero_point(row.zero ? row.zero[b] : 8);
  const int64_t at = m.scale_columns == 0 ? 0 : b;
  if (m.exponents) return from_e8m0(uint8_t(row.scale[at]));
  float multiplier;
  __builtin_memcpy(&multiplier, row.scale + at * 4, 4);
  return multiplier;
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
