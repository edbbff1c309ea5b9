// Codes of quantised weights as bf16, for tile products: `kTogether` steps of a row at a time, each to a line of its
// own, or a step alone at the end of a row. The elements lie in an order of their own, in which A is packed, too.
//
// `adjust` has four bytes for each step: of the MX formats the exponent of the group, twice in 16 bits; of int4 the
// zero point.
#pragma once

#include "../formats/pairs.h"
#include "amx_product.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// Quarters of kTogether steps as of one: each step is a quarter.
struct InQuartersTogether : InQuarters {};
template <>
constexpr bool together<InQuartersTogether> = true;

inline __m512i broadcast_at(const uint32_t* p) { return _mm512_set1_epi32(int(*p)); }

// Codes whose steps are decoded one by one.
template <class C>
struct TileCodes {
  using Order = typename C::Order;

  static __m512i decode(const char* p, const uint32_t* adjust) {
    return C::decode(p, C::adjust == Adjust::none ? 0 : uint8_t(*adjust));
  }
  static void decode_together(const char* p, const uint32_t* adjust, char* out, int64_t stride) {
#pragma GCC unroll 4
    for (int s = 0; s < kTogether; ++s) Pairs::store(out + s * stride, decode(p + s * 4 * C::bits, adjust + s));
  }
};

template <>
struct TileCodes<Mxfp4<Pairs>> {
  using Order = InQuartersTogether;

  // How far groups are below the base of their rows.
  static __m512i adjust(__m512i below) { return _mm512_slli_epi16(below, 7); }

  static __m512i decode(const char* p, const uint32_t* adjust) {
    return Mxfp4<Pairs>::decode(p, uint8_t(*adjust >> 23));
  }
  static void decode_together(const char* p, const uint32_t* adjust, char* out, int64_t stride) {
    const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(kE2m1.of[0]));
    const __m512i table = _mm512_broadcast_i64x4(values), codes = _mm512_loadu_si512(p);
    const __m512i groups = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(adjust)));
    const __m512i below = _mm512_permutexvar_epi32(groups, four);
    const auto exact = [&](__m512i x) {  // zero stays zero
      return _mm512_subs_epu16(_mm512_permutexvar_epi16(x, table), below);
    };
    Pairs::store(out, exact(codes));
    Pairs::store(out + stride, exact(_mm512_srli_epi16(codes, 4)));
    Pairs::store(out + 2 * stride, exact(_mm512_srli_epi16(codes, 8)));
    Pairs::store(out + 3 * stride, exact(_mm512_srli_epi16(codes, 12)));
  }
};

// e4m3: nearly always all codes of a row's steps are normal. `offset(s)`: what is then added for step s.
template <class General, class Offset>
[[gnu::always_inline]] inline void decode_e4m3(const char* p, char* out, int64_t stride, General&& general,
                                               Offset&& offset) {
  if (__builtin_expect(are_normal(_mm512_loadu_si512(p), _mm512_loadu_si512(p + kLine)), 1)) {
#pragma GCC unroll 4
    for (int s = 0; s < kTogether; ++s) Pairs::store(out + s * stride, normal_e4m3(sixteenfold(p + 32 * s), offset(s)));
  } else {
#pragma GCC unroll 4
    for (int s = 0; s < kTogether; ++s) Pairs::store(out + s * stride, general(s));
  }
}

template <>
struct TileCodes<Fp8<Pairs>> {
  using Order = Fp8<Pairs>::Order;

  static __m512i decode(const char* p, const uint32_t*) { return Fp8<Pairs>::decode(p, 0); }
  static void decode_together(const char* p, const uint32_t* adjust, char* out, int64_t stride) {
    decode_e4m3(p, out, stride, [&](int s) { return decode(p + 32 * s, adjust); }, [](int) { return rebias(); });
  }
};

template <>
struct TileCodes<Mxfp8<Pairs>> {
  using Order = Mxfp8<Pairs>::Order;

  static __m512i adjust(__m512i below) {
    return _mm512_slli_epi16(_mm512_sub_epi16(_mm512_set1_epi16(kRebias), below), 7);
  }

  static __m512i decode(const char* p, const uint32_t* adjust) {
    return Mxfp8<Pairs>::decode(p, uint8_t(kRebias - (*adjust >> 23)));
  }
  static void decode_together(const char* p, const uint32_t* adjust, char* out, int64_t stride) {
    decode_e4m3(
        p, out, stride, [&](int s) { return decode(p + 32 * s, adjust + s); },
        [&](int s) { return broadcast_at(adjust + s); });
  }
};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
