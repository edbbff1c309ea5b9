// Quantised weights as pairs of bf16, for the instruction that adds the products of two such pairs to an f32. A step is
// decoded in the order of its elements that takes the fewest instructions; `pack` puts a step of x in the same one.
#pragma once

#include "orders.h"
#include "quantized.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

struct Pairs {
  using Packed = bf16;
  static constexpr int step = 32, at_once = 2;

  using X = __m512i;
  static X load(const char* p) { return _mm512_loadu_si512(p); }
  static void store(char* p, X x) { _mm512_storeu_si512(p, x); }
  static VF multiply_add(VF acc, X x, X w) { return {_mm512_dpbf16_ps(acc.v, __m512bh(x), __m512bh(w))}; }
};

template <class ORDER>
struct PairsIn : Pairs {
  using Order = ORDER;
  static void pack(const bf16* p, char* out) { store(out, in_order<Order>(load(reinterpret_cast<const char*>(p)))); }
};

// Codes of four bits, in quarters.
struct FourBits : PairsIn<InQuarters> {
 protected:
  // The words of the table that the codes stand for. An index has five bits, of which the fifth is the next code's, and
  // so the table stands twice.
  static X look_up(const char* p, const uint16_t (&table)[16]) {
    const __m512i shifts = _mm512_setr_epi64(0, 0, 0x0004000400040004, 0x0004000400040004, 0x0008000800080008,
                                             0x0008000800080008, 0x000c000c000c000c, 0x000c000c000c000c);
    const __m512i codes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i words = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(codes, shifts), words);
  }
};

template <int N>
struct Tables {
  alignas(64) uint16_t of[N][16];
};

// e2m1 in bf16, by powers of two below; zero stays zero, without its sign.
constexpr Tables<kSpread + 1> e2m1_tables() {
  constexpr uint16_t magnitude[8] = {0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0};
  Tables<kSpread + 1> t{};
  for (int n = 0; n <= kSpread; ++n)
    for (int code = 0; code < 16; ++code) {
      const int m = magnitude[code & 7];
      t.of[n][code] = uint16_t(m ? (m - (n << 7)) | (code & 8) << 12 : 0);
    }
  return t;
}
constexpr Tables<kSpread + 1> kE2m1 = e2m1_tables();

// Four bits less a zero point, in bf16, by zero point.
constexpr Tables<256> int4_tables() {
  Tables<256> t{};
  for (int zero = 0; zero < 256; ++zero)
    for (int code = 0; code < 16; ++code) {
      const int value = code - zero, magnitude = value < 0 ? -value : value;
      int exponent = 0;
      while (magnitude >> exponent > 1) ++exponent;
      const int bits = magnitude ? (127 + exponent) << 7 | ((magnitude << (7 - exponent)) & 0x7f) : 0;
      t.of[zero][code] = uint16_t(bits | (value < 0 ? 0x8000 : 0));
    }
  return t;
}
constexpr Tables<256> kInt4 = int4_tables();

template <>
struct Mxfp4<Pairs> : FourBits, Mxfp4Layout {
  static X decode(const char* p, uint8_t below) { return look_up(p, kE2m1.of[below]); }
};

template <>
struct Int4<Pairs> : FourBits, Int4Layout {
  static X decode(const char* p, uint8_t zero) { return look_up(p, kInt4.of[zero]); }
};

template <>
struct Int8<Pairs> : PairsIn<InHalves>, Int8Layout {
  // Eight bits as f32 are bf16 once the lower half, which is zero, is left out.
  static X decode(const char* p, uint8_t) {
    const __m128i* const halves = reinterpret_cast<const __m128i*>(p);
    const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(halves)));
    const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(halves + 1)));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(first), 16),
                                   _mm512_castps_si512(second));
  }
};

// From the bias of e4m3's exponents to that of bf16's.
constexpr int kRebias = 127 - 7;
inline __m512i rebias() { return _mm512_set1_epi16(kRebias << 7); }

// Codes of e4m3, in the order of parity: `x` below has them sixteenfold, as signed words.
inline __m512i sixteenfold(const char* p) {
  const __m512i codes = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i factors = _mm512_inserti64x4(_mm512_set1_epi16(0x0010), _mm256_set1_epi16(0x1000), 1);
  return _mm512_maddubs_epi16(factors, codes);
}

// Whether none of the codes is zero, subnormal or a NaN.
template <class... More>
[[gnu::always_inline]] inline bool are_normal(__m512i codes, More... more) {
  const auto above = [](__m512i x) {  // twice the magnitude, less twice that of the least normal number
    return _mm512_sub_epi8(_mm512_add_epi8(x, x), _mm512_set1_epi8(2 * 0x08));
  };
  __m512i most = above(codes);
  ((most = _mm512_max_epu8(most, above(more))), ...);
  return _mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8(char(2 * (0x7e - 0x08)))) == 0;
}

// Codes that are: their bits are moved to where bf16 has them, and `offset` is added to the exponents.
inline __m512i normal_e4m3(__m512i x, __m512i offset) {
  return _mm512_add_epi16(_mm512_and_si512(x, _mm512_set1_epi16(short(0x87f0))), offset);
}

// The same times 2^8, which takes one instruction: those exponents are e4m3's with a bit before them.
constexpr int kE4m3Power = 8;
inline __m512i normal_e4m3_by_power(__m512i x) {
  const __m512i fields = _mm512_set1_epi16(short(0x87f0)), bit = _mm512_set1_epi16((kRebias + kE4m3Power) << 7);
  return _mm512_ternarylogic_epi32(x, fields, bit, 0xea);
}

// Any codes, times 2^POWER: bf16 bits without the sign; and 0x7fff for NaN.
template <int POWER = 0>
inline __m512i e4m3_magnitude(__m512i x) {
  constexpr short p = POWER << 7;
  const __m512i code = _mm512_and_si512(x, _mm512_set1_epi16(0x7f0));
  const __m512i normal = _mm512_add_epi16(code, _mm512_set1_epi16((kRebias + POWER) << 7));
  // Subnormal codes and NaN are looked up: their low five bits are 0 to 7, and 31.
  const __m512i next = _mm512_and_si512(_mm512_add_epi16(code, _mm512_set1_epi16(0x10)), _mm512_set1_epi16(0x7f0));
  const __mmask32 special = _mm512_cmple_epu16_mask(next, _mm512_set1_epi16(0x80));
  const __m512i table = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_setr_epi16(0, 0x3b00 + p, 0x3b80 + p, 0x3bc0 + p, 0x3c00 + p, 0x3c20 + p,
                                               0x3c40 + p, 0x3c60 + p, 0, 0, 0, 0, 0, 0, 0, 0)),
      _mm256_setr_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x7fff), 1);
  return _mm512_mask_permutexvar_epi16(normal, special, _mm512_srli_epi16(x, 4), table);
}

inline __m512i with_sign(__m512i magnitude, __m512i x) {
  return _mm512_ternarylogic_epi32(magnitude, x, _mm512_set1_epi16(short(0x8000)), 0xf8);
}

template <>
struct Fp8<Pairs> : PairsIn<InParity>, Fp8Layout {
  static X decode(const char* p, uint8_t) {
    const __m512i x = sixteenfold(p);
    return with_sign(e4m3_magnitude(x), x);
  }
};

template <>
struct Mxfp8<Pairs> : PairsIn<InParity>, Mxfp8Layout {
  static X decode(const char* p, uint8_t below) {
    const __m512i x = sixteenfold(p), magnitude = e4m3_magnitude(x);
    const __mmask32 number = _mm512_cmpneq_epi16_mask(magnitude, _mm512_set1_epi16(0x7fff));
    const __m512i exponents = _mm512_set1_epi32(int(below * 0x00800080u));
    return with_sign(_mm512_mask_subs_epu16(magnitude, number, magnitude, exponents), x);
  }
};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
