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

#if !defined(POLYMOE_LEVEL_PORTABLE)
inline __m128i complement(const uint8_t* codes) {
  return _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), _mm_set1_epi8(-1));
}
// In the lowest word.
inline __m128i least_byte(__m128i v) { return _mm_minpos_epu16(_mm_min_epu8(v, _mm_srli_epi16(v, 8))); }
#endif

// The largest scale of a block of kGroups groups is its multiplier; the groups get how many powers of two they are
// below it.
inline float prepare_groups(const uint8_t* codes, uint8_t* below) {
#if defined(POLYMOE_LEVEL_PORTABLE)
  uint8_t largest = 0;
  for (int64_t i = 0; i < kGroups; ++i) largest = codes[i] > largest ? codes[i] : largest;
  for (int64_t i = 0; i < kGroups; ++i) {
    const int n = largest - codes[i];
    below[i] = uint8_t(n < kSpread ? n : kSpread);
  }
  return from_e8m0(largest);
#else
  const __m128i left = complement(codes), least = least_byte(left);
  const __m128i n = _mm_sub_epi8(left, _mm_shuffle_epi8(least, _mm_setzero_si128()));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(below), _mm_min_epu8(n, _mm_set1_epi8(kSpread)));
  return from_e8m0(uint8_t(255 - _mm_cvtsi128_si32(least)));
#endif
}

// Scales and zero points of a row of d elements as a codec C wants them: the multiplier of each block, and `adjust` of
// each group or block. Where they are not stored like that, `multiplier` and `adjust` have room for them.
template <class C>
void prepare_row(const QuantizedMatrix& m, int64_t n, int64_t d, int64_t blocks, float* multiplier, uint8_t* adjust,
                 const float*& multipliers, const uint8_t*& adjusts) {
  const MatrixRow row(m, n);
  const char* const scale = row.scale;
  multipliers = multiplier;
  adjusts = adjust;
  if (C::adjust == Adjust::groups) {
    const uint8_t* const codes = reinterpret_cast<const uint8_t*>(scale);
    const int64_t whole = d / kBlock, left = (d - whole * kBlock + kGroup - 1) / kGroup;
    for (int64_t b = 0; b < whole; ++b) multiplier[b] = prepare_groups(codes + b * kGroups, adjust + b * kGroups);
    if (left == 0) return;
    uint8_t last[kGroups] = {};
    for (int64_t i = 0; i < left; ++i) last[i] = codes[whole * kGroups + i];
    multiplier[whole] = prepare_groups(last, adjust + whole * kGroups);
    return;
  }
  if (C::adjust == Adjust::blocks) {
    if (row.zero)
      adjusts = reinterpret_cast<const uint8_t*>(row.zero);
    else
      __builtin_memset(adjust, 8, size_t(blocks));
  }
  const int64_t step = m.scale_columns ? 1 : 0;
  const float* const stored = reinterpret_cast<const float*>(scale);
  if (m.exponents)
    for (int64_t b = 0; b < blocks; ++b) multiplier[b] = from_e8m0(uint8_t(scale[b * step]));
  else if (step)
    multipliers = stored;
  else
    for (int64_t b = 0; b < blocks; ++b) multiplier[b] = *stored;
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
