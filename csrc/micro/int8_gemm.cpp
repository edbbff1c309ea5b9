// The matmul microkernel for the modes "int8" and "int8_g128": rows of A are rounded to 8-bit integers, every group of
// 32 or 128 with a scale, and multiplied with weights that are small integers times a scale: 2 * e2m1, int8, int4.
//
// One to three rows of A are left to int8_few_rows.h with AVX-512. Otherwise the lanes of a vector are columns, and
// four elements of the reduction lie side by side in each, as the dot product of bytes takes them. For few rows of A
// weights are brought into that form in registers, where they are used; for more, into a panel first, once for all
// rows. One factor of the dot product is unsigned, so a weight is the code plus `offset`, and the offset times the sum
// of A's integers is taken away again. Sums over a piece, 32 elements or 128 where all of them share a scale on both
// sides, are integers and therefore exact, in whatever order; then, in order,
//
//   part  += (sum - offset * sum of a) * scale of the weights     the pieces of a group
//   total += part * scale of a                                    the groups
//
// where a scale that whole rows of W share is left to the end. With AVX-512 sums over 128 are integers, too, where the
// weights' powers of two in a group are close together: codes of a panel are then multiplied by what they differ.
//
// With AMX more than a few rows are left to amx_int8_activations.cpp, which takes the same steps, where it gains.
#include "int8_columns.h"
#include "int8_few_rows.h"

#if defined(POLYMOE_LEVEL_AMX)
#include "amx_gemm.h"
#endif

namespace polymoe::POLYMOE_LEVEL {
namespace {

// How often Streams::ask has to be called during four pieces for as much as `rows` rows take: for the lines of one,
// since it asks for four of them or, with LINES, for four times as many.
template <class C, int LINES>
constexpr int asks_in_four(int rows) {
  return rows * int(Stored<C>::piece_bytes) / (64 * LINES);
}

// What all tiles of some columns share: what these are multiplied by, pieces [begin, end) of `pieces`; where their sums
// before lie, kColumns apart, if there are any; and where they go.
struct Task {
  const float *scale, *offset;
  int64_t pieces, begin, end;
  Streams* ahead;
  int asks;  // during four pieces
  const float* before;
  float* c;
  int64_t ldc, columns;

  int left(int v) const {  // columns of vector v
    const int64_t n = columns - v * kLanes;
    return n < 0 ? 0 : n < kLanes ? int(n) : kLanes;
  }
};

// The rows of a tile: in A, where `together` rows are packed as a group, and their sums; and which asks are theirs.
struct TileRows {
  const Piece* a;
  int64_t together;
  const float* before;
  float* c;
  int first_ask, last_ask;
};

// GROUP pieces of A share a scale, and SUMMED of them are summed in integers.
template <class Source, int ROWS, int GROUP, int SUMMED>
void tile(const TileRows& rows, const Source& w, const Task& task) {
  using C = typename Source::Codes;
  constexpr int kWide = Source::vectors, kSums = ROWS * kWide;
  constexpr int kChains = kSums == 1 ? 2 : 1;  // what a dot product takes until the next may add to it
  VF total[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kWide; ++v)
      total[i * kWide + v] = rows.before ? load<VF>(rows.before + i * kColumns + v * kLanes) : set<VF>(0);
  if (task.end == task.pieces)
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < kWide; ++v) __builtin_prefetch(rows.c + i * task.ldc + v * kLanes, 1, 3);
  const Piece* a = rows.a;
  for (int64_t g = task.begin; g < task.end; g += GROUP, a += rows.together * GROUP) {
    VF part[kSums];
#pragma GCC unroll 16
    for (VF& v : part) v = set<VF>(0);
    for (int p = 0; p < GROUP; p += SUMMED) {
      Bytes acc[kSums * kChains];
      constexpr int kOffsets = C::scales == ScaleKind::powers && SUMMED > 1 ? kFarFactor : 1;
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v)
          acc[i * kWide + v] = set_ints(kOffsets * (SUMMED == 1 ? a[i * GROUP + p].begin : a[i * GROUP].group_begin));
      if (kChains == 2) acc[kSums * kChains - 1] = set_ints(0);
      for (int q = p; q < p + SUMMED; ++q) {
        for (int i = rows.first_ask + int((g + q) & 3); i < rows.last_ask; i += 4) task.ahead->ask<Source::lines>();
        w.piece(
            g + q, [&](int four, int v, Bytes codes) __attribute__((always_inline)) {
#pragma GCC unroll 16
              for (int i = 0; i < ROWS; ++i) {
                int32_t x;
                __builtin_memcpy(&x, a[i * GROUP + q].code + four * 4, 4);
                Bytes& sum = acc[i * kWide + v + (kChains == 2 ? four % 2 : 0)];
                sum = dot(sum, codes, x);
              }
            });
      }
      keep_order();
      if (kChains == 2) acc[0] = add_ints(acc[0], acc[kSums * kChains - 1]);
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        const int64_t at = (v * task.pieces + g + p) * kLanes;
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
          VF exact = to_float(acc[i * kWide + v]);  // integers below 2^24, also with zero points
          if constexpr (C::scales == ScaleKind::blocks)
            if (task.offset) {
              const float sum = SUMMED == 1 ? a[i * GROUP + p].sum : a[i * GROUP].group_sum;
              exact = fma(load<VF>(task.offset + at), set<VF>(-sum), exact);
            }
          VF& sum = part[i * kWide + v];
          sum = p == 0 ? scaled<Source::scales>(exact, task.scale + at)
                       : add_scaled<Source::scales>(sum, exact, task.scale + at);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        VF& sum = total[i * kWide + v];
        sum = fma(part[i * kWide + v], set<VF>(a[i * GROUP].scale), sum);
      }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kWide; ++v) {
    VF factor = set<VF>(1);
    const bool last = C::scales == ScaleKind::rows && task.end == task.pieces;
    if (last) factor = load<VF>(task.scale + v * task.pieces * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      VF sum = total[i * kWide + v];
      if (last) sum = sum * factor;
      store_n(rows.c + i * task.ldc + v * kLanes, sum, task.left(v));
    }
  }
}

template <class Source>
using Tile = void (*)(const TileRows&, const Source&, const Task&);

template <class Source, int GROUP, int SUMMED, int ROWS = Source::template max_rows<GROUP>>
Tile<Source> tile_of(int rows) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return tile_of<Source, GROUP, SUMMED, ROWS - 1>(rows);
  return tile<Source, ROWS, GROUP, SUMMED>;
}

// Whether the elements of a group of A share a scale of the weights, too.
template <int GROUP>
bool sums_whole_groups(const Weights& w) {
  return w.matrix->scale_columns % (GROUP * kPiece) == 0;  // 0: whole rows share one
}

// All row groups of A with the columns of a source. `task` says the rest, but of the rows.
template <int GROUP, class Source>
void multiply_groups(const Piece* a, const RowGroups& groups, const Source& w, bool whole, const Task& task) {
  const int64_t m = groups.first_row(groups.count);
  const int64_t share = (int64_t(task.asks) << 32) / m + 1;  // of the asks, of a row, times 2^32
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t begin = groups.first_row(group), together = groups.rows(group);
    const Piece* const pieces = a + begin * task.pieces + task.begin * together;
    const RowGroups tiles(together, Source::template max_rows<GROUP>);
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t first = tiles.first_row(t), row = begin + first;
      const int count = tiles.rows(t);
      const TileRows rows{pieces + first * GROUP,
                          together,
                          task.before ? task.before + row * kColumns : nullptr,
                          task.c + row * task.ldc,
                          int(share * row >> 32),
                          int(share * (row + count) >> 32)};
      const auto run = whole ? tile_of<Source, GROUP, GROUP>(count) : tile_of<Source, GROUP, 1>(count);
      run(rows, w, task);
    }
  }
}

#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
// All of C for M rows of A, without a panel.
template <class C, int M, int GROUP, int SUMMED>
void multiply_rows(const Piece* a, const Weights& w, int64_t n, int64_t d, float* c, int64_t ldc) {
  const Space space(d, GROUP * kPiece);
  float* const scale = space.scale(w.workspace);
  float* const offset = w.matrix->zero ? space.offset(w.workspace) : nullptr;
  char* const dealt = space.panel(w.workspace);
  if constexpr (C::bits == 4) deal_out<M, GROUP>(a, space.pieces, dealt);
  for (int64_t j0 = 0; j0 < n; j0 += kLanes) {
    const int64_t columns = n - j0 < kLanes ? n - j0 : kLanes;
    const Stored<C> stored(w, j0, columns, d);
    Streams ahead = streams_ahead(w, j0 + kLanes, n, kLanes, d, C::bits);
    VF total[M];
    if constexpr (C::bits == 4) {
      stored.prepare(space.pieces, scale, offset);
      multiply_few_nibbles<M, C, GROUP, SUMMED>(a, dealt, stored.rows(), d, scale, offset, total, [&] { ahead.ask(); });
    } else {
      multiply_few<M, GROUP>(a, stored.rows(), d, stored.row_scales(), total, [&] { ahead.ask<GROUP == 1 ? 1 : 2>(); });
    }
    for (int i = 0; i < M; ++i) store_n(c + i * ldc + j0, total[i], int(columns));
  }
}

template <class C, int GROUP, int SUMMED>
void multiply_few_rows(const Piece* a, int64_t m, const Weights& w, int64_t n, int64_t d, float* c, int64_t ldc) {
  static constexpr decltype(&multiply_rows<C, 1, GROUP, SUMMED>) by_rows[] = {
      multiply_rows<C, 1, GROUP, SUMMED>, multiply_rows<C, 2, GROUP, SUMMED>, multiply_rows<C, 3, GROUP, SUMMED>};
  by_rows[m - 1](a, w, n, d, c, ldc);
}
#endif

// Columns [j0, j0 + columns) of n, at most kLanes, for any rows, without a panel.
template <class C, int GROUP>
void multiply_columns(const Piece* a, const RowGroups& groups, const Weights& w, int64_t j0, int64_t columns, int64_t n,
                      int64_t d, float* c, int64_t ldc) {
  const Space space(d, GROUP * kPiece);
  float* const scale = space.scale(w.workspace);
  float* const offset = w.matrix->zero ? space.offset(w.workspace) : nullptr;
  Streams ahead = streams_ahead(w, j0 + kLanes, n, kLanes, d, C::bits);
  const Stored<C> stored(w, j0, columns, d, space, 0);
  stored.prepare(space.pieces, scale, offset);
  Task task{};
  task.scale = scale, task.offset = offset, task.pieces = task.end = space.pieces;
  task.ahead = &ahead, task.asks = asks_in_four<C, Stored<C>::lines>(kLanes);
  task.c = c + j0, task.ldc = ldc, task.columns = columns;
  multiply_groups<GROUP>(a, groups, stored, sums_whole_groups<GROUP>(w), task);
}

// Whether it is written so that groups of A are summed in integers, whatever the scales of the weights.
template <int GROUP, class C>
bool write_panel(const Panel<C>& panel, const Stored<C> (&columns)[kVectors], int count, const Task& task,
                 [[maybe_unused]] float* scale) {
#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
  if constexpr (C::scales == ScaleKind::powers && GROUP == 4)
    if (panel.write_aligned(columns, count, task.end, scale, task.pieces)) return true;
#endif
  for (int v = 0; v < count; ++v) panel.write(columns[v], task.end, v);
  return false;
}

// The same for all columns, in panels.
template <class C, int GROUP>
void multiply_panels(const Piece* a, const RowGroups& groups, const Weights& w, int64_t n, int64_t d, float* c,
                     int64_t ldc) {
  const Space space(d, GROUP * kPiece);
  float* const scale = space.scale(w.workspace);
  float* const offset = w.matrix->zero ? space.offset(w.workspace) : nullptr;
  for (int64_t j0 = 0; j0 < n; j0 += kColumns) {
    const int64_t columns = n - j0 < kColumns ? n - j0 : kColumns;
    const int count = columns > kLanes ? 2 : 1;
    const int64_t second = j0 + (count - 1) * kLanes;
    const Stored<C> stored[kVectors] = {{w, j0, columns, d, space, 0}, {w, second, n - second, d, space, count - 1}};
    const int64_t next = stored[0].scales_ahead(w, j0 + kColumns, n);
    for (int v = 0; v < count; ++v) {
      const int64_t at = v * space.pieces * kLanes;
      stored[v].template prepare<Panel<C>::scales>(space.pieces, scale + at, offset ? offset + at : nullptr);
      stored[v].ask_scales(next);
    }
    Streams ahead = streams_ahead(w, j0 + kColumns, n, kColumns, d, C::bits);
    Task task{};
    task.scale = scale, task.offset = offset, task.pieces = space.pieces;
    task.ahead = &ahead, task.asks = asks_in_four<C, Panel<C>::lines>(kColumns);
    do {
      const int64_t left = space.pieces - task.begin;
      task.end = task.begin + (left < kPanelPieces ? left : kPanelPieces);
      const bool last = task.end == space.pieces;
      task.c = last ? c + j0 : space.sums(w.workspace);
      task.ldc = last ? ldc : kColumns, task.columns = last ? columns : kColumns;
      const Panel<C> panel{space.panel(w.workspace), task.begin};
      const bool whole = write_panel<GROUP>(panel, stored, count, task, scale) || sums_whole_groups<GROUP>(w);
      multiply_groups<GROUP>(a, groups, panel, whole, task);
      task.before = space.sums(w.workspace), task.begin = task.end;
    } while (task.begin < space.pieces);
  }
}

#if defined(POLYMOE_LEVEL_AMX)
// What many rows are left to.
template <class C, int GROUP>
constexpr bool kHasTiles = GROUP == 4 || C::bits == 8;
template <class C, int GROUP>
constexpr const Int8Tiles* kTiles = nullptr;
template <>
constexpr const Int8Tiles* kTiles<Int8Codes, 1> = &int8_tiles;
template <>
constexpr const Int8Tiles* kTiles<Int8Codes, 4> = &int8_g128_tiles;
template <>
constexpr const Int8Tiles* kTiles<E2m1Codes, 4> = &mxfp4_g128_tiles;
template <>
constexpr const Int8Tiles* kTiles<Int4Codes, 4> = &int4_g128_tiles;

// Sums over 32 elements leave the tiles so often that the panel, once written, serves many rows better.
template <class C, int GROUP>
bool tiles_serve(const Weights& w, int64_t m, int64_t d) {
  if (C::bits == 8) return w.matrix->scale_columns == 0 && (GROUP > 1 || m <= 16);
  return d % (GROUP * kPiece) == 0 && (C::scales == ScaleKind::powers || sums_whole_groups<GROUP>(w));
}
#endif

template <class C, int GROUP>
void multiply(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* out, int64_t ldc) {
  const RowGroups groups(m, kRows<C, GROUP>);
  if (groups.count == 0) return;
  const Piece* const rows = reinterpret_cast<const Piece*>(a);
  float* const c = static_cast<float*>(out);
#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
  if (m <= kFewRows && (C::bits == 4 || w.matrix->scale_columns == 0)) {
    const auto few = sums_whole_groups<GROUP>(w) ? multiply_few_rows<C, GROUP, GROUP> : multiply_few_rows<C, GROUP, 1>;
    return few(rows, m, w, n, d, c, ldc);
  }
#endif
  if (decodes_once(m, kStoredRows<C, GROUP>)) {
#if defined(POLYMOE_LEVEL_AMX)
    if constexpr (kHasTiles<C, GROUP>)
      if (tiles_serve<C, GROUP>(w, m, d))
        return kTiles<C, GROUP>->multiply(rows, groups, m, w, n, d, c, ldc, multiply_columns<C, GROUP>);
#endif
    return multiply_panels<C, GROUP>(rows, groups, w, n, d, c, ldc);
  }
  for (int64_t j0 = 0; j0 < n; j0 += kLanes)
    multiply_columns<C, GROUP>(rows, groups, w, j0, n - j0 < kLanes ? n - j0 : kLanes, n, d, c, ldc);
}

template <class C, int GROUP>
int64_t workspace(int64_t d) {
  const Space space(d, GROUP * kPiece);
#if defined(POLYMOE_LEVEL_AMX)
  if constexpr (kHasTiles<C, GROUP>) return space.bytes() + kTiles<C, GROUP>->workspace(space.pieces);
#endif
  return space.bytes();
}

template <class C, int GROUP, class T>
constexpr GemmKernel kernel = {GROUP * kPiece,         sizeof(Piece) / kPiece, kRows<C, GROUP>,    1,
                               pack_rows<C, GROUP, T>, multiply<C, GROUP>,     workspace<C, GROUP>};

template <class C, int GROUP>
constexpr GemmTable table = {{&kernel<C, GROUP, float>, &kernel<C, GROUP, bf16>, &kernel<C, GROUP, f16>, nullptr}};

}  // namespace

extern const GemmTable mxfp4_by_int8_gemm_table, int8_by_int8_gemm_table, int4_by_int8_gemm_table;
const GemmTable mxfp4_by_int8_gemm_table = table<E2m1Codes, 1>;
const GemmTable int8_by_int8_gemm_table = table<Int8Codes, 1>;
const GemmTable int4_by_int8_gemm_table = table<Int4Codes, 1>;

extern const GemmTable mxfp4_by_int8_g128_gemm_table, int8_by_int8_g128_gemm_table, int4_by_int8_g128_gemm_table;
const GemmTable mxfp4_by_int8_g128_gemm_table = table<E2m1Codes, 4>;
const GemmTable int8_by_int8_g128_gemm_table = table<Int8Codes, 4>;
const GemmTable int4_by_int8_g128_gemm_table = table<Int4Codes, 4>;

}  // namespace polymoe::POLYMOE_LEVEL
