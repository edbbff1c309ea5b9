// A strip of quantised weights: as many rows of W as a vector has lanes, with their scales.
#pragma once

#include <type_traits>
#include <utility>

#include "../formats/lanes.h"
#include "../formats/scales.h"
#include "even_rows.h"
#include "quantized_ahead.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kStep = 32;                    // elements of the reduction
constexpr int kPairs = kStep / 2;            // of a step
constexpr int kLanes = VF::width;            // rows of W
constexpr int kPanelSteps = kBlock / kStep;  // whose scales are prepared together
constexpr int64_t kLine = 64, kPart = 16;    // bytes of a row that are brought into lanes, and decoded, together
constexpr int kLineParts = int(kLine / kPart);
constexpr int kSpan = 4;  // steps: one for each quarter of a vector

inline int64_t steps_of(int64_t d) { return (d + kStep - 1) / kStep; }

// Codes of blocks of STEPS steps, or more, whose sums are added before they are multiplied by the scale.
template <class C, int STEPS>
struct Scaled : C {
  static constexpr int scaled_steps = STEPS;
};

// Of kPanelSteps steps, by block: the scale, and what codes are adjusted by.
struct Scales {
  alignas(64) float factor[kPanelSteps][kLanes];
  alignas(64) uint32_t adjust[kPanelSteps][kLanes];
};

// A block, which shares a scale, is 1 << this steps.
inline int block_shift(const QuantizedMatrix& m) { return __builtin_ctzll(uint64_t(m.scale_columns / kStep)); }

template <class C>
inline Bytes adjust_of(const Scales& scales, int64_t block) {
  if constexpr (C::adjust != Adjust::blocks) return _mm512_setzero_si512();
  return _mm512_load_si512(scales.adjust[block]);
}

template <int N, class F, int I = 0>
[[gnu::always_inline]] inline void each_constant(F&& f) {
  f(std::integral_constant<int, I>());
  if constexpr (I + 1 < N) each_constant<N, F, I + 1>(std::forward<F>(f));
}

// f(c, p, w): pairs p of CHAINS times four vectors of codes, of all of them in turn.
template <class C, int CHAINS, class F>
[[gnu::always_inline]] inline void each_pair(const Bytes (&v)[CHAINS][4], const Bytes (&adjust)[CHAINS], F&& f) {
  bool usual = true;
#pragma GCC unroll 4
  for (int c = 0; c < CHAINS; ++c) usual = usual && C::usual(v[c], {adjust[c], adjust[c], adjust[c], adjust[c]});
  if (__builtin_expect(usual, 1)) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c)
        each_constant<C::pairs>([&](auto j) __attribute__((always_inline)) {
          f(c, i * C::pairs + j, C::template pair<j>(v[c][i], adjust[c]));
        });
    return;
  }
  Bytes w[CHAINS][4 * C::pairs];
  for (int c = 0; c < CHAINS; ++c)
    for (int i = 0; i < 4; ++i) C::general(v[c][i], adjust[c], w[c] + i * C::pairs);
#pragma GCC unroll 1
  for (int p = 0; p < 4 * C::pairs; ++p)
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) f(c, p, w[c][p]);
}

template <class C>
class Strip {
 public:
  static constexpr int64_t step_bytes = kStep * C::bits / 8;
  static constexpr int parts = int(step_bytes / kPart);
  static constexpr int part_pairs = kPairs / parts;
  static_assert(part_pairs == 4 * C::pairs);

  // Columns [column, column + count) of C, count <= kLanes; lanes past them repeat the last one. `copy` has room for
  // copy_bytes(d).
  Strip(const Weights& w, int64_t column, int64_t count, int64_t d, char* copy)
      : matrix_(*w.matrix), steps_(steps_of(d)), bytes_((d * C::bits + 7) / 8), shift_(block_shift(matrix_)) {
    const char* row[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const MatrixRow of(matrix_, matrix_row(w, column + (r < count ? r : count - 1)));
      row[r] = of.data, scale_[r] = of.scale, zero_[r] = of.zero;
    }
    rows_ = even_rows(w, column, count, row, kLanes, bytes_, bytes_, copy);
  }
  Strip(const Strip&) = delete;

  // Scales are asked for, too: from column `next` of n on, or from where the next call begins.
  void look_ahead(const Weights& w, int64_t next, int64_t n) {
    const int64_t row = row_ahead(w, next, n);
    if (row >= 0) scale_ahead_ = MatrixRow(matrix_, row).scale - scale_[0];
  }

  static int64_t copy_bytes(int64_t d) { return kLanes * ((d * C::bits + 7) / 8); }

  // Byte `at` of a row, or, past its end, as far into the row that takes its place in the next strip.
  [[gnu::always_inline]] int64_t past_end_in_next(int64_t at) const {
    return at < bytes_ ? at : at - bytes_ + kLanes * rows_.stride;
  }
  // The line of row r at byte `at`, which load_line will read, into the L1 cache.
  [[gnu::always_inline]] void ask_row(int r, int64_t at) const { __builtin_prefetch(rows_.row(r) + at, 0, 3); }

  int64_t steps() const { return steps_; }
  int64_t whole_lines() const { return bytes_ / kLine; }
  // That of `step`, counted from the begin of its panel.
  int64_t block(int64_t step) const {
    return C::scaled_steps > 1 ? step % kPanelSteps / C::scaled_steps : step % kPanelSteps >> shift_;
  }

  // Bytes [at, at + kLine) of every row, zeros past the end: lane r of vector i has four of row r.
  [[gnu::always_inline]] void load_line(int64_t at, Bytes (&v)[kLanes]) const {
    VF rows[kLanes];
    const int64_t left = bytes_ - at;
    if (__builtin_expect(left >= kLine, 1)) {
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) rows[r] = {_mm512_loadu_ps(rows_.row(r) + at)};
    } else {
      const __mmask64 mask = (1ull << left) - 1;
      for (int r = 0; r < kLanes; ++r)
        rows[r] = {_mm512_castsi512_ps(_mm512_maskz_loadu_epi8(mask, rows_.row(r) + at))};
    }
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = _mm512_castps_si512(rows[i].v);
  }

  bool has_line(int64_t at) const { return bytes_ - at >= kLine; }

  // Of the line at byte `at`, zeros past the end, rows 4k to 4k + 3: quarter j of vector i has bytes 16j + 4i to
  // 16j + 4i + 3 of them, a lane each. No shuffle crosses a quarter. WHOLE: has_line(at).
  template <bool WHOLE>
  [[gnu::always_inline]] void load_fours(int64_t at, unsigned k, Bytes* v) const {
    const __mmask64 mask = WHOLE ? ~0ull : (1ull << (bytes_ - at)) - 1;
    const char* const first = rows_.row(int(4 * k)) + at;
    const auto line = [&](int r) {
      const char* const from = first + r * rows_.stride;
      return WHOLE ? load_bytes(from) : _mm512_maskz_loadu_epi8(mask, from);
    };
    lanes_of_fours(line(0), line(1), line(2), line(3), v);
  }
  // The same of all rows: of codes of four bits a span, where quarter j has step j.
  template <bool WHOLE>
  [[gnu::always_inline]] void load_span(int64_t at, Bytes (&v)[kLanes]) const {
    static_assert(kSpan * step_bytes == kLine);
#pragma GCC unroll 4
    for (unsigned k = 0; k < 4; ++k) load_fours<WHOLE>(at, k, v + 4 * k);
  }

  // For steps [first, first + kPanelSteps), as far as there are any.
  void prepare(int64_t first, Scales& scales) const {
    const int64_t steps = steps_ - first < kPanelSteps ? steps_ - first : kPanelSteps;
    if constexpr (C::adjust == Adjust::groups) {
      prepare_groups(first, steps, scales);
    } else {
      prepare_blocks(first >> shift_, ((steps - 1) >> shift_) + 1, scales);
    }
    if (first % (4 * kPanelSteps) == 0)
      for (const char* const scale : scale_) __builtin_prefetch(scale + scale_ahead_ + first, 0, 2);
  }

 private:
  // Of scales: exact for powers of two, and from 2^-118 on for any. (Sums of 128 such codes are finite for rows of A up
  // to 2^104.)
  static constexpr float kUnit = 1.0f / (1 << C::power);

  void prepare_blocks(int64_t first, int64_t blocks, Scales& scales) const {
    scale_lanes(scale_, matrix_.exponents, first, blocks, scales.factor[0], kLanes);
    if constexpr (C::power != 0)
      for (int b = 0; b < blocks; ++b) store(scales.factor[b], load<VF>(scales.factor[b]) * set<VF>(kUnit));
    if constexpr (C::adjust == Adjust::blocks) {
      Bytes v[4];
      load_lanes(zero_, first, blocks, v);
      for (int b = 0; b < blocks; ++b) {
        const Bytes byte =
            _mm512_add_epi8(_mm512_set1_epi8(char(b % 4)), _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
        _mm512_store_si512(scales.adjust[b], _mm512_shuffle_epi8(v[b / 4], byte));
      }
    }
  }

  void prepare_groups(int64_t first, int64_t steps, Scales& scales) const {
    Bytes v[4];
    const __mmask16 mask = lanes_below(int(steps));
    const __m128i one = _mm_set1_epi8(127);
    load_lanes([&](int r) { return _mm_mask_loadu_epi8(one, mask, scale_[r] + first); }, v);
    const auto next = [&](int i) { return _mm512_add_epi8(v[i], _mm512_set1_epi8(1)); };
    const Bytes least = _mm512_min_epu8(_mm512_min_epu8(next(0), next(1)), _mm512_min_epu8(next(2), next(3)));
    if (__builtin_expect(_mm512_cmple_epu8_mask(least, _mm512_set1_epi8(1 + C::power)) != 0, 0)) {  // subnormal, or NaN
      for (int s = 0; s < kPanelSteps; ++s) store(scales.factor[s], e8m0_of_byte(v[s / 4], s % 4) * set<VF>(kUnit));
      return;
    }
    if constexpr (C::power != 0)
#pragma GCC unroll 4
      for (Bytes& x : v) x = _mm512_sub_epi8(x, _mm512_set1_epi8(C::power));
    const Bytes exponent = _mm512_set1_epi32(0x7f800000);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Bytes places[4] = {_mm512_slli_epi32(v[i], 23), _mm512_slli_epi32(v[i], 15), _mm512_slli_epi32(v[i], 7),
                               _mm512_srli_epi32(v[i], 1)};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) _mm512_store_si512(scales.factor[4 * i + j], _mm512_and_si512(places[j], exponent));
    }
  }

  const QuantizedMatrix& matrix_;
  int64_t steps_, bytes_;  // of a row
  int shift_;
  int64_t scale_ahead_ = 0;
  EvenRows rows_;
  const char *scale_[kLanes], *zero_[kLanes];
};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
