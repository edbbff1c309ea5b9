// Quantised weights as the left operand of tile products. Codes are decoded to bf16, exactly, for all rows of A.
//
// Where a row has one scale, or its groups are taken relative to a base, a sum over the whole reduction is one chain,
// and is multiplied once. Where blocks have scales, what a block sums to is multiplied by its own and added to the
// total, which is one fused multiply-add:
//
//   total += scale[block] * sum over the block of x * code
#pragma once

#include "amx_gemm.h"
#include "amx_strip.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int64_t kGroupsTogether = 8;  // row groups whose totals wait while a span passes over them all

// The lanes of the sums of a tile, vector by vector: which row of W each belongs to. Where the second tile of A is a
// column short of the first, lanes between its rows are multiplied and added, too, and never read.
class RowsOfLanes {
 public:
  void become(int columns) {
    if (columns == columns_) return;
    columns_ = columns;
    for (int i = 0; i < columns * kTileRows; ++i) row_[i / kTileRows][i % kTileRows] = i / columns;
  }
  int vectors() const { return columns_; }
  // Of 16 factors of rows, those of vector i.
  VF spread(VF factors, int i) const { return {_mm512_permutexvar_ps(_mm512_load_si512(row_[i]), factors.v)}; }

 private:
  int columns_ = 0;
  alignas(64) int32_t row_[kTileRows][kTileRows];
};

// f(tile, first lane, factors of its lanes) for every vector of the sums.
template <class F>
[[gnu::always_inline]] inline void each_vector(const float* factor, const RowsOfLanes& lanes, int tiles, F&& f) {
  const auto run = [&](auto of_a) {
    for (int i = 0; i < kTiles; ++i) {
      const VF factors = load<VF>(factor + i * kTileRows);
      for (int v = 0; v < lanes.vectors(); ++v) {
        const VF spread = lanes.spread(factors, v);
        each<of_a.value>([&](auto j) { f(i * of_a.value + j.value, v * kTileRows, spread); });
      }
    }
  };
  tiles == 2 ? run(Index<2>{}) : run(Index<1>{});
}

template <class C>
struct Product {
  const Rows& rows;
  Spans<C>& spans;
  const bool alone;  // one row group in all
  Configured& configured;
  RowsOfLanes lanes[2];  // of row groups, which have one or the other number of rows
  Transposed sums[kGroupsTogether];

  Product(const Rows& rows, Spans<C>& spans, bool alone, Configured& configured)
      : rows(rows), spans(spans), alone(alone), configured(configured) {}

  int64_t begin(const Span& span) const { return span.pass * kGroupsTogether; }
  int64_t end(const Span& span) const {
    const int64_t end = begin(span) + kGroupsTogether;
    return end < rows.groups.count ? end : rows.groups.count;
  }
  Halves halves(int64_t group) const { return Halves(rows.groups.rows(group)); }

  // Steps [s, s + steps) of a span. Between products rows of the next one are decoded: with one row group as many in a
  // step as make the whole.
  void multiply(const Span& span, int64_t group, int64_t s, int64_t steps, Chain chain, Transposed& to) {
    const auto run = [&](auto apart) {
      multiply_left(rows, group, span.operand(s), kTiles, kTileRows, span.first + s, steps, chain, to, configured,
                    [&](int64_t, int part, int) {
                      if (part % apart.value == 0) spans.decode_some();
                    });
    };
    if (!alone)
      run(Index<4>{});
    else if (halves(group).tiles() == 2)
      run(Index<2>{});
    else
      run(Index<1>{});
  }

  // One chain over all spans, which stays in the tile registers where there is one row group.
  void add_span(const Span& span) {
    for (int64_t group = begin(span); group < end(span); ++group) {
      const From from = span.first == 0 ? From::zero : alone ? From::registers : From::memory;
      multiply(span, group, 0, span.steps, {from, !alone || span.last}, sums[group - begin(span)]);
    }
  }
  void scale(const Span& span, int64_t group) {
    Transposed& total = sums[group - begin(span)];
    each_vector(span.multiplier, fit(group), halves(group).tiles(), [&](int tile, int at, VF factors) {
      store(total.tile[tile] + at, load<VF>(total.tile[tile] + at) * factors);
    });
  }

  // Block by block.
  void add_blocks(const Span& span, int64_t block) {
    for (int64_t group = begin(span); group < end(span); ++group) {
      Transposed& total = sums[group - begin(span)];
      if (span.first == 0) __builtin_memset(&total, 0, sizeof total);
      const RowsOfLanes& of_group = fit(group);
      const int tiles = halves(group).tiles();
      Transposed part;
      for (int64_t s = 0, b = 0; s < span.steps; s += block, ++b) {
        const int64_t steps = span.steps - s < block ? span.steps - s : block;
        multiply(span, group, s, steps, {From::zero, true}, part);
        each_vector(span.factor[b], of_group, tiles, [&](int tile, int at, VF factors) {
          float* const to = total.tile[tile] + at;
          store(to, fma(load<VF>(part.tile[tile] + at), factors, load<VF>(to)));
        });
      }
    }
  }

 private:
  const RowsOfLanes& fit(int64_t group) {
    RowsOfLanes& of_group = lanes[rows.groups.rows(group) != rows.groups.rows(0)];
    of_group.become(halves(group).count[0]);
    return of_group;
  }
};

// Short spans leave more of the L1 cache to sums and to A, long ones load and store the sums of a chain less often.
inline int64_t span_steps(int64_t groups, int64_t block) { return block > 0 || groups <= 3 ? kTogether : kMaxSpan; }

// Not a part of its caller, where tiles are released: no cleanup for exceptions, which there are none of, is wanted.
template <class C>
[[gnu::nothrow, gnu::noinline]] void multiply_strips(const Rows& rows, const Weights& w, int64_t n,
                                                     Configured& configured) {
  const bool alone = rows.groups.count == 1;
  const int64_t block = block_steps<C>(w);
  const int64_t passes = (rows.groups.count + kGroupsTogether - 1) / kGroupsTogether;
  Spans<C> spans(w, n, rows.d, span_steps(rows.groups.count, block), passes);
  Product<C> product(rows, spans, alone, configured);
  for (const Span* span = spans.first(); span; span = spans.next()) {
    block == 0 ? product.add_span(*span) : product.add_blocks(*span, block);
    if (!span->last) continue;
    for (int64_t group = product.begin(*span); group < product.end(*span); ++group) {
      if (block == 0 && span->multiplier) product.scale(*span, group);
      store_transposed(rows, group, span->count, product.sums[group - product.begin(*span)], span->column);
    }
  }
}

template <class C>
void multiply_quantized(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const Rows rows{a, RowGroups(m, kMaxRows), d, static_cast<float*>(c), ldc};
  if (trivial(rows, m, n)) return;
  Configured configured;
  multiply_strips<C>(rows, w, n, configured);
}

inline int64_t no_workspace(int64_t) { return 0; }

// Of rows past the L2 cache a span comes from the next one for every strip: that costs less than decoding the strip
// once more for a second block of rows.
template <class C>
constexpr GemmKernel on_tiles() {
  GemmKernel kernel{
      kStep, sizeof(bf16), kMaxRows, 1, pack_right<typename TileCodes<C>::Order>, multiply_quantized<C>, no_workspace};
  kernel.slice = kMaxSpan * kStep;
  return kernel;
}

template <class C>
constexpr GemmKernel kOnTiles = on_tiles<C>();

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
