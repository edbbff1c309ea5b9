// Products of few rows of bf16 with quantised weights in the order of tile products, but without tiles: a lane is a row
// of W. Within a step the tile product adds even and odd elements in two chains of fused multiply-adds from zero, and
// then their sum to C. It reads and writes subnormal numbers as zero, which f32 arithmetic does not: so this serves
// rows whose elements are far enough from the ends of the range that no sum can be subnormal, nor overflow.
#pragma once

#include "amx_product.h"
#include "bytes.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kFewRows = 3;     // where tiles begin to win
constexpr int kMostBelow = 30;  // what a group may be below the largest of its block

// A few rows of A as f32, zeros up to whole steps.
class FewRows {
 public:
  static int64_t bytes(int64_t d) { return kFewRows * steps_of(d) * kStep * int64_t(sizeof(float)); }

  // From one group as the right operand of tile products; elements are multiplied by `up`.
  FewRows(const Rows& rows, char* memory, float up)
      : stride_(rows.steps() * kStep), x_(reinterpret_cast<float*>(memory)) {
    const int count = rows.groups.rows(0);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(count)), one = _mm512_set1_epi32(1);
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000u)), magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i least = _mm512_set1_epi32(-1), most = _mm512_setzero_si512();  // least: of magnitudes above 0, less one
    for (int64_t s = 0; s < rows.steps(); ++s)
      for (int m = 0; m < count; ++m) {
        const char* const from = rows.at(0, s) + m * 4;
        const __m512i pairs = count == 1 ? _mm512_loadu_si512(from) : _mm512_i32gather_epi32(places, from, 4);
        const __m512i even = _mm512_slli_epi32(pairs, 16), odd = _mm512_and_si512(pairs, upper);
        const auto see = [&](__m512i half) {
          const __m512i size = _mm512_and_si512(half, magnitude);
          least = _mm512_min_epu32(least, _mm512_sub_epi32(size, one)), most = _mm512_max_epu32(most, size);
        };
        see(even), see(odd);
        const VF factor = set<VF>(up);
        store_in_order(x_ + m * stride_ + s * kStep,
                       {VF{_mm512_castsi512_ps(even)} * factor, VF{_mm512_castsi512_ps(odd)} * factor});
      }
    narrow_ = _mm512_reduce_min_epu32(least) >= ((127u - 60u) << 23) - 1 &&
              _mm512_reduce_max_epu32(most) <= (127u + 60u) << 23;
  }

  const float* row(int m, int64_t step) const { return x_ + m * stride_ + step * kStep; }
  // Whether products with codes of 2^-9 to 2^9 times factors of 2^-kMostBelow to 1 have sums that f32 holds.
  bool narrow() const { return narrow_; }

 private:
  int64_t stride_;
  float* x_;
  bool narrow_;
};

// The same with `count` bytes of each row, at most 16, and zeros after them.
inline void load_lanes_of(int64_t count, const char* const* row, int64_t at, __m512i (&v)[4]) {
  const __mmask16 mask = lanes_below(count < 0 ? 0 : count < 16 ? int(count) : 16);
  load_lanes([&](int r) { return _mm_maskz_loadu_epi8(mask, row[r] + at); }, v);
}

// Byte i of the 16 that load_lanes loaded, for every row.
inline __m512i byte_of_lanes(const __m512i (&v)[4], int i) {
  return _mm512_and_si512(_mm512_srli_epi32(v[i / 4], unsigned(i % 4 * 8)), _mm512_set1_epi32(0xff));
}

// What 16 rows of W take from their scales in a panel, lane by lane. `factor` is what the sum of a step is multiplied
// by, a power of two; `multiplier` what that of a block is.
//
// Of the MX formats: a panel is one block, whose multiplier is the largest scale of its groups, and factors are groups
// over it. `down`: what makes up for FewRows' factor `up`.
class GroupScales {
 public:
  // False if a group is more than kMostBelow below the largest.
  bool begin(const char* const* scale, int64_t first, int64_t groups, int down) {
    __m512i v[4];
    load_lanes_of(groups, scale, first, v);
    __m512i most = _mm512_max_epu8(_mm512_max_epu8(v[0], v[1]), _mm512_max_epu8(v[2], v[3]));
    most = _mm512_max_epu8(most, _mm512_srli_epi32(most, 16));
    most = _mm512_max_epu8(most, _mm512_srli_epi32(most, 8));
    const __m512i largest = _mm512_and_si512(most, _mm512_set1_epi32(0xff));
    __m512i furthest = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int g = 0; g < int(kGroups); ++g) {
      if (g >= groups) break;
      const __m512i below = _mm512_sub_epi32(largest, byte_of_lanes(v, g));
      furthest = _mm512_max_epu32(furthest, below);
      const __m512i exponent = _mm512_sub_epi32(_mm512_set1_epi32(127 + down), below);
      factor_[g] = {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
    }
    multiplier_ = from_e8m0(largest);
    return _mm512_reduce_max_epu32(furthest) <= kMostBelow;
  }
  VF factor(int64_t step) const { return factor_[step]; }
  VF multiplier(int64_t) const { return multiplier_; }

 private:
  VF factor_[kGroups], multiplier_;
};

// Of formats whose blocks have a scale each.
class BlockScales {
 public:
  void begin(const char* const* scale, bool exponents, int64_t first, int64_t blocks) {
    __m512i v[4];
    if (exponents) {
      load_lanes_of(blocks, scale, first, v);
      for (int b = 0; b < blocks; ++b) multiplier_[b] = from_e8m0(byte_of_lanes(v, b));
      return;
    }
    for (int64_t b = 0; b < blocks; b += 4) {
      load_lanes_of((blocks - b) * 4, scale, (first + b) * 4, v);
      for (int i = 0; i < 4; ++i) multiplier_[b + i] = {_mm512_castsi512_ps(v[i])};
    }
  }
  VF multiplier(int64_t block) const { return multiplier_[block]; }

 private:
  VF multiplier_[kGroups];
};

// What a format is without tiles: scales as above, and `step`, which sums a step of 16 rows of W times M rows of A,
// even and odd elements together. `count`: the bytes of codes that the step has. `begin` and `numbers` are false where
// sums might not be those of tiles; the latter when the panel is done.
template <class C>
struct Lanes;

// Sums of even and odd elements apart.
template <int M>
struct StepSums {
  VF even[M], odd[M];

  StepSums() {
    for (int m = 0; m < M; ++m) even[m] = odd[m] = set<VF>(0);
  }
  [[gnu::always_inline]] void add(const float* const* x, int k, VF w) {
#pragma GCC unroll 3
    for (int m = 0; m < M; ++m) {
      VF& sum = k % 2 ? odd[m] : even[m];
      sum = fma(set<VF>(x[m][k]), w, sum);
    }
  }
  void total(VF* sums) const {
    for (int m = 0; m < M; ++m) sums[m] = even[m] + odd[m];
  }
};

template <bool WHOLE>
[[gnu::always_inline]] inline void load_step(const char* const* row, int64_t at, int64_t count, __m512i (&v)[4]) {
  if constexpr (WHOLE)
    load_lanes(row, at, v);
  else
    load_lanes_of(count, row, at, v);
}

template <>
struct Lanes<Mxfp4<Dot>> : GroupScales {
  static constexpr float up = 1;
  static bool available() { return true; }

  bool begin(const QuantizedMatrix&, const char* const* scale, const char* const*, int64_t group, int64_t,
             int64_t steps) {
    return GroupScales::begin(scale, group, steps, 0);
  }
  bool numbers() const { return true; }

  template <int M, bool WHOLE>
  [[gnu::always_inline]] void step(const char* const* row, int64_t at, int64_t count, const float* const* x, int64_t,
                                   VF* sums) {
    const __m512 values = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, 0, -0.5f, -1, -1.5f, -2, -3, -4, -6);
    __m512i v[4];
    load_step<WHOLE>(row, at, count, v);
    StepSums<M> s;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j)  // an index has four bits
        s.add(x, 8 * i + j, {_mm512_permutexvar_ps(j == 0 ? v[i] : _mm512_srli_epi32(v[i], unsigned(4 * j)), values)});
    s.total(sums);
  }
};

// e4m3 codes become f32 by shifting them to where f32 has its sign, exponent and fraction, which leaves them 2^-120
// times as large, subnormal ones too. Rows are 2^60 times as large, so sums are 2^-60 times what they should be.
class E4m3Lanes {
 public:
  static constexpr float up = 0x1p60f;
  static constexpr int down = 60;

  // Not where the thread reads subnormal numbers as zero, or writes them so.
  static bool available() { return (_mm_getcsr() & (_MM_FLUSH_ZERO_MASK | 0x0040)) == 0; }

  // False if there was a NaN, which became a number.
  bool numbers() const {
    const __mmask64 nan = _mm512_cmpeq_epi8_mask(most_, _mm512_set1_epi8(0x7f));
    return nan == 0;
  }

  template <int M, bool WHOLE>
  [[gnu::always_inline]] void step(const char* const* row, int64_t at, int64_t count, const float* const* x, int64_t,
                                   VF* sums) {
    StepSums<M> s;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i v[4];
      load_step<WHOLE>(row, at + 16 * half, count - 16 * half, v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        most_ = _mm512_max_epu8(most_, _mm512_and_si512(v[i], _mm512_set1_epi8(0x7f)));
        const int k = 16 * half + 4 * i;
        const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(v[i], 8), 4), odd = _mm512_srai_epi16(v[i], 4);
        s.add(x, k, low(even)), s.add(x, k + 1, low(odd));
        s.add(x, k + 2, high(even)), s.add(x, k + 3, high(odd));
      }
    }
    s.total(sums);
  }

 protected:
  void begin() { most_ = _mm512_setzero_si512(); }

 private:
  static VF high(__m512i words) {
    return {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0x87f00000u))))};
  }
  static VF low(__m512i words) { return high(_mm512_slli_epi32(words, 16)); }

  __m512i most_;  // of all magnitudes, in bytes
};

template <>
struct Lanes<Mxfp8<Dot>> : E4m3Lanes, GroupScales {
  bool begin(const QuantizedMatrix&, const char* const* scale, const char* const*, int64_t group, int64_t,
             int64_t steps) {
    E4m3Lanes::begin();
    return GroupScales::begin(scale, group, steps, down);
  }
};

template <>
struct Lanes<Fp8<Dot>> : E4m3Lanes, BlockScales {
  bool begin(const QuantizedMatrix& m, const char* const* scale, const char* const*, int64_t block, int64_t blocks,
             int64_t) {
    E4m3Lanes::begin();
    BlockScales::begin(scale, m.exponents, block, blocks);
    return true;
  }
  static VF factor(int64_t) { return set<VF>(0x1p60f); }
};

// Zero points are taken from bytes that hold a code each, before these are looked up: five bits of the difference are
// enough for zero points up to C::last_zero.
template <>
struct Lanes<Int4<Dot>> : BlockScales {
  static constexpr float up = 1;
  static bool available() { return true; }

  bool begin(const QuantizedMatrix& m, const char* const* scale, const char* const* zero, int64_t block, int64_t blocks,
             int64_t) {
    BlockScales::begin(scale, m.exponents, block, blocks);
    if (!m.zero) {
      for (int b = 0; b < blocks; ++b) zero_[b] = _mm512_set1_epi8(8);
      return true;
    }
    __m512i v[4], most = _mm512_setzero_si512();
    load_lanes_of(blocks, zero, block, v);
    const __m512i dwords = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    for (int b = 0; b < blocks; ++b)
      zero_[b] = _mm512_shuffle_epi8(v[b / 4], _mm512_add_epi8(dwords, _mm512_set1_epi8(char(b % 4))));
    for (const __m512i& four : v) most = _mm512_max_epu8(most, four);
    return _mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8(Int4<Dot>::last_zero)) == 0;
  }
  static VF factor(int64_t) { return set<VF>(1); }
  bool numbers() const { return true; }

  template <int M, bool WHOLE>
  [[gnu::always_inline]] void step(const char* const* row, int64_t at, int64_t count, const float* const* x,
                                   int64_t block, VF* sums) {
    const __m512 positive = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 negative = _mm512_sub_ps(positive, _mm512_set1_ps(16));
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i v[4];
    load_step<WHOLE>(row, at, count, v);
    StepSums<M> s;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i even = _mm512_sub_epi8(_mm512_and_si512(v[i], nibble), zero_[block]);
      const __m512i odd = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi32(v[i], 4), nibble), zero_[block]);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const __m512i bytes = j % 2 ? odd : even;
        const __m512i index = j < 2 ? bytes : _mm512_srli_epi32(bytes, unsigned(j / 2 * 8));
        s.add(x, 8 * i + j, {_mm512_permutex2var_ps(positive, index, negative)});
      }
    }
    s.total(sums);
  }

 private:
  __m512i zero_[kGroups];  // by block, in every byte
};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
