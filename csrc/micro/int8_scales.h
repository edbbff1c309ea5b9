// Scales of weights where rows of A are rounded to 8-bit integers, and how exact sums are multiplied by them.
#pragma once

#include "bytes.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// One for a whole row, which is left to the end of the reduction; by piece: any, powers of two, and their logarithms.
enum class ScaleKind { rows, blocks, powers, logarithms };

template <ScaleKind KIND>
[[gnu::always_inline]] inline VF scaled(VF exact, const float* scale) {
  return KIND == ScaleKind::rows ? exact : exact * load<VF>(scale);
}

// The same, added to `sum` and rounded once.
template <ScaleKind KIND>
[[gnu::always_inline]] inline VF add_scaled(VF sum, VF exact, const float* scale) {
  return KIND == ScaleKind::rows ? sum + exact : fma(exact, load<VF>(scale), sum);
}

// Half of what the e8m0 code in byte i of every lane says, as a scale of KIND.
template <ScaleKind KIND>
inline VF half_power_of_byte(Bytes x, int i) {
  return e8m0_of_byte(x, i) * set<VF>(0.5f);
}

// Powers of two that the pieces of a group may differ by and yet be summed in integers, and the greatest.
constexpr int kFar = 3, kFarFactor = 1 << kFar;

#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
// Of four e8m0 codes in every lane: the least, in every byte, and how far each is above it. False where that is more
// than kFar in a lane, or where products of scales with sums may not be normal numbers.
inline bool near_powers(Bytes codes, Bytes& least, Bytes& above) {
  constexpr int low = 30, high = 220;
  const Bytes first_of_four = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  const auto of_four = [&](auto f) {  // in every byte
    const Bytes two = f(codes, _mm512_srli_epi32(codes, 16));
    return _mm512_shuffle_epi8(f(two, _mm512_srli_epi32(two, 8)), first_of_four);
  };
  least = of_four([](Bytes x, Bytes y) { return _mm512_min_epu8(x, y); });
  above = _mm512_sub_epi8(codes, least);
  const Bytes most = of_four([](Bytes x, Bytes y) { return _mm512_max_epu8(x, y); });
  return (_mm512_cmplt_epu8_mask(least, _mm512_set1_epi8(low)) |
          _mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8(char(high))) |
          _mm512_cmpgt_epu8_mask(above, _mm512_set1_epi8(kFar))) == 0;
}
#endif

#if defined(POLYMOE_LEVEL_AVX512_BF16) && !defined(POLYMOE_LEVEL_AMX)
// On Zen 4 `vscalefps` and additions leave alone the ports that dot products and multiplications share.
constexpr ScaleKind kPanelPowers = ScaleKind::logarithms;

template <>
[[gnu::always_inline]] inline VF scaled<ScaleKind::logarithms>(VF exact, const float* scale) {
  return {_mm512_scalef_ps(exact.v, _mm512_loadu_ps(scale))};
}
template <>
[[gnu::always_inline]] inline VF add_scaled<ScaleKind::logarithms>(VF sum, VF exact, const float* scale) {
  return sum + scaled<ScaleKind::logarithms>(exact, scale);
}
template <>
inline VF half_power_of_byte<ScaleKind::logarithms>(Bytes x, int i) {
  const __m512i code = _mm512_and_si512(_mm512_srli_epi32(x, unsigned(8 * i)), _mm512_set1_epi32(255));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(255));
  const __m512 logarithm = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(128)));
  return {_mm512_mask_mov_ps(logarithm, nan, _mm512_set1_ps(bits_float(0x7fc00000)))};
}
#else
constexpr ScaleKind kPanelPowers = ScaleKind::powers;
#endif

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
