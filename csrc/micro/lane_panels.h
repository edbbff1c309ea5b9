// Panels: quantised weights decoded once for many rows of A, and multiplied by them in register tiles. Dot products
// have two of the four vector ports, and decoding wants the others: so a panel is decoded piece by piece between
// products of the one before.
#pragma once

#include <algorithm>
#include <optional>

#include "lane_strip.h"
#include "quantized_ahead.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kTileRows = 7;  // of a panel's tile, whose totals lie in registers beside the sums of a step
constexpr int kVectors = 2, kColumns = kVectors * kLanes;  // of a panel
constexpr int64_t kPanelBytes = kPanelSteps * kPairs * kVectors * kLine;
constexpr int64_t kPanelsBytes = 2 * kPanelBytes;  // one that is multiplied, and one that is decoded meanwhile

// --- decoding --------------------------------------------------------------------------------------------------------

// A panel in pieces: of a line of 16 rows four transpose four rows each, and four decode what comes of that.
template <class C>
class PanelDecoder {
 public:
  static constexpr int pairs = 4;  // of A and a panel that are multiplied from one piece to the next

  // Steps [first, first + steps) of two strips whose scales are prepared.
  void begin(const std::optional<Strip<C>> (&strips)[kVectors], const Scales (&scales)[kVectors], int64_t first,
             int64_t steps, char* out) {
    for (int v = 0; v < kVectors; ++v) strip_[v] = &*strips[v];
    scales_ = scales, first_ = first, out_ = out;
    piece_ = 0, pieces_ = unsigned((steps + kLineSteps - 1) / kLineSteps) * kVectors * kLinePieces;
  }
  void stop() { piece_ = pieces_ = 0; }

  bool busy() const { return piece_ < pieces_; }
  [[gnu::always_inline]] void next() {
    if (!busy()) return;
    const unsigned piece = piece_++, step = piece / (kVectors * kLinePieces) * kLineSteps;
    const unsigned v = piece / kLinePieces % kVectors, k = piece % 4;
    const Strip<C>& strip = *strip_[v];
    if (piece % kLinePieces < 4)
      transpose_fours(strip, (first_ + step) * Strip<C>::step_bytes, k);
    else
      decode(strip, step, v, k);
  }
  void finish() {
    while (busy()) next();
  }

 private:
  static constexpr unsigned kLinePieces = 8;
  static constexpr int kParts = Strip<C>::parts, kLineSteps = kLineParts / kParts;

  [[gnu::always_inline]] void transpose_fours(const Strip<C>& strip, int64_t at, unsigned k) {
    Bytes v[4];
    if (__builtin_expect(strip.has_line(at), 1))
      strip.template load_fours<true>(at, k, v);
    else
      strip.template load_fours<false>(at, k, v);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_store_si512(fours_[4 * k + i], v[i]);
  }

  // Of the line that begins with a step, bytes 4k to 4k + 3 of each 16, of all rows.
  [[gnu::always_inline]] void decode(const Strip<C>& strip, int64_t step, unsigned v, unsigned k) {
    VF part[4] = {load<VF>(fours_[k]), load<VF>(fours_[4 + k]), load<VF>(fours_[8 + k]), load<VF>(fours_[12 + k])};
    exchange_quarters(part);
    Bytes codes[4], adjust[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      codes[i] = _mm512_castps_si512(part[i].v);
      adjust[i] = adjust_of<C>(scales_[v], strip.block(step + i / kParts));
    }
    char* const out = out_ + (step * kPairs + k * C::pairs) * (kVectors * kLine) + v * kLine;
    const auto pair = [&](int i, int j) { return out + (i * Strip<C>::part_pairs + j) * (kVectors * kLine); };
    if (__builtin_expect(C::usual(codes, adjust), 1)) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        each_constant<C::pairs>([&](auto j) __attribute__((always_inline)) {
          store_bytes(pair(i, j), C::template pair<j>(codes[i], adjust[i]));
        });
      return;
    }
#pragma GCC unroll 1
    for (int i = 0; i < 4; ++i) {
      Bytes w[C::pairs];
      C::general(codes[i], adjust[i], w);
      for (int j = 0; j < C::pairs; ++j) store_bytes(pair(i, j), w[j]);
    }
  }

  const Strip<C>* strip_[kVectors];
  const Scales* scales_;  // by vector, as strips are
  int64_t first_;
  char* out_;
  unsigned piece_ = 0, pieces_ = 0;
  alignas(64) float fours_[kLanes][kLanes];  // of the line that is decoded
};

// In its place, when there is nothing to decode.
struct Idle {
  static constexpr int pairs = kPairs;
  void next() const {}
};

// Columns [column, column + columns) by steps [first, first + steps).
struct Place {
  int64_t column, columns, first, steps;

  // Columns of vector v.
  int64_t width(int v) const { return std::clamp<int64_t>(columns - v * kLanes, 0, kLanes); }
};

// The panels of columns [0, n), along the reduction first. Two lie where the workspace begins; `copies` has room for
// copies_bytes(d).
template <class C>
class Panels {
 public:
  Panels(const Weights& w, int64_t n, int64_t d, char* copies)
      : w_(w), n_(n), d_(d), of_columns_((steps_of(d) + kPanelSteps - 1) / kPanelSteps), copies_(copies) {
    begin(0);
    decoder_.finish();
  }
  Panels(const Panels&) = delete;

  static int64_t copies_bytes(int64_t d) { return kVectors * Strip<C>::copy_bytes(d); }

  int64_t count() const { return (n_ + kColumns - 1) / kColumns * of_columns_; }
  Place place(int64_t panel) const {
    const int64_t column = panel / of_columns_ * kColumns, first = panel % of_columns_ * kPanelSteps;
    return {column, std::min<int64_t>(n_ - column, kColumns), first,
            std::min<int64_t>(steps_of(d_) - first, kPanelSteps)};
  }
  // Of one that is decoded, or about to be.
  char* data(int64_t panel) const { return w_.workspace + panel % 2 * kPanelBytes; }
  Scales (&scales(int64_t panel))[kVectors] { return scales_[panel % 2]; }
  PanelDecoder<C>& decoder() { return decoder_; }

  // Hands the next one to the decoder; none past the last.
  void begin(int64_t panel) {
    if (panel >= count()) return decoder_.stop();
    const Place at = place(panel);
    if (at.first == 0) {
      const int used = at.width(1) > 0;  // the strip again, where there is no second one
      strips_[0].emplace(w_, at.column, at.width(0), d_, copies_);
      strips_[1].emplace(w_, at.column + used * kLanes, at.width(used), d_, copies_ + Strip<C>::copy_bytes(d_));
    }
    for (int v = 0; v < kVectors; ++v) strips_[v]->prepare(at.first, scales(panel)[v]);
    decoder_.begin(strips_, scales(panel), at.first, at.steps, data(panel));
  }

 private:
  const Weights& w_;
  int64_t n_, d_, of_columns_;  // panels that the same columns have
  char* copies_;
  std::optional<Strip<C>> strips_[kVectors];  // of the panel that is decoded
  Scales scales_[2][kVectors];
  PanelDecoder<C> decoder_;
};

// --- multiplying -----------------------------------------------------------------------------------------------------

[[gnu::always_inline]] inline VF add_pairs(VF acc, const char* x, Bytes w) {
  int pair;
  __builtin_memcpy(&pair, x, sizeof pair);
  return {_mm512_dpbf16_ps(acc.v, __m512bh(w), __m512bh(_mm512_set1_epi32(pair)))};
}

// Where factors are powers of two, `vscalefps` and an addition do what a multiply-add does, off the ports of the dot
// products, and with the same bits if products are exact: if no bit of a sum by its factor is less than 2^-149, and
// none is infinite. So both are bounded, by the exponents of A, biased, and those of the factors.
struct Exponents {
  int least, most;  // of A's numbers but zeros

  // Of `bytes` of A, whole lines.
  static Exponents of(const char* a, int64_t bytes) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1);
    __m512i low = _mm512_set1_epi16(-1), high = _mm512_setzero_si512();
    for (int64_t i = 0; i < bytes; i += kLine) {
      const __m512i x = _mm512_and_si512(load_bytes(a + i), magnitude);
      low = _mm512_min_epu16(low, _mm512_sub_epi16(x, one));  // where zero is the largest
      high = _mm512_max_epu16(high, x);
    }
    alignas(64) uint16_t lows[32], highs[32];
    _mm512_store_si512(lows, low), _mm512_store_si512(highs, high);
    return {*std::min_element(lows, lows + 32) >> 7, *std::max_element(highs, highs + 32) >> 7};
  }

  // The factors of a panel's steps become logarithms, if products by them are exact; returns whether they did. `power`:
  // that of the codes.
  bool take_logarithms(int power, Scales (&scales)[kVectors], int64_t steps) const {
    const int code_bits = 9, sum_bits = 9 + 6 + power;  // of a fraction, and of the largest, times 32
    VF log[kVectors][kPanelSteps];
    __m512 low = _mm512_set1_ps(128), high = _mm512_set1_ps(-128);
    for (int v = 0; v < kVectors; ++v)
      for (int64_t step = 0; step < steps; ++step) {
        const __m512 x = _mm512_getexp_ps(_mm512_load_ps(scales[v].factor[step]));
        low = _mm512_min_ps(x, low), high = _mm512_max_ps(x, high);  // NaN counts as nothing
        log[v][step] = {x};
      }
    if (least - 127 - 7 - code_bits + _mm512_reduce_min_ps(low) < -149) return false;
    if (most - 126 + sum_bits + _mm512_reduce_max_ps(high) > 127) return false;
    for (int v = 0; v < kVectors; ++v)
      for (int64_t step = 0; step < steps; ++step) store(scales[v].factor[step], log[v][step]);
    return true;
  }
};

// Columns of a panel, a part of the reduction at a time: what they are multiplied by, and where the sums go.
struct Task {
  const char* panel;
  const Scales* scales;  // by vector
  int64_t steps;
  int shift;  // block_shift
  bool add;
  Streams* ahead;
  int asks;  // for what is needed next, in a step
  float* c;
  int64_t ldc;
  __mmask16 columns[kVectors];
};

// `stride`: rows of the group. POWERS: factors are logarithms, see Exponents. SCALED: see Scaled.
// `meanwhile`: what is done between products.
template <int ROWS, bool POWERS, int SCALED, class Meanwhile>
void tile(const char* a, int64_t stride, const Task& task, Meanwhile& meanwhile) {
  VF total[ROWS][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      total[i][v] = {task.add ? _mm512_maskz_loadu_ps(task.columns[v], task.c + i * task.ldc + v * kLanes)
                              : _mm512_setzero_ps()};
  const char* w = task.panel;
  for (int64_t step = 0; step < task.steps;) {
    VF block[ROWS][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) block[i][v] = set<VF>(0);
    const int64_t first = step, end = SCALED == 1 ? step + 1 : std::min(step + SCALED, task.steps);
    do {
      for (int i = 0; i < task.asks; ++i) task.ahead->ask();
      VF acc[ROWS][kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[i][v] = set<VF>(0);
#pragma GCC unroll 1
      for (int first_pair = 0; first_pair < kPairs; first_pair += Meanwhile::pairs) {
#pragma GCC unroll 4
        for (int p = 0; p < Meanwhile::pairs; ++p, a += stride * 4, w += kVectors * kLine) {
          const Bytes w0 = load_bytes(w), w1 = load_bytes(w + kLine);
#pragma GCC unroll 8
          for (int i = 0; i < ROWS; ++i) {
            acc[i][0] = add_pairs(acc[i][0], a + i * 4, w0);
            acc[i][1] = add_pairs(acc[i][1], a + i * 4, w1);
          }
        }
        meanwhile.next();
      }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) block[i][v] = SCALED == 1 ? acc[i][v] : block[i][v] + acc[i][v];
      ++step;
    } while (step < end);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const VF factor = load<VF>(task.scales[v].factor[SCALED > 1 ? first / SCALED : first >> task.shift]);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i)
        total[i][v] = POWERS ? total[i][v] + VF{_mm512_scalef_ps(block[i][v].v, factor.v)}
                             : fma(block[i][v], factor, total[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      _mm512_mask_storeu_ps(task.c + i * task.ldc + v * kLanes, task.columns[v], total[i][v].v);
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
