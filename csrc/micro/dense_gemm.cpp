// The dense matmul microkernel: register tiles along the reduction over rows stored along the reduction, so that
// weights are streamed as nn.Linear lays them out, without a packed copy.
#include "dense_gemm.h"

#include "../formats/dense.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// A lane adds at most this many partial products one after the other, which keeps f32 sums accurate.
constexpr int64_t kBlockSteps = 128;

// Tile shapes that fill the registers: columns for a group of 1, 2, 3, 4 rows.
#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
constexpr int kMaxRows = 4;
constexpr int kColumns[kMaxRows] = {8, 8, 8, 6};
#elif defined(POLYMOE_LEVEL_AVX2)
constexpr int kMaxRows = 3;
constexpr int kColumns[kMaxRows] = {6, 6, 4};
#else
constexpr int kMaxRows = 2;
constexpr int kColumns[kMaxRows] = {2, 2};
#endif
constexpr int kMaxColumns = 8;

// Rows of W that the next tiles will read; asked for while this tile computes.
struct Prefetch {
  const char* row[kMaxColumns];
  int count;
};

template <class F, int ROWS, int COLUMNS>
void tile(const char* a, const char* const* w, int64_t d, typename F::Sum* c, int64_t ldc, const Prefetch& next) {
  using V = typename F::V;
  constexpr int64_t x_bytes = F::step * sizeof(typename F::Packed);
  constexpr int64_t w_bytes = F::step * sizeof(typename F::Stored);
  const int64_t whole = d / F::step;
  const int tail = int(d % F::step);
  typename F::Sum sums[(ROWS * COLUMNS + 3) / 4 * 4];

  for (int64_t begin = 0; begin == 0 || begin < whole + (tail > 0); begin += kBlockSteps) {
    V acc[(ROWS * COLUMNS + 3) / 4 * 4];
#pragma GCC unroll 32
    for (V& v : acc) v = set<V>(0);

    const int64_t end = begin + kBlockSteps < whole ? begin + kBlockSteps : whole;
    for (int64_t s = begin; s < end; ++s) {
      for (int i = 0; i < next.count; ++i) __builtin_prefetch(next.row[i] + s * w_bytes, 0, 2);
      typename F::X x[ROWS];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) x[i] = F::load_x(a + (s * ROWS + i) * x_bytes);
#pragma GCC unroll 8
      for (int j = 0; j < COLUMNS; ++j) {
        const typename F::X wj = F::load_w(w[j] + s * w_bytes);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) acc[i * COLUMNS + j] = F::multiply_add(acc[i * COLUMNS + j], x[i], wj);
      }
    }
    if (tail && whole < begin + kBlockSteps) {
#pragma GCC unroll 8
      for (int j = 0; j < COLUMNS; ++j) {
        const typename F::X wj = F::load_w_tail(w[j] + whole * w_bytes, tail);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i)
          acc[i * COLUMNS + j] =
              F::multiply_add(acc[i * COLUMNS + j], F::load_x(a + (whole * ROWS + i) * x_bytes), wj);
      }
    }

#pragma GCC unroll 8
    for (int q = 0; q < ROWS * COLUMNS; q += 4) {
      typename F::Sum part[4];
      sum4(part, acc[q], acc[q + 1], acc[q + 2], acc[q + 3]);
      for (int i = 0; i < 4; ++i) sums[q + i] = begin == 0 ? part[i] : sums[q + i] + part[i];
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j) c[i * ldc + j] = sums[i * COLUMNS + j];
}

template <class F>
using Tile = void (*)(const char*, const char* const*, int64_t, typename F::Sum*, int64_t, const Prefetch&);

template <class F, int ROWS>
Tile<F> tile_of(int columns) {
  constexpr Tile<F> tiles[kMaxColumns] = {tile<F, ROWS, 1>,
                                          tile<F, ROWS, 2>,
#if defined(POLYMOE_LEVEL_PORTABLE)
  };
#else
                                          tile<F, ROWS, 3>,
                                          tile<F, ROWS, 4>,
                                          tile<F, ROWS, (kColumns[ROWS - 1] >= 5 ? 5 : 1)>,
                                          tile<F, ROWS, (kColumns[ROWS - 1] >= 6 ? 6 : 1)>,
                                          tile<F, ROWS, (kColumns[ROWS - 1] >= 7 ? 7 : 1)>,
                                          tile<F, ROWS, (kColumns[ROWS - 1] >= 8 ? 8 : 1)>};
#endif
  return tiles[columns - 1];
}

template <class F>
Tile<F> tile_of(int rows, int columns) {
  switch (rows) {
    case 1:
      return tile_of<F, 1>(columns);
    case 2:
      return tile_of<F, 2>(columns);
#if !defined(POLYMOE_LEVEL_PORTABLE)
    case 3:
      return tile_of<F, 3>(columns);
    default:
      return tile_of<F, kMaxRows>(columns);
#else
    default:
      return tile_of<F, 2>(columns);
#endif
  }
}

const char* weight_row(const WeightRows& w, int64_t j) {
  return j < w.split ? w.first + j * w.stride : w.second + (j - w.split) * w.stride;
}

template <class F>
void multiply(const char* a, int64_t m, const WeightRows& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const RowGroups groups(m, kMaxRows);
  if (groups.count == 0 || n == 0) return;
  const int64_t row_bytes = (d + F::step - 1) / F::step * F::step * int64_t(sizeof(typename F::Packed));
  const RowGroups strips(n, kColumns[groups.rows(0) - 1]);  // even, for the same reason as row groups are
  for (int64_t strip = 0; strip < strips.count; ++strip) {
    const int64_t j0 = strips.first_row(strip);
    const int columns = strips.rows(strip);
    const bool last = strip + 1 == strips.count;
    const int64_t ahead = !last ? strips.rows(strip + 1) : w.next ? strips.rows(0) : 0;
    const char* rows[kMaxColumns];
    for (int j = 0; j < columns; ++j) rows[j] = weight_row(w, j0 + j);
    for (int64_t group = 0; group < groups.count; ++group) {
      Prefetch next{{}, 0};
      const int64_t stop = (group + 1) * ahead / groups.count;
      for (int64_t j = group * ahead / groups.count; j < stop; ++j)
        next.row[next.count++] = last ? w.next + j * w.stride : weight_row(w, j0 + columns + j);
      const int64_t first = groups.first_row(group);
      tile_of<F>(groups.rows(group), columns)(a + first * row_bytes, rows, d,
                                              static_cast<typename F::Sum*>(c) + first * ldc + j0, ldc, next);
    }
  }
}

template <class F>
void pack_row(const char* row, int64_t d, char* out, int64_t step_stride) {
  constexpr int64_t stored = F::step * sizeof(typename F::Stored);
  const int64_t whole = d / F::step;
  for (int64_t s = 0; s < whole; ++s) F::pack(row + s * stored, out + s * step_stride);
  if (d % F::step) F::pack_tail(row + whole * stored, int(d % F::step), out + whole * step_stride);
}

template <class F>
constexpr DenseGemm kernel = {F::step, sizeof(typename F::Packed), kMaxRows, pack_row<F>, multiply<F>};

}  // namespace

extern const DenseGemmTable dense_gemm_table;
const DenseGemmTable dense_gemm_table = {{&kernel<DenseF32>, &kernel<DenseBf16>, &kernel<DenseF16>,
#if defined(POLYMOE_LEVEL_PORTABLE)
                                          &kernel<DenseF64>
#else
                                          nullptr
#endif
}};

}  // namespace polymoe::POLYMOE_LEVEL
