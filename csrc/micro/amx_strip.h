// Quantised weights as the left operand of tile products. Codes are decoded to bf16, exactly, into a panel that the L1
// cache holds, for all rows of A. What a block of the reduction sums to is multiplied by the scale that the block
// shares and added to the total, which is one fused multiply-add:
//
//   total += scale[block] * sum over the block of x * code
//
// The sum of a block is a chain over its steps, as in all products of tiles, whatever the number of rows. Blocks of the
// MX formats fill a panel; otherwise a panel holds several.
#pragma once

#include "../formats/scales.h"
#include "amx_few_rows.h"
#include "amx_product.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kTiles = 2, kStripRows = kTiles * kTileRows;
constexpr int64_t kStepBytes = kStripRows * kLine;  // of a step of decoded weights
constexpr int64_t kPanelSteps = kBlock / kStep;
constexpr int64_t kPiece = 4;           // steps that are decoded together
constexpr int64_t kGroupsTogether = 8;  // row groups whose totals wait while a panel passes over them all

// Rows of W in two tiles, a panel of the reduction at a time; rows past the last one repeat it.
template <class C>
class Strip {
 public:
  static constexpr int64_t bytes = kStep * C::bits / 8;

  // Columns from `column` on of n columns of C.
  Strip(const Weights& w, int64_t column, int64_t n, int64_t d)
      : matrix_(*w.matrix),
        d_(d),
        count_(n - column < kStripRows ? n - column : kStripRows),
        block_(C::adjust == Adjust::groups ? kPanelSteps : block_of<C>(matrix_) / kStep) {
    const auto row_of = [&](int64_t r) { return matrix_row(w, column + r); };
    const int shared = __builtin_ctzll(uint64_t(matrix_.scale_rows));  // a power of two
    const auto scales_of = [&](int64_t row) { return matrix_.scale + (row >> shared) * matrix_.scale_stride; };
    for (int64_t r = 0; r < kStripRows; ++r) {
      const int64_t row = row_of(r < count_ ? r : count_ - 1);
      data_[r] = matrix_.data + row * matrix_.data_stride;
      scale_[r] = scales_of(row);
      zero_[r] = matrix_.zero ? matrix_.zero + row * matrix_.zero_stride : nullptr;
    }
    if (column + count_ < n) {
      const int64_t next = row_of(count_);
      ahead_ = matrix_.data + next * matrix_.data_stride - data_[0];
      scale_ahead_ = scales_of(next) - scale_[0];
      if (matrix_.zero) zero_ahead_ = matrix_.zero + next * matrix_.zero_stride - zero_[0];
    } else if (w.next) {
      ahead_ = w.next - data_[0];
    }
  }

  int64_t count() const { return count_; }
  int64_t panels() const { return (steps_of(d_) + kPanelSteps - 1) / kPanelSteps; }
  int64_t steps() const { return steps_; }       // of the panel
  int64_t first_step() const { return first_; }  // of the panel
  int64_t block() const { return block_; }       // steps of a block
  // From a step of the panel on.
  Side operand(int64_t step) const {
    const char* const at = panel_ + step * kStepBytes;
    return {{at, at + kTileRows * kLine}, {kLine, kLine}, kStepBytes};
  }

  void begin(int64_t panel) {
    first_ = panel * kPanelSteps;
    const int64_t left = steps_of(d_) - first_;
    steps_ = left < kPanelSteps ? left : kPanelSteps;
    first_block_ = C::adjust == Adjust::groups ? panel * kGroups : first_ / block_;
    blocks_ = (steps_ + block_ - 1) / block_;
  }

  // What decoding needs of the scales and zero points of the panel, and the multipliers of its blocks.
  void prepare() {
    if constexpr (C::adjust == Adjust::groups) {
      for (int r = 0; r < kStripRows; ++r) {
        uint8_t codes[kGroups];
        const __m128i known = _mm_maskz_loadu_epi8(lanes_below(int(steps_)), scale_[r] + first_block_);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), known);
        multiplier_[r][0] = prepare_groups<Dot>(codes, adjust_[r]);
        fetch_scales(r);
      }
    } else {
      const int64_t from = first_block_;
      const __mmask16 mask = lanes_below(int(blocks_));
      for (int r = 0; r < kStripRows; ++r) {
        const VF scale = matrix_.exponents
                             ? from_e8m0(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, scale_[r] + from)))
                             : VF{_mm512_maskz_loadu_ps(mask, scale_[r] + from * int64_t(sizeof(float)))};
        store(multiplier_[r], scale);
        fetch_scales(r);
        if constexpr (C::adjust == Adjust::blocks) {
          const __m512i zero =
              zero_[r] ? _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, zero_[r] + from)) : _mm512_set1_epi32(8);
          const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
          const __m512i of_step = _mm512_srl_epi32(step, _mm_cvtsi32_si128(__builtin_ctz(unsigned(block_))));
          const __m512i both = _mm512_or_si512(zero, _mm512_slli_epi32(zero, 16));
          _mm512_storeu_si512(adjust_[r], _mm512_permutexvar_epi32(of_step, both));
        }
      }
    }
  }

  void decode_piece(int64_t from) { decode(0, kStripRows, from); }
  // A part of the rows of the piece that follows step s.
  void decode_after(int64_t s) {
    constexpr int part = kStripRows / kPiece;
    const int64_t piece = (s / kPiece + 1) * kPiece;
    if (piece < steps_) decode(int(s % kPiece) * part, part, piece);
  }

  // sums *= scale, where a row has but one.
  void scale(Transposed& sums, int tiles) const {
    for (int r = 0; r < kStripRows; ++r) {
      float factor;
      __builtin_memcpy(&factor, scale_[r], sizeof factor);
      for (int j = 0; j < tiles; ++j) {
        float* const at = sums.tile[r / kTileRows * tiles + j] + r % kTileRows * kTileRows;
        store(at, load<VF>(at) * set<VF>(factor));
      }
    }
  }

  // total += multiplier * sums of block b of the panel, for a row group in `tiles` tiles.
  void add(const Transposed& sums, int tiles, int64_t b, Transposed& total) const {
    for (int i = 0; i < kTiles; ++i)
      for (int r = 0; r < kTileRows; ++r) {
        const VF factor = set<VF>(multiplier_[i * kTileRows + r][b]);
        for (int j = 0; j < tiles; ++j) {
          float* const to = total.tile[i * tiles + j] + r * kTileRows;
          store(to, fma(load<VF>(sums.tile[i * tiles + j] + r * kTileRows), factor, load<VF>(to)));
        }
      }
  }

  // The panel with M few rows, added to the totals of tile i in total[i]. False if sums without tiles could differ.
  template <int M>
  bool add_few(const FewRows& x, VF (&total)[kTiles][kFewRows]) const {
    VF sum[kTiles][M];
    for (int i = 0; i < kTiles; ++i) {
      const char* const* const row = data_ + i * kTileRows;
      Lanes<C> lanes;
      if (!lanes.begin(matrix_, scale_ + i * kTileRows, zero_ + i * kTileRows, first_block_, blocks_, steps_))
        return false;
      for (int m = 0; m < M; ++m) sum[i][m] = total[i][m];
      for (int64_t s = 0, b = 0; s < steps_; ++b) {
        VF acc[M];
        for (VF& v : acc) v = set<VF>(0);
        const int64_t end = s + block_ < steps_ ? s + block_ : steps_;
        for (; s < end; ++s) {
          fetch_ahead(i * kTileRows, s);
          fetch_scales(i * kTileRows + int(s));
          const int64_t at = (first_ + s) * bytes;
          const float* in[M];
          for (int m = 0; m < M; ++m) in[m] = x.row(m, first_ + s);
          VF sums[M];
          const int64_t left = d_ - (first_ + s) * kStep;
          if (left >= kStep)
            lanes.template step<M, true>(row, at, bytes, in, b, sums);
          else
            lanes.template step<M, false>(row, at, (left * C::bits + 7) / 8, in, b, sums);
          for (int m = 0; m < M; ++m) acc[m] = fma(sums[m], lanes.factor(s), acc[m]);
        }
        for (int m = 0; m < M; ++m) sum[i][m] = fma(acc[m], lanes.multiplier(b), sum[i][m]);
      }
      if (!lanes.numbers()) return false;
    }
    for (int i = 0; i < kTiles; ++i)
      for (int m = 0; m < M; ++m) total[i][m] = sum[i][m];
    return true;
  }

 private:
  // Rows [first, first + count) of a piece from step `from` of the panel on.
  void decode(int first, int count, int64_t from) {
    const int64_t to = from + kPiece < steps_ ? from + kPiece : steps_;
    for (int r = first; r < first + count; ++r) {
      const char* const data = data_[r] + (first_ + from) * bytes;
#pragma GCC unroll 2
      for (int64_t line = 0; line < kPiece * bytes; line += kLine) __builtin_prefetch(data + ahead_ + line, 0, 2);
      const uint32_t* const adjust = adjust_[r] + from;
      char* const out = panel_ + r * kLine + from * kStepBytes;
      if (to - from == kPiece && (first_ + to) * kStep <= d_) {
#pragma GCC unroll 4
        for (int s = 0; s < kPiece; ++s) Dot::store(out + s * kStepBytes, decode_step(data + s * bytes, adjust + s));
        continue;
      }
      for (int64_t s = from; s < to; ++s) {
        const int64_t left = d_ - (first_ + s) * kStep;
        char step[bytes] = {};
        __builtin_memcpy(step, data + (s - from) * bytes, left < kStep ? size_t(left * C::bits + 7) / 8 : bytes);
        Dot::store(out + (s - from) * kStepBytes, decode_step(step, adjust + s - from));
      }
    }
  }

  static __m512i decode_step(const char* p, const uint32_t* adjust) {
    if constexpr (C::adjust == Adjust::blocks)
      return C::decode_any(p, *adjust);
    else
      return C::decode(p, C::adjust == Adjust::none ? 0 : *adjust);
  }

  // A part of the lines of the next strip that are where step s of 16 rows is; asked for all at once they would fill
  // the fill buffers.
  void fetch_ahead(int first, int64_t s) const {
    constexpr int steps = int(kLine / bytes), part = kTileRows / steps;
    const int from = first + int(s % steps) * part;
    for (int r = from; r < from + part; ++r) __builtin_prefetch(data_[r] + ahead_ + (first_ + s) * bytes, 0, 2);
  }

  void fetch_scales(int r) const {
    const int64_t at = first_block_ * (C::adjust == Adjust::groups || matrix_.exponents ? 1 : int64_t(sizeof(float)));
    __builtin_prefetch(scale_[r] + scale_ahead_ + at, 0, 2);
    if (C::adjust == Adjust::blocks && matrix_.zero) __builtin_prefetch(zero_[r] + zero_ahead_ + first_block_, 0, 2);
  }

  const QuantizedMatrix& matrix_;
  const int64_t d_, count_, block_;
  int64_t ahead_ = 0, scale_ahead_ = 0, zero_ahead_ = 0;          // bytes to what is asked for meanwhile
  int64_t first_ = 0, steps_ = 0, first_block_ = 0, blocks_ = 0;  // of the panel; of MX formats groups are counted
  const char *data_[kStripRows], *scale_[kStripRows], *zero_[kStripRows];
  alignas(64) float multiplier_[kStripRows][kPanelSteps];  // by block
  alignas(64) uint32_t adjust_[kStripRows][kPanelSteps];   // by step
  alignas(64) char panel_[kPanelSteps * kStepBytes];
};

// A panel times a row group, block by block.
template <class C, class Meanwhile>
[[gnu::always_inline]] inline void multiply_panel(const Rows& rows, int64_t group, Strip<C>& strip, Transposed& total,
                                                  Configured& configured, Meanwhile&& meanwhile) {
  Transposed sums;
  const int tiles = Halves(rows.groups.rows(group)).tiles();
  for (int64_t s = 0, b = 0; s < strip.steps(); s += strip.block(), ++b) {
    const int64_t steps = s + strip.block() < strip.steps() ? strip.block() : strip.steps() - s;
    multiply_left(rows, group, strip.operand(s), kTiles, kTileRows, strip.first_step() + s, steps, false, sums,
                  configured, [&](int64_t i, int part, int parts) { meanwhile(s + i, part, parts); });
    strip.add(sums, tiles, b, total);
  }
}

template <class C>
[[gnu::nothrow]] void multiply_strip(const Rows& rows, Strip<C>& strip, int64_t column, Configured& configured) {
  Transposed totals[kGroupsTogether];
  for (int64_t from = 0; from < rows.groups.count; from += kGroupsTogether) {
    const int64_t to = from + kGroupsTogether < rows.groups.count ? from + kGroupsTogether : rows.groups.count;
    for (int64_t group = from; group < to; ++group) __builtin_memset(&totals[group - from], 0, sizeof(Transposed));
    for (int64_t p = 0; p < strip.panels(); ++p) {
      strip.begin(p);
      strip.prepare();
      strip.decode_piece(0);
      multiply_panel(rows, from, strip, totals[0], configured, EachStep{[&](int64_t s) { strip.decode_after(s); }});
      for (int64_t group = from + 1; group < to; ++group)
        multiply_panel(rows, group, strip, totals[group - from], configured, Nothing{});
    }
    for (int64_t group = from; group < to; ++group)
      store_transposed(rows, group, strip.count(), totals[group - from], column);
  }
}

// The same with few rows, which are one group. Panels whose sums could differ without tiles go through them.
template <int M, class C>
[[gnu::nothrow]] void multiply_few(const Rows& rows, const FewRows& x, Strip<C>& strip, int64_t column,
                                   Configured& configured) {
  VF total[kTiles][kFewRows];
  for (auto& of_tile : total)
    for (VF& v : of_tile) v = set<VF>(0);
  for (int64_t p = 0; p < strip.panels(); ++p) {
    strip.begin(p);
    if (strip.template add_few<M>(x, total)) continue;
    Transposed totals;
    const auto each_of = [&](auto&& f) {
      for (int i = 0; i < kTiles; ++i)
        for (int m = 0; m < M; ++m)
          for (int r = 0; r < kTileRows; ++r)
            f(reinterpret_cast<float*>(&total[i][m])[r], totals.tile[i][r * kTileRows + m]);
    };
    each_of([](float v, float& t) { t = v; });
    strip.prepare();
    for (int64_t s = 0; s < strip.steps(); s += kPiece) strip.decode_piece(s);
    multiply_panel(rows, 0, strip, totals, configured, Nothing{});
    each_of([](float& v, float t) { v = t; });
  }
  for (int i = 0; i < kTiles && i * kTileRows < strip.count(); ++i)
    for (int m = 0; m < M; ++m) {
      const int64_t left = strip.count() - i * kTileRows;
      store_n(rows.c + m * rows.ldc + column + i * kTileRows, total[i][m], left < kTileRows ? int(left) : kTileRows);
    }
}

template <class C, class F>
void each_strip(const Weights& w, int64_t n, int64_t d, F&& f) {
  for (int64_t column = 0; column < n; column += kStripRows) {
    Strip<C> strip(w, column, n, d);
    f(strip, column);
  }
}

template <class C>
[[gnu::nothrow]] void multiply_rows(const Rows& rows, const Weights& w, int64_t n, Configured& configured) {
  const auto few = [&](auto count, const FewRows& x) {
    each_strip<C>(w, n, rows.d, [&](Strip<C>& strip, int64_t column) {
      multiply_few<count.value>(rows, x, strip, column, configured);
    });
  };
  if (rows.groups.count == 1 && rows.groups.rows(0) <= kFewRows && Lanes<C>::available()) {
    const FewRows x(rows, w.workspace, Lanes<C>::up);
    const int m = rows.groups.rows(0);
    if (x.narrow()) return m == 1 ? few(Index<1>{}, x) : m == 2 ? few(Index<2>{}, x) : few(Index<3>{}, x);
  }
  each_strip<C>(w, n, rows.d,
                [&](Strip<C>& strip, int64_t column) { multiply_strip(rows, strip, column, configured); });
}

template <class C>
void multiply_quantized(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const Rows rows{a, RowGroups(m, kMaxRows), d, static_cast<float*>(c), ldc};
  if (trivial(rows, m, n)) return;
  Configured configured;
  multiply_rows<C>(rows, w, n, configured);
}

template <class C>
constexpr GemmKernel kOnTiles = {kStep, sizeof(bf16), kMaxRows, 1, pack_right, multiply_quantized<C>, FewRows::bytes};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
