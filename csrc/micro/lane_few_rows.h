// One to three rows of A by a strip of weights of four bits. A vector has codes of four rows of W and of four steps of
// the reduction, a quarter for each step, so that no shuffle that brings them into lanes crosses a quarter: half of all
// shuffles fall away, on the two ports that the table look-ups need, too. A pair of A, spread over such a vector
// beforehand, serves all 16 rows. Sums of steps are brought to where lane_gemm.cpp has them, and added as there.
#pragma once

#include "lane_strip.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// Whether A is spread: codes of eight bits would need two lines of a row for four steps, and gain nothing that way; and
// the sums of more rows, four vectors each, have no room beside the codes.
constexpr int kSpreadRows = 3;
template <class C>
constexpr bool spreads(int rows) {
  return C::bits == 4 && rows <= kSpreadRows;
}

inline int64_t spread_bytes(int64_t rows, int64_t d) {
  return (steps_of(d) + kSpan - 1) / kSpan * kPairs * rows * kLine;
}

// A row group of A as vectors: of span s pair p of row r, at ((s * kPairs + p) * rows + r) * kLine. In quarter j it has
// that pair of step j, or zeros where there is no such step.
inline void spread(const char* a, int rows, int64_t d, char* out) {
  const int64_t steps = steps_of(d), row = kPairs * 4;  // bytes of a step
  for (int64_t first = 0; first < steps; first += kSpan)
    for (int i = 0; i < rows; ++i) {
      VF x[kSpan];
      for (int j = 0; j < kSpan; ++j)
        x[j] = first + j < steps ? load<VF>(reinterpret_cast<const float*>(a + ((first + j) * rows + i) * row))
                                 : set<VF>(0);
      exchange_quarters(x);
      for (const VF& four : x) {
        const Bytes v = _mm512_castps_si512(four.v);
        store_bytes(out, _mm512_shuffle_epi32(v, _MM_PERM_AAAA));
        store_bytes(out + kLine, _mm512_shuffle_epi32(v, _MM_PERM_BBBB));
        store_bytes(out + 2 * kLine, _mm512_shuffle_epi32(v, _MM_PERM_CCCC));
        store_bytes(out + 3 * kLine, _mm512_shuffle_epi32(v, _MM_PERM_DDDD));
        out += 4 * kLine;
      }
    }
}

template <class C, int ROWS>
class FewRows {
 public:
  // `x`: see spread.
  FewRows(const char* x, const Strip<C>& strip) : x_(x), strip_(strip) {}
  FewRows(const FewRows&) = delete;

  void multiply(Streams& ahead, VF (&total)[ROWS]) {
    VF sum[ROWS];  // in registers, where `total` has to be memory
#pragma GCC unroll 4
    for (VF& v : sum) v = set<VF>(0);
    const int64_t steps = strip_.steps(), whole = strip_.whole_lines() * kSpan;
    for (int64_t step = 0; step < whole; step += kSpan) {
      if (step % kPanelSteps == 0) strip_.prepare(step, scales_);
      add<true>(step, kSpan, ahead, sum);
    }
    if (whole < steps) {
      if (whole % kPanelSteps == 0) strip_.prepare(whole, scales_);
      add<false>(whole, int(steps - whole), ahead, sum);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) total[r] = sum[r];
  }

 private:
  // Steps [first, first + count) of a span.
  template <bool WHOLE>
  [[gnu::always_inline]] void add(int64_t first, int count, Streams& ahead, VF (&sum)[ROWS]) {
    const int64_t at = first * Strip<C>::step_bytes;
    Bytes v[kLanes], adjust[4];
    strip_.template load_span<WHOLE>(at, v);
    adjust_of_span(first, count, adjust);
    VF acc[4][ROWS];
#pragma GCC unroll 4
    for (auto& rows : acc)
#pragma GCC unroll 4
      for (VF& x : rows) x = set<VF>(0);

    const char* const x = x_ + first / kSpan * (kPairs * ROWS * kLine);
    const auto multiply_add = [&](int pair, int q, Bytes w) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
        acc[q][r] = Pairs::multiply_add(acc[q][r], load_bytes(x + (pair * ROWS + r) * kLine), w);
    };
    const char* const ask = ahead.take<4>();
    const int64_t near = strip_.past_end_in_next(at + 2 * kLine);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const Bytes four[4] = {v[c], v[4 + c], v[8 + c], v[12 + c]};
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        __builtin_prefetch(ask + (4 * c + q) * kLine, 0, 2);
        strip_.ask_row(4 * c + q, near);
      }
      if (__builtin_expect(C::usual(four, adjust), 1))
        each_constant<C::pairs>([&](auto j) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) multiply_add(c * C::pairs + j, q, C::template pair<j>(four[q], adjust[q]));
        });
      else
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          Bytes w[C::pairs];
          C::general(four[q], adjust[q], w);
#pragma GCC unroll 4
          for (int j = 0; j < C::pairs; ++j) multiply_add(c * C::pairs + j, q, w[j]);
        }
    }

#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      VF by_step[kSpan] = {acc[0][r], acc[1][r], acc[2][r], acc[3][r]};
      exchange_quarters(by_step);
      VF block;
#pragma GCC unroll 4
      for (int i = 0; i < (WHOLE ? kSpan : count); ++i) {
        block = i % C::scaled_steps == 0 ? by_step[i] : block + by_step[i];
        const int next = i + 1;
        if (next % C::scaled_steps != 0 && next != (WHOLE ? kSpan : count)) continue;
        sum[r] = fma(block, load<VF>(scales_.factor[strip_.block(first + i)]), sum[r]);
      }
    }
  }

  // By vector; past the last step what that one has.
  [[gnu::always_inline]] void adjust_of_span(int64_t first, int count, Bytes (&adjust)[4]) const {
    VF of_step[kSpan];
#pragma GCC unroll 4
    for (int i = 0; i < kSpan; ++i)
      of_step[i] = {_mm512_castsi512_ps(adjust_of<C>(scales_, strip_.block(first + (i < count ? i : count - 1))))};
    if (C::adjust == Adjust::blocks) exchange_quarters(of_step);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) adjust[q] = _mm512_castps_si512(of_step[q].v);
  }

  const char* x_;
  const Strip<C>& strip_;
  Scales scales_;
};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
