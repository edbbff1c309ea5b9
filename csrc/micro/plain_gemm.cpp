// The plain matmul microkernel: register tiles along the reduction over rows stored along the reduction, so that
// weights are streamed as nn.Linear lays them out, without a packed copy. A lane of an accumulator takes every
// step-th element; after a block the lanes are added in a fixed tree.
#include "../formats/plain.h"
#include "amx_gemm.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// Steps that a lane adds one after the other: few enough for accurate sums, and 4 KiB of a row of W, so that a tile's
// block of weights stays in the L1 cache while the rows of A, which are as long and may be wider, pass over it.
template <class F>
constexpr int64_t kBlockSteps = 4096 / (F::step * int64_t(sizeof(typename F::Stored)));

// Tile shapes that fill the registers: columns for a group of 1, 2, 3, ... rows. Widening a step of a column takes the
// place of multiply-adds, so columns are few where rows are many; but a row whose step is two vectors takes registers.
#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
template <class F>
constexpr int kMaxRows = sizeof(typename F::X) > sizeof(typename F::V) ? 4 : 6;
constexpr int kColumns[] = {8, 8, 8, 6, 5, 4};
#elif defined(POLYMOE_LEVEL_AVX2)
template <class F>
constexpr int kMaxRows = 4;
constexpr int kColumns[] = {8, 5, 4, 3};
#else
template <class F>
constexpr int kMaxRows = 2;
constexpr int kColumns[] = {2, 2};
#endif
constexpr int kMaxColumns = 8;

// Rows of W that the next tiles will read; asked for while this tile computes.
struct Prefetch {
  const char* row[kMaxColumns];
  int count;
};

// One block of the reduction: whole steps [begin, end), then `tail` elements more.
struct Steps {
  int64_t begin, end;
  int tail;
};

template <class F, int ROWS, int COLUMNS>
void tile(const char* a, const char* const* w, const Steps& steps, typename F::Sum* c, int64_t ldc,
          const Prefetch& next) {
  using V = typename F::V;
  constexpr int64_t x_bytes = F::step * sizeof(typename F::Packed);
  constexpr int64_t w_bytes = F::step * sizeof(typename F::Stored);
  V acc[(ROWS * COLUMNS + 3) / 4 * 4];
#pragma GCC unroll 32
  for (V& v : acc) v = set<V>(0);

  for (int64_t s = steps.begin; s < steps.end; ++s) {
    for (int i = 0; i < next.count; ++i) __builtin_prefetch(next.row[i] + s * w_bytes, 0, 2);
    typename F::X x[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) x[i] = F::load_x(a + (s * ROWS + i) * x_bytes);
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      const typename F::X wj = F::load_w(w[j] + s * w_bytes);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) acc[i * COLUMNS + j] = F::multiply_add(acc[i * COLUMNS + j], x[i], wj);
    }
  }
  if (steps.tail) {
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      char last[w_bytes] = {};
      __builtin_memcpy(last, w[j] + steps.end * w_bytes, size_t(steps.tail) * sizeof(typename F::Stored));
      const typename F::X wj = F::load_w(last);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i)
        acc[i * COLUMNS + j] =
            F::multiply_add(acc[i * COLUMNS + j], F::load_x(a + (steps.end * ROWS + i) * x_bytes), wj);
    }
  }

  typename F::Sum sums[(ROWS * COLUMNS + 3) / 4 * 4];
#pragma GCC unroll 8
  for (int q = 0; q < ROWS * COLUMNS; q += 4) sum4(sums + q, acc[q], acc[q + 1], acc[q + 2], acc[q + 3]);
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j) {
      typename F::Sum& out = c[i * ldc + j];
      out = steps.begin == 0 ? sums[i * COLUMNS + j] : out + sums[i * COLUMNS + j];
    }
}

template <class F>
using Tile = void (*)(const char*, const char* const*, const Steps&, typename F::Sum*, int64_t, const Prefetch&);

// Shapes past the level's tables are never asked for; they name a shape that exists anyway.
template <class F, int ROWS, int COLUMNS>
constexpr Tile<F> tile_or_1 = tile<F, ROWS, (COLUMNS <= kColumns[ROWS - 1] ? COLUMNS : 1)>;

template <class F, int ROWS = 1>
Tile<F> tile_of(int rows, int columns) {
  if constexpr (ROWS < kMaxRows<F>)
    if (rows > ROWS) return tile_of<F, ROWS + 1>(rows, columns);
  static constexpr Tile<F> tiles[kMaxColumns] = {tile_or_1<F, ROWS, 1>, tile_or_1<F, ROWS, 2>, tile_or_1<F, ROWS, 3>,
                                                 tile_or_1<F, ROWS, 4>, tile_or_1<F, ROWS, 5>, tile_or_1<F, ROWS, 6>,
                                                 tile_or_1<F, ROWS, 7>, tile_or_1<F, ROWS, 8>};
  return tiles[columns - 1];
}

const char* weight_row(const Weights& w, int64_t j) {
  return j < w.split ? w.first + j * w.stride : w.second + (j - w.split) * w.stride;
}

// The order in which blocks of W are taken, strips of rows by blocks of the reduction. A block along the reduction
// passes over all strips before the next one where the rows of A are many: their slice stays in the L2 cache.
struct Walk {
  int64_t strips, blocks;
  bool slices;

  int64_t count() const { return strips * blocks; }
  int64_t strip(int64_t i) const { return slices ? i % strips : i / blocks; }
  int64_t block(int64_t i) const { return slices ? i / strips : i % blocks; }
};

template <class F>
void multiply(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  constexpr int64_t w_bytes = F::step * int64_t(sizeof(typename F::Stored));
  const RowGroups groups(m, kMaxRows<F>);
  if (groups.count == 0 || n == 0) return;
  const int64_t all = (d + F::step - 1) / F::step;
  const int64_t row_bytes = all * F::step * int64_t(sizeof(typename F::Packed));
  const RowGroups strips(n, kColumns[groups.rows(0) - 1]);  // even, for the same reason as row groups are
  const int64_t blocks = all > kBlockSteps<F> ? (all + kBlockSteps<F> - 1) / kBlockSteps<F> : 1;
  const Walk walk{strips.count, blocks, groups.count > 1};
  for (int64_t i = 0; i < walk.count(); ++i) {
    const int64_t strip = walk.strip(i), j0 = strips.first_row(strip), begin = walk.block(i) * kBlockSteps<F>;
    const int columns = strips.rows(strip);
    const char* rows[kMaxColumns];
    for (int j = 0; j < columns; ++j) rows[j] = weight_row(w, j0 + j);
    // What these steps of the next strip's rows are fetched from: after the last strip the first one's next block, or
    // the next call's first.
    const bool last = strip + 1 == strips.count, final = walk.block(i) + 1 == blocks;
    const bool goes_on = walk.slices && !final;
    const auto row_ahead = [&](int64_t j) {
      if (!last) return weight_row(w, j0 + columns + j);
      return goes_on ? weight_row(w, j) + kBlockSteps<F> * w_bytes
                     : w.next + j * w.stride - (walk.slices ? begin * w_bytes : 0);
    };
    const int64_t ahead = !last ? strips.rows(strip + 1) : goes_on || w.next ? strips.rows(0) : 0;
    const Steps steps{begin, final ? d / F::step : begin + kBlockSteps<F>, final ? int(d % F::step) : 0};
    // Row groups inside, so that a block of these weights stays in the L1 cache for all of them.
    for (int64_t group = 0; group < groups.count; ++group) {
      Prefetch next{{}, 0};
      const int64_t stop = (group + 1) * ahead / groups.count;
      for (int64_t j = group * ahead / groups.count; j < stop; ++j) next.row[next.count++] = row_ahead(j);
      const int64_t first = groups.first_row(group);
      tile_of<F>(groups.rows(group), columns)(a + first * row_bytes, rows, steps,
                                              static_cast<typename F::Sum*>(c) + first * ldc + j0, ldc, next);
    }
  }
}

template <class F>
void pack_rows(const char* const* rows, int64_t count, int64_t d, char* out) {
  constexpr int64_t stored = F::step * sizeof(typename F::Stored), packed = F::step * sizeof(typename F::Packed);
  const int64_t whole = d / F::step;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t s = 0; s < whole; ++s) F::pack(rows[r] + s * stored, out + (s * count + r) * packed);
  if (d % F::step == 0) return;
  for (int64_t r = 0; r < count; ++r) {
    char last[stored] = {};
    __builtin_memcpy(last, rows[r] + whole * stored, size_t(d % F::step) * sizeof(typename F::Stored));
    F::pack(last, out + (whole * count + r) * packed);
  }
}

template <class F>
constexpr GemmKernel sliced() {
  GemmKernel kernel{F::step, sizeof(typename F::Packed), kMaxRows<F>, 1, pack_rows<F>, multiply<F>};
  kernel.slice = kBlockSteps<F> * F::step;
  return kernel;
}

template <class F>
constexpr GemmKernel kernel = sliced<F>();

}  // namespace

#if defined(POLYMOE_LEVEL_AMX)
constexpr const GemmKernel* kBf16 = &plain_bf16;
#else
constexpr const GemmKernel* kBf16 = &kernel<PlainBf16>;
#endif

extern const GemmTable plain_gemm_table;
const GemmTable plain_gemm_table = {{&kernel<PlainF32>, kBf16, &kernel<PlainF16>,
#if defined(POLYMOE_LEVEL_PORTABLE)
                                     &kernel<PlainF64>
#else
                                     nullptr
#endif
}};

}  // namespace polymoe::POLYMOE_LEVEL
