// Codes of quantised weights as bf16, for tile products: `kTogether` steps of a row at a time, each to a line of its
// own, or a step alone at the end of a row. The elements lie in an order of their own, in which A is packed, too.
//
// `adjust` has four bytes for each step: of the MX formats the exponent of the group, twice in 16 bits; of int4 the
// zero point.
#pragma once

#include "../formats/quantized.h"
#include "amx_product.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// Of a step alone: every fourth element in a quarter of the line, since 16 bits of a row have four codes of four bits;
// and the first and the second half in turn.
struct InQuarters : InOrder {
  static constexpr int element(int place) { return place % 8 * 4 + place / 8; }
};
struct InHalves : InOrder {
  static constexpr int element(int place) { return place % 2 * 16 + place / 2; }
};
// The same quarters, but of kTogether steps as of one: each step is a quarter.
struct InQuartersTogether : InQuarters {
  static constexpr bool together = true;
};

template <class C>
struct TileCodes;

// Codes of four bits at the bottom of 16-bit words, in quarters; what is above them differs.
inline __m512i quarters_at(const char* p) {
  const __m512i shifts = _mm512_set_epi64(0x000c000c000c000c, 0x000c000c000c000c, 0x0008000800080008,
                                          0x0008000800080008, 0x0004000400040004, 0x0004000400040004, 0, 0);
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_srlv_epi16(_mm512_broadcast_i32x4(codes), shifts);
}

inline __m512i broadcast_at(const uint32_t* p) { return _mm512_set1_epi32(int(*p)); }

template <>
struct TileCodes<Mxfp4<Dot>> {
  using Order = InQuartersTogether;

  // How far groups are below the base of their rows.
  static __m512i adjust(__m512i below) { return _mm512_slli_epi16(below, 7); }

  static __m512i decode(const char* p, const uint32_t* adjust) {
    return exact(quarters_at(p), _mm512_set1_epi32(int(*adjust)));
  }
  static void decode_together(const char* p, const uint32_t* adjust, char* out, int64_t stride) {
    const __m512i codes = _mm512_loadu_si512(p),
                  groups = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(adjust)));
    const __m512i below = _mm512_permutexvar_epi32(groups, four);
    Dot::store(out, exact(codes, below));
    Dot::store(out + stride, exact(_mm512_srli_epi16(codes, 4), below));
    Dot::store(out + 2 * stride, exact(_mm512_srli_epi16(codes, 8), below));
    Dot::store(out + 3 * stride, exact(_mm512_srli_epi16(codes, 12), below));
  }

 private:
  static __m512i exact(__m512i codes, __m512i below) {
    return _mm512_subs_epu16(_mm512_permutexvar_epi16(codes, e2m1_in_bf16()), below);  // zero stays zero
  }
};

// Codes less a zero point, for zero points up to 16, of which int4's tables are one each.
struct Int4Tables {
  static constexpr int last = Int4<Dot>::last_zero;
  uint16_t value[last + 1][32];

  constexpr Int4Tables() : value{} {
    for (int zero = 0; zero <= last; ++zero)
      for (int code = 0; code < 32; ++code) value[zero][code] = in_bf16(code % 16 - zero);
  }

 private:
  static constexpr uint16_t in_bf16(int x) {
    if (x == 0) return 0;
    int magnitude = x < 0 ? -x : x, exponent = 134;
    for (; magnitude < 128; magnitude *= 2) --exponent;
    return uint16_t((x < 0 ? 0x8000 : 0) + (exponent << 7) + magnitude - 128);
  }
};
alignas(64) constexpr Int4Tables kInt4Tables;

template <>
struct TileCodes<Int4<Dot>> {
  using Order = InQuarters;

  static __m512i decode(const char* p, const uint32_t* zero) {
    const __m512i codes = quarters_at(p);
    if (__builtin_expect(*zero <= uint32_t(Int4Tables::last), 1))
      return _mm512_permutexvar_epi16(codes, _mm512_load_si512(kInt4Tables.value[*zero]));
    const __m512i x = _mm512_sub_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(15)), _mm512_set1_epi16(short(*zero)));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(x)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(x, 1)));
    return __m512i(_mm512_cvtne2ps_pbh(high, low));  // -255 to 15: bf16 holds them
  }
  static void decode_together(const char* p, const uint32_t* zero, char* out, int64_t stride) {
#pragma GCC unroll 4
    for (int s = 0; s < kTogether; ++s) Dot::store(out + s * stride, decode(p + 16 * s, zero + s));
  }
};

template <>
struct TileCodes<Int8<Dot>> {
  using Order = InHalves;

  static __m512i decode(const char* p, const uint32_t*) {
    const __m128i* const halves = reinterpret_cast<const __m128i*>(p);
    const auto bits = [](__m128i x) { return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x))); };
    // bf16 holds them, so the upper halves are all there is.
    return _mm512_or_si512(bits(_mm_loadu_si128(halves + 1)), _mm512_srli_epi32(bits(_mm_loadu_si128(halves)), 16));
  }
  static void decode_together(const char* p, const uint32_t* adjust, char* out, int64_t stride) {
#pragma GCC unroll 4
    for (int s = 0; s < kTogether; ++s) Dot::store(out + s * stride, decode(p + 32 * s, adjust));
  }
};

// e4m3: where no code of a row's steps is zero, subnormal or a NaN, bits move to their places, and a number is added to
// the exponent. `offset(s)`: that number for step s, in bf16's bits.
template <class General, class Offset>
[[gnu::always_inline]] inline void decode_e4m3(const char* p, char* out, int64_t stride, General&& general,
                                               Offset&& offset) {
  const auto without_sign = [&](int line) {  // twice the magnitude, less twice that of the least normal number
    const __m512i x = _mm512_loadu_si512(p + line * kLine);
    return _mm512_sub_epi8(_mm512_add_epi8(x, x), _mm512_set1_epi8(16));
  };
  const __m512i most = _mm512_max_epu8(without_sign(0), without_sign(1));
  if (__builtin_expect(_mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8(char(2 * 0x7e - 16))) == 0, 1)) {
#pragma GCC unroll 4
    for (int s = 0; s < kTogether; ++s) {
      const __m512i moved = _mm512_slli_epi16(sign_extended_bytes(p + 32 * s), 4);
      const __m512i bits = _mm512_and_si512(moved, _mm512_set1_epi16(short(0x87f0)));
      Dot::store(out + s * stride, _mm512_add_epi16(bits, offset(s)));
    }
  } else {
#pragma GCC unroll 4
    for (int s = 0; s < kTogether; ++s) Dot::store(out + s * stride, general(s));
  }
}

template <>
struct TileCodes<Fp8<Dot>> {
  using Order = InOrder;

  static __m512i decode(const char* p, const uint32_t*) { return Fp8<Dot>::decode(p, 0); }
  static void decode_together(const char* p, const uint32_t*, char* out, int64_t stride) {
    decode_e4m3(
        p, out, stride, [&](int s) { return decode(p + 32 * s, nullptr); },
        [](int) { return _mm512_set1_epi16(120 << 7); });
  }
};

template <>
struct TileCodes<Mxfp8<Dot>> {
  using Order = InOrder;

  static __m512i adjust(__m512i below) { return _mm512_slli_epi16(_mm512_sub_epi16(_mm512_set1_epi16(120), below), 7); }

  static __m512i decode(const char* p, const uint32_t* adjust) {
    return Mxfp8<Dot>::decode(p, 0x10001u * (120u << 7) - *adjust);
  }
  static void decode_together(const char* p, const uint32_t* adjust, char* out, int64_t stride) {
    decode_e4m3(
        p, out, stride, [&](int s) { return decode(p + 32 * s, adjust + s); },
        [&](int s) { return broadcast_at(adjust + s); });
  }
};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
