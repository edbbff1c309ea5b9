// Quantised weights as pairs of bf16 with columns of C as lanes: codes of 16 rows of W, side by side, are decoded where
// they lie. A lane of 32 bits holds four or eight codes of its row, and every few instructions give one pair of them
// for each lane, in the order of pairs that takes the fewest; rows of A are packed in the same one.
//
//   pairs                      that a vector of codes gives
//   usual(v, adjust)           whether `decode` can take these four vectors of codes, which nearly all are
//   decode(v, adjust, f)       f(j, pairs j) of one vector
//   general(v, adjust, out)    all pairs of four vectors of any codes
//
// `adjust` of a lane makes its codes relative to its block: four bytes, see the codecs.
#pragma once

#include "../micro/bytes.h"
#include "pairs.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// Codes without exceptions.
struct AlwaysUsual {
  static bool usual(const Bytes (&)[4], Bytes) { return true; }
  static void general(const Bytes (&)[4], Bytes, Bytes*) {}
};

struct NibbleLanes {
  using Order = InEights;
  static constexpr int pairs = 4;

 protected:
  // An index has five bits, of which the fifth is the next code's, and so the table stands twice.
  template <class F>
  [[gnu::always_inline]] static void look_up_nibbles(Bytes v, const uint16_t (&table)[16], F&& f) {
    const Bytes words = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
    f(0, _mm512_permutexvar_epi16(v, words));
    f(1, _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), words));
    f(2, _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), words));
    f(3, _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), words));
  }
};

struct Mxfp4Lanes : NibbleLanes, AlwaysUsual, Mxfp4Layout {
  template <class F>
  [[gnu::always_inline]] static void decode(Bytes v, Bytes, F&& f) {
    look_up_nibbles(v, kE2m1.of[0], f);
  }
};

// Without zero points.
struct Int4Lanes : NibbleLanes, AlwaysUsual, Layout<4, Adjust::none> {
  template <class F>
  [[gnu::always_inline]] static void decode(Bytes v, Bytes, F&& f) {
    look_up_nibbles(v, kInt4.of[8], f);
  }
};

// `adjust`: the zero point in all bytes.
struct Int4ZeroLanes : NibbleLanes, Int4Layout {
  static bool usual(const Bytes (&)[4], Bytes zero) { return _mm512_cmpgt_epu8_mask(zero, _mm512_set1_epi8(16)) == 0; }
  // Codes less the zero point are five bits with a sign.
  template <class F>
  [[gnu::always_inline]] static void decode(Bytes v, Bytes zero, F&& f) {
    const Bytes words = _mm512_inserti64x4(_mm512_castsi256_si512(half(kInt4.of[0])), half(kInt4.of[16]), 1);
    const Bytes low = _mm512_sub_epi8(low_nibbles(v), zero), high = _mm512_sub_epi8(high_nibbles(v), zero);
    f(0, _mm512_permutexvar_epi16(low, words));
    f(1, _mm512_permutexvar_epi16(high, words));
    f(2, _mm512_permutexvar_epi16(_mm512_srli_epi16(low, 8), words));
    f(3, _mm512_permutexvar_epi16(_mm512_srli_epi16(high, 8), words));
  }
  static void general(const Bytes (&v)[4], Bytes zero, Bytes* out) {
    const Bytes nibble = _mm512_set1_epi32(15), offset = _mm512_and_si512(zero, _mm512_set1_epi32(255));
    const auto number = [&](Bytes x) {  // of nine bits at most, which bf16 holds
      return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(x, nibble), offset)));
    };
    for (int i = 0; i < 4; ++i)
      for (unsigned j = 0; j < 4; ++j) {
        const Bytes first = number(_mm512_srli_epi32(v[i], 4 * j)),
                    second = number(_mm512_srli_epi32(v[i], 16 + 4 * j));
        *out++ = _mm512_or_si512(_mm512_srli_epi32(first, 16), second);
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
  static bool usual(const Bytes (&v)[4], Bytes) { return are_normal(v[0], v[1], v[2], v[3]); }
  template <class F>
  [[gnu::always_inline]] static void decode(Bytes v, Bytes, F&& f) {
    f(0, normal_e4m3(even(v), rebias()));
    f(1, normal_e4m3(odd(v), rebias()));
  }
  static void general(const Bytes (&v)[4], Bytes, Bytes* out) {
    const auto number = [](Bytes x) { return with_sign(e4m3_magnitude(x), x); };
    for (int i = 0; i < 4; ++i) out[2 * i] = number(even(v[i])), out[2 * i + 1] = number(odd(v[i]));
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
