// Rows of quantised weights, decoded for tile products. A strip is two tiles of rows of W. A span of its reduction, a
// few steps, is decoded while tiles multiply the span before it, in the other of two buffers that the L1 cache holds.
#pragma once

#include "amx_codes.h"
#include "bytes.h"
#include "quantized_ahead.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kTiles = 2, kStripRows = kTiles * kTileRows;
constexpr int64_t kStepBytes = kStripRows * kLine;  // of a step of decoded weights
constexpr int64_t kMaxSpan = 16;                    // steps
constexpr int64_t kPanelSteps = kBlock / kStep;     // whose scales are read together

// Scales of the rows of a strip, the first `blocks` of 32-bit ones or e8m0, with rows side by side.
inline void load_scales(const char* const* scale, bool exponents, int64_t first, int64_t blocks,
                        float (*out)[kStripRows]) {
  for (int tile = 0; tile < kTiles; ++tile)
    scale_lanes(scale + tile * kTileRows, exponents, first, blocks, *out + tile * kTileRows, kStripRows);
}

// Where the rows of a strip lie, and what decoding them takes; rows past the last one repeat it. With C::adjust ==
// Adjust::groups a row has a base, which its groups are taken relative to: 1 if no scale is above it or so far below
// that products could leave the range, else its largest scale.
template <class C>
class StripRows {
 public:
  static constexpr int64_t bytes = kStep * C::bits / 8;  // of a step of codes

  // Columns from `column` on of n columns of C.
  void become(const Weights& w, int64_t column, int64_t n, int64_t d) {
    matrix_ = w.matrix;
    const QuantizedMatrix& m = *matrix_;
    count_ = n - column < kStripRows ? n - column : kStripRows;
    steps_ = steps_of(d);
    for (int64_t r = 0; r < kStripRows; ++r) {
      const MatrixRow row(m, matrix_row(w, column + (r < count_ ? r : count_ - 1)));
      data_[r] = row.data, scale_[r] = row.scale, zero_[r] = row.zero;
    }
    scale_ahead_ = zero_ahead_ = 0;
    if (const int64_t ahead = row_ahead(w, column + count_, n); ahead >= 0) {
      const MatrixRow next(m, ahead);
      scale_ahead_ = next.scale - scale_[0];
      if (m.zero) zero_ahead_ = next.zero - zero_[0];
    }
    if constexpr (C::adjust == Adjust::groups) find_bases();
    if constexpr (C::adjust == Adjust::none)
      if (m.scale_columns == 0) load_scales(scale_, false, 0, 1, &multiplier_);
  }

  int64_t count() const { return count_; }
  const char* const* data() const { return data_; }
  // What the sums of whole rows are multiplied by, or null.
  const float* multiplier() const { return C::adjust == Adjust::groups && !relative_ ? nullptr : multiplier_; }

  // `adjust` of codes for steps [first, first + kPanelSteps).
  void prepare(int64_t first, uint32_t (*adjust)[kPanelSteps]) const {
    const QuantizedMatrix& m = *matrix_;
    const int64_t left = steps_ - first < kPanelSteps ? steps_ - first : kPanelSteps;
    if constexpr (C::adjust == Adjust::groups) {
      // The code of a group in both words of its 32 bits.
      const __m512i codes_twice =
          _mm512_or_si512(_mm512_set4_epi32(int(0x80038003), int(0x80028002), int(0x80018001), int(0x80008000)),
                          _mm512_setr_epi32(0, 0, 0, 0, 0x040004, 0x040004, 0x040004, 0x040004, 0x080008, 0x080008,
                                            0x080008, 0x080008, 0x0c000c, 0x0c000c, 0x0c000c, 0x0c000c));
      const auto prepare_row = [&](int r, __m128i codes) {
        const __m512i code = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(codes), codes_twice);
        const __m512i below = _mm512_sub_epi16(_mm512_set1_epi32(base_[r] * 0x10001), code);
        _mm512_store_si512(adjust[r], TileCodes<C>::adjust(_mm512_min_epu16(below, _mm512_set1_epi16(kSpread))));
      };
      if (left == kPanelSteps)
        for (int r = 0; r < kStripRows; ++r)
          prepare_row(r, _mm_loadu_si128(reinterpret_cast<const __m128i*>(scale_[r] + first)));
      else
        for (int r = 0; r < kStripRows; ++r)
          prepare_row(r, _mm_maskz_loadu_epi8(lanes_below(int(left)), scale_[r] + first));
      if (first % kLine == 0)
        for (const char* const scale : scale_) __builtin_prefetch(scale + scale_ahead_ + first, 0, 2);
    } else if constexpr (C::adjust == Adjust::blocks) {
      const int steps = int(m.scale_columns / kStep), shift = __builtin_ctz(unsigned(steps));
      const __mmask16 mask = lanes_below(int((left + steps - 1) / steps));
      const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i block = _mm512_srl_epi32(step, _mm_cvtsi32_si128(shift));
      for (int r = 0; r < kStripRows; ++r) {
        __m512i zero = _mm512_set1_epi32(8);
        if (zero_[r]) {
          const char* const from = zero_[r] + (first >> shift);
          zero = _mm512_permutexvar_epi32(block, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from)));
          __builtin_prefetch(from + zero_ahead_, 0, 2);
        }
        _mm512_storeu_si512(adjust[r], zero);
      }
    }
  }

  // Multipliers of `blocks` blocks from `first` on.
  void factors(int64_t first, int64_t blocks, float (*out)[kStripRows]) const {
    load_scales(scale_, matrix_->exponents, first, blocks, out);
    const int64_t at = first * (matrix_->exponents ? 1 : int64_t(sizeof(float)));
    for (int r = 0; r < kStripRows; ++r) __builtin_prefetch(scale_[r] + scale_ahead_ + at, 0, 2);
  }

 private:
  void find_bases() {
    constexpr int one = 127, least = one - 60;
    __m512i most = _mm512_setzero_si512();  // above `least`; of codes below it more than of any
    for (int64_t s = 0; s < steps_; s += 64) {
      const __mmask64 mask = steps_ - s < 64 ? (1ull << (steps_ - s)) - 1 : ~0ull;
      const __m512i bottom = _mm512_set1_epi8(least);
      for (const char* const scale : scale_)
        most = _mm512_max_epu8(most, _mm512_maskz_sub_epi8(mask, _mm512_maskz_loadu_epi8(mask, scale + s), bottom));
    }
    relative_ = _mm512_cmpgt_epu8_mask(most, _mm512_set1_epi8(one - least)) != 0;
    for (int r = 0; r < kStripRows; ++r) base_[r] = one;
    if (relative_)
      for (int r = 0; r < kStripRows; ++r) find_base(r, least);
  }
  void find_base(int r, int least) {
    int smallest = 255, largest = 0;
    for (int64_t s = 0; s < steps_; ++s) {
      const int code = uint8_t(scale_[r][s]);
      smallest = code < smallest ? code : smallest, largest = code > largest ? code : largest;
    }
    const bool far = largest > base_[r] || smallest < least;
    if (far) base_[r] = largest;
    multiplier_[r] = far ? from_e8m0(uint8_t(largest)) : 1;
  }

  const QuantizedMatrix* matrix_;
  int64_t count_, steps_;
  int64_t scale_ahead_, zero_ahead_;  // bytes to those of the next strip
  const char *data_[kStripRows], *scale_[kStripRows], *zero_[kStripRows];
  int base_[kStripRows];
  bool relative_ = false;
  float multiplier_[kStripRows];
};

// Steps [first, first + steps) of a strip, decoded.
struct Span {
  int64_t column, count;  // of the strip
  int64_t pass;           // over the strip
  int64_t first, steps;
  bool last;                          // of the strip's reduction
  const float* multiplier;            // of rows, or null
  const float (*factor)[kStripRows];  // of blocks
  alignas(64) char lines[kMaxSpan * kStepBytes];

  // From step `s` of the span on.
  Side operand(int64_t s) const {
    const char* const at = lines + s * kStepBytes;
    return {{at, at + kTileRows * kLine}, {kLine, kLine}, kStepBytes};
  }
};

// Steps that a block takes whose sums are multiplied by scales of their own; 0: the sums are of whole rows.
template <class C>
int64_t block_steps(const Weights& w) {
  return C::adjust == Adjust::groups ? 0 : w.matrix->scale_columns / kStep;
}

// All spans of all strips, `passes` times each strip, decoded in turn.
template <class C>
class Spans {
 public:
  Spans(const Weights& w, int64_t n, int64_t d, int64_t span_steps, int64_t passes)
      : w_(w), n_(n), d_(d), span_steps_(span_steps), passes_(passes) {}

  const Span* first() {
    aim();
    return next();
  }
  // What is left of the span that is being decoded, which is returned, or null after the last one; the span before it
  // makes room for the following one.
  const Span* next() {
    while (left_ > 0) decode_some();
    if (!coming_) return nullptr;
    const Span* const span = coming_;
    aim();
    return span;
  }

  // What a few rows of the coming span take, if any are left.
  [[gnu::always_inline]] void decode_some() {
    constexpr int ROWS = 4;
    if (left_ <= 0) return;
    left_ -= ROWS;
    const char* const* const data = data_;
    const uint32_t(*const adjust)[kPanelSteps] = of_row_;
    char* const out = out_;
    data_ += ROWS, of_row_ += ROWS, out_ += ROWS * kLine;
    if (__builtin_expect(at_ + kTogether <= whole_, 1)) {
      // Addresses are read before anything is stored, which could change them, for all the compiler knows.
      const int64_t from = from_, panel_step = panel_step_;
      const char* const codes[ROWS] = {data[0] + from, data[1] + from, data[2] + from, data[3] + from};
      ahead_.template ask<kTogether * StripRows<C>::bytes / kLine>();  // as many lines as are decoded
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i)
        TileCodes<C>::decode_together(codes[i], adjust[i] + panel_step, out + i * kLine, kStepBytes);
    } else {
      for (int i = 0; i < ROWS; ++i) decode_last(data[i] + from_, adjust[i] + panel_step_, out + i * kLine);
    }
    if (left_ > 0 && left_ % kStripRows == 0) turn(at_ + kTogether, out_ + (kTogether - 1) * kStepBytes);
  }

 private:
  // At the span after the coming one.
  void aim() {
    const Span* const before = coming_;
    if (before && before->last && before->pass + 1 == passes_ && before->column + kStripRows >= n_) {
      coming_ = nullptr;
      return;
    }
    Span& span = span_[before == &span_[0] ? 1 : 0];
    if (!before || before->last) {
      const bool again = before && before->pass + 1 < passes_;
      span.pass = again ? before->pass + 1 : 0;
      span.column = !before ? 0 : again ? before->column : before->column + kStripRows;
      span.first = 0;
      parity_ ^= 1;
      strip_[parity_].become(w_, span.column, n_, d_);
      ahead_ = streams_ahead(w_, span.column + kStripRows, n_, kStripRows, d_, C::bits);
    } else {
      span.pass = before->pass, span.column = before->column, span.first = before->first + before->steps;
    }
    const StripRows<C>& rows = strip_[parity_];
    const int64_t steps = steps_of(d_) - span.first;
    span.count = rows.count();
    span.steps = steps < span_steps_ ? steps : span_steps_;
    span.last = steps <= span_steps_;
    span.multiplier = rows.multiplier();
    if (span.first % kPanelSteps == 0) {
      rows.prepare(span.first, adjust_);
      if (block_ > 0) {
        panel_ ^= 1;
        const int64_t of_panel = steps < kPanelSteps ? steps : kPanelSteps;
        rows.factors(span.first / block_, (of_panel + block_ - 1) / block_, factor_[panel_]);
      }
    }
    if (block_ > 0) span.factor = factor_[panel_] + span.first % kPanelSteps / block_;
    coming_ = &span;
    turn(span.first, span.lines);
    left_ = (span.steps + kTogether - 1) / kTogether * kStripRows;
  }

  // To row 0 of kTogether steps.
  void turn(int64_t step, char* out) {
    data_ = strip_[parity_].data(), of_row_ = adjust_, out_ = out;
    at_ = step, from_ = step * StripRows<C>::bytes, panel_step_ = step % kPanelSteps;
  }

  // Steps that are not all there.
  void decode_last(const char* codes, const uint32_t* adjust, char* out) const {
    constexpr int64_t bytes = StripRows<C>::bytes;
    for (int64_t s = 0; s < kTogether && at_ + s < steps_of(d_); ++s) {
      const int64_t left = d_ - (at_ + s) * kStep;
      char step[bytes] = {};
      __builtin_memcpy(step, codes + s * bytes, left < kStep ? size_t(left * C::bits + 7) / 8 : bytes);
      Pairs::store(out + s * kStepBytes, TileCodes<C>::decode(step, adjust + s));
    }
  }

  const Weights& w_;
  const int64_t n_, d_, span_steps_, passes_, whole_ = d_ / kStep;
  const int64_t block_ = block_steps<C>(w_);
  Span* coming_ = nullptr;
  int parity_ = 0, panel_ = 0;
  // What is decoded next: rows from data_[0] on, steps from at_ on, until left_ times a row are done.
  int64_t left_ = 0;
  const char* const* data_ = nullptr;
  const uint32_t (*of_row_)[kPanelSteps] = nullptr;
  char* out_ = nullptr;
  int64_t at_ = 0, from_ = 0, panel_step_ = 0;
  Streams ahead_;  // what comes after the strip
  StripRows<C> strip_[2];
  alignas(64) uint32_t adjust_[kStripRows][kPanelSteps];
  alignas(64) float factor_[2][kPanelSteps][kStripRows];
  Span span_[2];
};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
