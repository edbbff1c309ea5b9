// The matmul kernel for bf16 weights as they are stored, row by row: the left operand of tile products.
#include "amx_gemm.h"

#if defined(POLYMOE_LEVEL_AMX)

#include "amx_product.h"
#include "streams.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// Row groups whose sums wait in memory while a block of weights passes over them all.
constexpr int64_t kGroups = 8;
constexpr int kMaxTiles = 2;  // of weights in a strip: with more rows side by side, too many streams come from memory

// Consecutive rows of W in tiles.
struct Strip {
  const char* row;
  int64_t stride;
  int tiles, rows;  // of each tile; fewer than kTileRows only in a strip of one tile

  int count() const { return tiles * rows; }
};

// Multiplies a strip into columns `column` of C on, while `next` rows from `next_row` on are asked for.
void multiply_strip(const Rows& rows, const Strip& strip, const char* next_row, int next, int64_t column,
                    Configured& configured) {
  const int64_t whole = rows.d / kStep;
  alignas(64) char tail[kMaxTiles * kTileRows * kLine];
  if (rows.d % kStep != 0)
    for (int r = 0; r < strip.count(); ++r) {
      __builtin_memset(tail + r * kLine, 0, size_t(kLine));
      __builtin_memcpy(tail + r * kLine, strip.row + r * strip.stride + whole * kLine,
                       size_t(rows.d % kStep) * sizeof(bf16));
    }
  Streams ahead(next_row, next, whole * kLine, strip.stride);
  Transposed sums[kGroups];
  const auto multiply = [&](int64_t group, const char* weights, int64_t stride, int64_t begin, int64_t steps,
                            auto&& meanwhile) {
    const Side left{{weights, weights + kTileRows * stride}, {stride, stride}, kLine};
    const Chain chain{begin == 0 ? From::zero : From::memory, true};
    multiply_left(rows, group, left, strip.tiles, strip.rows, begin, steps, chain, sums[group % kGroups], configured,
                  meanwhile);
  };
  for (int64_t from = 0; from < rows.groups.count; from += kGroups) {
    const int64_t to = from + kGroups < rows.groups.count ? from + kGroups : rows.groups.count;
    const int64_t block = to - from > 1 ? kBlockSteps : rows.steps();
    for (int64_t begin = 0; begin < whole; begin += block) {
      const int64_t steps = begin + block < whole ? block : whole - begin;
      for (int64_t group = from; group < to; ++group) {
        // Every group asks for its share of a line of each row.
        constexpr int64_t all = kMaxTiles * kTileRows / Streams::count;
        const int64_t asks = from == 0 ? all * (group + 1) / to - all * group / to : 0;
        const auto fetch = [&](int64_t) {
          for (int64_t i = 0; i < asks; ++i) ahead.ask();
        };
        multiply(group, strip.row + begin * kLine, strip.stride, begin, steps, EachStep{fetch});
      }
    }
    for (int64_t group = from; group < to; ++group) {
      if (rows.d % kStep != 0) multiply(group, tail, kLine, whole, 1, Nothing{});
      store_transposed(rows, group, strip.count(), sums[group - from], column);
    }
  }
}

// Rows [0, n) of a run of W; `after`: the row that will be read next, or null.
void multiply_rows(const Rows& rows, const char* w, int64_t stride, int64_t n, int64_t column, const char* after,
                   Configured& configured) {
  const auto strip_at = [&](int64_t row) {
    const int64_t tiles = (n - row) / kTileRows;
    if (tiles == 0) return Strip{w + row * stride, stride, 1, int(n - row)};
    return Strip{w + row * stride, stride, int(tiles < kMaxTiles ? tiles : kMaxTiles), kTileRows};
  };
  for (int64_t row = 0; row < n;) {
    const Strip strip = strip_at(row);
    const int64_t next = row + strip.count();
    if (next < n)
      multiply_strip(rows, strip, w + next * stride, strip_at(next).count(), column + row, configured);
    else
      multiply_strip(rows, strip, after, after ? strip.count() : 0, column + row, configured);
    row = next;
  }
}

void multiply_plain(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const Rows rows{a, RowGroups(m, kMaxRows), d, static_cast<float*>(c), ldc};
  if (trivial(rows, m, n)) return;
  Configured configured;
  const int64_t first = n < w.split ? n : w.split;
  multiply_rows(rows, w.first, w.stride, first, 0, first < n ? w.second : w.next, configured);
  if (first < n) multiply_rows(rows, w.second, w.stride, n - first, first, w.next, configured);
}

}  // namespace

const GemmKernel plain_bf16 = {kStep, sizeof(bf16), kMaxRows, 1, pack_right<InOrder>, multiply_plain, nullptr};

}  // namespace polymoe::POLYMOE_LEVEL
#endif
