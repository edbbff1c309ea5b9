// Quantised weights as pairs of bf16 with columns of C as lanes: codes of 16 rows of W, side by side, are decoded where
// they lie. A lane of 32 bits holds four or eight codes of its row, and every few instructions give one pair of them
// for each lane, in the order of pairs that takes the fewest; rows of A are packed in the same one.
//
//   pairs                      that a vector of codes gives
//   power                      codes are given times two to it, so scales have to be divided by that
//   usual(v, adjust)           whether `pair` can take these four vectors of codes, each with its `adjust`, which it
//                              nearly always can
//   pair<J>(v, adjust)         pairs J of a vector
//   general(v, adjust, out)    all pairs of a vector of any codes
//
// `adjust` of a lane makes its codes relative to its block: four bytes, see the codecs.
#pragma once

#include "../micro/bytes.h"
#include "pairs.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// Codes without exceptions.
struct AlwaysUsual {
  static bool usual(const Bytes (&)[4], const Bytes (&)[4]) { return true; }
  static void general(Bytes, Bytes, Bytes*) {}
};

struct NibbleLanes {
  using Order = InEights;
  static constexpr int pairs = 4, power = 0;

 protected:
  // An index has five bits, of which the fifth is the next code's, and so the table stands twice.
  template <int J>
  [[gnu::always_inline]] static Bytes look_up(Bytes v, const uint16_t (&table)[16]) {
    const Bytes words = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
    return _mm512_permutexvar_epi16(J ? _mm512_srli_epi16(v, 4 * J) : v, words);
  }
};

struct Mxfp4Lanes : NibbleLanes, AlwaysUsual, Mxfp4Layout {
  template <int J>
  [[gnu::always_inline]] static Bytes pair(Bytes v, Bytes) {
    return look_up<J>(v, kE2m1.of[0]);
  }
};

// Without zero points.
struct Int4Lanes : NibbleLanes, AlwaysUsual, Layout<4, Adjust::none> {
  template <int J>
  [[gnu::always_inline]] static Bytes pair(Bytes v, Bytes) {
    return look_up<J>(v, kInt4.of[8]);
  }
};

// `adjust`: the zero point in all bytes.
struct Int4ZeroLanes : NibbleLanes, Int4Layout {
  static bool usual(const Bytes (&)[4], const Bytes (&zero)[4]) {
    const Bytes most = _mm512_max_epu8(_mm512_max_epu8(zero[0], zero[1]), _mm512_max_epu8(zero[2], zero[3]));
    return _mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8(16)) == 0;
  }
  // Codes less the zero point are five bits with a sign.
  template <int J>
  [[gnu::always_inline]] static Bytes pair(Bytes v, Bytes zero) {
    const Bytes words = _mm512_inserti64x4(_mm512_castsi256_si512(half(kInt4.of[0])), half(kInt4.of[16]), 1);
    const Bytes number = _mm512_sub_epi8(J % 2 ? high_nibbles(v) : low_nibbles(v), zero);
    return _mm512_permutexvar_epi16(J < 2 ? number : _mm512_srli_epi16(number, 8), words);
  }
  static void general(Bytes v, Bytes zero, Bytes* out) {
    const Bytes nibble = _mm512_set1_epi32(15), offset = _mm512_and_si512(zero, _mm512_set1_epi32(255));
    const auto number = [&](Bytes x) {  // of nine bits at most, which bf16 holds
      return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(x, nibble), offset)));
    };
    for (unsigned j = 0; j < 4; ++j) {
      const Bytes first = number(_mm512_srli_epi32(v, 4 * j)), second = number(_mm512_srli_epi32(v, 16 + 4 * j));
      out[j] = _mm512_or_si512(_mm512_srli_epi32(first, 16), second);
    }
  }

 private:
  static __m256i half(const uint16_t (&table)[16]) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
  }
};

struct ByteLanes {
  using Order = InFours;
  static constexpr int pairs = 2;
};

// e4m3, nearly always of normal numbers alone.
template <class Stored>
struct E4m3Lanes : ByteLanes, Stored {
  static constexpr int power = kE4m3Power;
  static bool usual(const Bytes (&v)[4], const Bytes (&)[4]) { return are_normal(v[0], v[1], v[2], v[3]); }
  template <int J>
  [[gnu::always_inline]] static Bytes pair(Bytes v, Bytes) {
    return normal_e4m3_by_power(J ? odd(v) : even(v));
  }
  static void general(Bytes v, Bytes, Bytes* out) {
    const auto number = [](Bytes x) { return with_sign(e4m3_magnitude<power>(x), x); };
    out[0] = number(even(v)), out[1] = number(odd(v));
  }

 private:
  // Sixteenfold, as signed words; of odd ones below that what the others leave.
  static Bytes even(Bytes v) { return _mm512_maddubs_epi16(_mm512_set1_epi16(16), v); }
  static Bytes odd(Bytes v) { return _mm512_srai_epi16(v, 4); }
};
using Fp8Lanes = E4m3Lanes<Fp8Layout>;
using Mxfp8Lanes = E4m3Lanes<Mxfp8Layout>;

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
