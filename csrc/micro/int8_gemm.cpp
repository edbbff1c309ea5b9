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
// With AMX more than a few rows are left to amx_int8_activations.cpp, which takes the same steps, where it gains.
#include "bytes.h"
#include "even_rows.h"
#include "int8_few_rows.h"
#include "int8_piece.h"
#include "quantized_ahead.h"

#if defined(POLYMOE_LEVEL_AMX)
#include "amx_gemm.h"
#endif

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kFours = kPiece / 4;  // vectors of a piece, for every vector of columns
constexpr int kVectors = 2;         // of columns in a panel
constexpr int kLanes = VF::width, kColumns = kVectors * kLanes;

#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
constexpr int kPanelRows = 6;
#else
constexpr int kPanelRows = 2;
#endif

// --- weights: from lanes of four bytes to unsigned bytes, each the code plus `offset` --------------------------------

struct E2m1Codes {                        // twice the value
  static constexpr bool by_piece = true;  // scales
  static constexpr int bits = 4, offset = 12;
  static constexpr float unit = 0.5f;
  static Bytes of_nibbles(Bytes x) {
#if defined(POLYMOE_LEVEL_PORTABLE)
    constexpr uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    for (uint32_t& v : x.v)
      v = table[v & 15] | uint32_t(table[v >> 8 & 15]) << 8 | uint32_t(table[v >> 16 & 15]) << 16 |
          uint32_t(table[v >> 24 & 15]) << 24;
    return x;
#else
    return look_up(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0), x);
#endif
  }
};
struct Int8Codes {
  static constexpr bool by_piece = false;
  static constexpr int bits = 8, offset = 128;
  static constexpr float unit = 1;
};
struct Int4Codes {
  static constexpr bool by_piece = false;     // but in groups of 32 and 64
  static constexpr int bits = 4, offset = 8;  // which is the zero point where no other is given
  static constexpr float unit = 1;
  static Bytes of_nibbles(Bytes x) { return x; }
};

// Rows of A in a tile with a vector of columns: more than with a panel where what they save of decoding is more than
// what sums lose that leave the registers.
#if defined(POLYMOE_LEVEL_AVX512_BF16) && !defined(POLYMOE_LEVEL_AMX)
template <class C, int GROUP>
constexpr int kStoredRows = C::bits == 4 || GROUP > 1 ? 10 : 8;
#else
template <class C, int GROUP>
constexpr int kStoredRows = kPanelRows;
#endif

// Rows of a row group: a tile with a vector of columns, or as many with a panel as that takes.
template <class C, int GROUP>
constexpr int kRows = kStoredRows<C, GROUP> > kPanelRows ? 2 * kPanelRows : kPanelRows;

// Places in the workspace for kColumns columns of d elements, padded to whole groups of A.
struct Space {
  int64_t pieces;
  Space(int64_t d, int64_t group) : pieces((d + group - 1) / group * group / kPiece) {}
  int64_t bytes() const { return pieces * (kColumns * (kPiece + 2 * 4) + kLanes * kPiece); }
  char* panel(char* base) const { return base; }
  char* copy(char* base) const { return base + pieces * kColumns * kPiece; }  // of kLanes rows of W
  float* scale(char* base) const { return reinterpret_cast<float*>(copy(base) + pieces * kLanes * kPiece); }
  float* offset(char* base) const { return scale(base) + pieces * kColumns; }
};

// A vector of columns, as they are stored; those past `count` repeat the last one.
template <class C>
class Stored {
 public:
  static constexpr int vectors = 1, lines = C::bits == 8 ? 2 : 1;  // lines: Streams::ask
  template <int GROUP>
  static constexpr int max_rows = kStoredRows<C, GROUP>;
  static constexpr int64_t piece_bytes = kPiece * C::bits / 8;

  Stored(const Weights& w, int64_t column, int64_t count, int64_t d) : used_((d + kPiece - 1) / kPiece) {
    const QuantizedMatrix& m = *w.matrix;
    share_ = m.scale_columns ? m.scale_columns / kPiece : used_;
    for (int r = 0; r < kLanes; ++r) {
      const MatrixRow row(m, matrix_row(w, column + (r < count ? r : count - 1)));
      row_[r] = row.data;
      scale_[r] = row.scale;
      zero_[r] = row.zero;
    }
  }
  // For `piece`, which takes rows evenly apart and whole groups of A; others are copied.
  Stored(const Weights& w, int64_t column, int64_t count, int64_t d, const Space& space) : Stored(w, column, count, d) {
    rows_ = even_rows(w, column, count, row_, kLanes, (d * C::bits + 7) / 8, space.pieces * piece_bytes,
                      space.copy(w.workspace));
  }
  Stored(const Stored&) = delete;

  // f(i, 0, codes): the four elements i of kFours.
  template <class F>
  [[gnu::always_inline]] void piece(int64_t p, F&& f) const {
    Bytes v[piece_bytes / 4];
    load_lanes(rows_.from + p * piece_bytes, rows_.stride, v);
#pragma GCC unroll 8
    for (int i = 0; i < int(piece_bytes / 4); ++i) {
      if constexpr (C::bits == 8) {
        f(i, 0, flip_sign(v[i]));
      } else {
        f(2 * i, 0, C::of_nibbles(low_nibbles(v[i])));
        f(2 * i + 1, 0, C::of_nibbles(high_nibbles(v[i])));
      }
    }
  }

  const char* const* rows() const { return row_; }
  // The scales of rows that have but one.
  VF row_scales() const {
    float scale[kLanes];
    for (int r = 0; r < kLanes; ++r) __builtin_memcpy(scale + r, scale_[r], sizeof(float));
    return load<VF>(scale);
  }

  // Scales by piece, zero where it is all padding; and, where there are zero points, what they are above C::offset.
  void prepare(int64_t pieces, float* scale, float* offset) const {
    if constexpr (C::by_piece)
      prepare_e8m0(scale);
    else
      set_lanes(scale, [&](int r, int64_t entry) {
        float value;
        __builtin_memcpy(&value, scale_[r] + entry * 4, 4);
        return value * C::unit;
      });
    if (offset)
      set_lanes(offset, [&](int r, int64_t entry) { return float(int(uint8_t(zero_[r][entry])) - C::offset); });
    for (int64_t p = used_; p < pieces; ++p) {
      store(scale + p * kLanes, set<VF>(0));
      if (offset) store(offset + p * kLanes, set<VF>(0));
    }
  }

 private:
  template <class F>
  void set_lanes(float* to, F&& value) const {
    for (int64_t p = 0, entry = 0; p < used_; p += share_, ++entry) {
      for (int r = 0; r < kLanes; ++r) to[p * kLanes + r] = value(r, entry);
      const VF lanes = load<VF>(to + p * kLanes);
      for (int64_t q = p + 1; q < p + share_ && q < used_; ++q) store(to + q * kLanes, lanes);
    }
  }

  void prepare_e8m0(float* scale) const {
    constexpr int64_t kTogether = 16;
    for (int64_t p = 0; p < used_; p += kTogether) {
      const int64_t count = used_ - p < kTogether ? used_ - p : kTogether;
      Bytes codes[4];
      if (count == kTogether) {
        load_lanes(scale_, p, codes);
      } else {
        char last[kLanes][kTogether] = {};
        const char* row[kLanes];
        for (int r = 0; r < kLanes; ++r)
          row[r] = static_cast<char*>(__builtin_memcpy(last[r], scale_[r] + p, size_t(count)));
        load_lanes(row, 0, codes);
      }
#pragma GCC unroll 16
      for (int i = 0; i < int(kTogether); ++i) {
        if (i >= count) break;
        store(scale + (p + i) * kLanes, e8m0_of_byte(codes[i / 4], i % 4) * set<VF>(C::unit));
      }
    }
  }

  int64_t used_;   // pieces
  int64_t share_;  // pieces that have one scale
  const char *row_[kLanes], *scale_[kLanes], *zero_[kLanes];
  EvenRows rows_;  // for `piece`
};

// The same in a panel, all columns of it.
struct Panel {
  static constexpr int vectors = kVectors, lines = 1;
  template <int GROUP>
  static constexpr int max_rows = kPanelRows;
  const char* data;

  template <class C>
  static void write(const Stored<C>& columns, int64_t pieces, char* out) {
    for (int64_t p = 0; p < pieces; ++p)
      columns.piece(p, [&](int i, int, Bytes codes) { store_bytes(out + (p * kFours + i) * kColumns * 4, codes); });
  }

  template <class F>
  [[gnu::always_inline]] void piece(int64_t p, F&& f) const {
    const char* const at = data + p * kFours * kColumns * 4;
#pragma GCC unroll 8
    for (int i = 0; i < kFours; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) f(i, v, load_bytes(at + (i * kVectors + v) * kLanes * 4));
  }
};

// --- the product -----------------------------------------------------------------------------------------------------

// How often Streams::ask has to be called during four pieces for as much as `rows` rows take: for the lines of one,
// since it asks for four of them or, with LINES, for four times as many.
template <class C, int LINES>
constexpr int asks_in_four(int rows) {
  return rows * int(Stored<C>::piece_bytes) / (64 * LINES);
}

// What the columns of a tile are multiplied by, and where the sums go.
struct Task {
  const float *scale, *offset;
  int64_t pieces;
  Streams* ahead;
  int first, last;  // of what is asked for during four pieces
  float* c;
  int64_t ldc, columns;
  int64_t together = 0;  // rows of A that are packed together

  int left(int v) const {  // columns of vector v
    const int64_t n = columns - v * kLanes;
    return n < 0 ? 0 : n < kLanes ? int(n) : kLanes;
  }
};

// GROUP pieces of A share a scale, and SUMMED of them are summed in integers.
template <class Source, int ROWS, int GROUP, int SUMMED>
void tile(const Piece* a, const Source& w, const Task& task) {
  constexpr int kWide = Source::vectors, kSums = ROWS * kWide;
  constexpr int kChains = kSums == 1 ? 2 : 1;  // what a dot product takes until the next may add to it
  VF total[kSums];
#pragma GCC unroll 16
  for (VF& v : total) v = set<VF>(0);
  for (int64_t g = 0; g < task.pieces; g += GROUP, a += task.together * GROUP) {
    VF part[kSums];
#pragma GCC unroll 16
    for (VF& v : part) v = set<VF>(0);
    for (int p = 0; p < GROUP; p += SUMMED) {
      Bytes acc[kSums * kChains];
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v)
          acc[i * kWide + v] = set_ints(SUMMED == 1 ? a[i * GROUP + p].begin : a[i * GROUP].group_begin);
      if (kChains == 2) acc[kSums * kChains - 1] = set_ints(0);
      for (int q = p; q < p + SUMMED; ++q) {
        for (int i = task.first + int((g + q) & 3); i < task.last; i += 4) task.ahead->ask<Source::lines>();
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
      if (kChains == 2) acc[0] = add_ints(acc[0], acc[kSums * kChains - 1]);
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        const int64_t at = (v * task.pieces + g + p) * kLanes;
        const VF scales = load<VF>(task.scale + at);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
          VF exact = to_float(acc[i * kWide + v]);  // integers below 2^24, also with zero points
          if (task.offset) {
            const float sum = SUMMED == 1 ? a[i * GROUP + p].sum : a[i * GROUP].group_sum;
            exact = fma(load<VF>(task.offset + at), set<VF>(-sum), exact);
          }
          VF& sum = part[i * kWide + v];
          sum = fma(exact, scales, sum);
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
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < kWide; ++v) store_n(task.c + i * task.ldc + v * kLanes, total[i * kWide + v], task.left(v));
}

template <class Source>
using Tile = void (*)(const Piece*, const Source&, const Task&);

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
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t begin = groups.first_row(group);
    Task part = task;
    part.together = groups.rows(group);
    const Piece* const rows = a + begin * task.pieces;
    const RowGroups tiles(part.together, Source::template max_rows<GROUP>);
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t first = tiles.first_row(t);
      const int count = tiles.rows(t);
      part.first = int(task.last * (begin + first) / m);
      part.last = int(task.last * (begin + first + count) / m);
      part.c = task.c + (begin + first) * task.ldc;
      const auto run = whole ? tile_of<Source, GROUP, GROUP>(count) : tile_of<Source, GROUP, 1>(count);
      run(rows + first * GROUP, w, part);
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
  const Stored<C> stored(w, j0, columns, d, space);
  stored.prepare(space.pieces, scale, offset);
  const Task task{scale,  offset, space.pieces, &ahead, 0, asks_in_four<C, Stored<C>::lines>(kLanes),
                  c + j0, ldc,    columns};
  multiply_groups<GROUP>(a, groups, stored, sums_whole_groups<GROUP>(w), task);
}

// The same for all columns, in panels.
template <class C, int GROUP>
void multiply_panels(const Piece* a, const RowGroups& groups, const Weights& w, int64_t n, int64_t d, float* c,
                     int64_t ldc) {
  const Space space(d, GROUP * kPiece);
  char* const panel = space.panel(w.workspace);
  float* const scale = space.scale(w.workspace);
  float* const offset = w.matrix->zero ? space.offset(w.workspace) : nullptr;
  for (int64_t j0 = 0; j0 < n; j0 += kColumns) {
    const int64_t columns = n - j0 < kColumns ? n - j0 : kColumns;
    Streams ahead = streams_ahead(w, j0 + kColumns, n, kColumns, d, C::bits);
    for (int v = 0; v < kVectors && v * kLanes < columns; ++v) {
      const int64_t at = v * space.pieces * kLanes;
      const Stored<C> stored(w, j0 + v * kLanes, columns - v * kLanes, d, space);
      stored.prepare(space.pieces, scale + at, offset ? offset + at : nullptr);
      Panel::write(stored, space.pieces, panel + v * kLanes * 4);
    }
    const Task task{scale,  offset, space.pieces, &ahead, 0, asks_in_four<C, Panel::lines>(kColumns),
                    c + j0, ldc,    columns};
    multiply_groups<GROUP>(a, groups, Panel{panel}, sums_whole_groups<GROUP>(w), task);
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
  return d % (GROUP * kPiece) == 0 && (C::by_piece || sums_whole_groups<GROUP>(w));
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
