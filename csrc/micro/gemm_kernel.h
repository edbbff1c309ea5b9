// The matmul kernels of one ISA level: C[m, n] = sum over d of A[m, d] * W[n, d]. A kernel serves one dtype and one
// format of the weights W; rows of A are packed for it first.
//
// Every element of C is summed in one order that depends on the level, the dtype, the format and the reduction length
// alone: blocks of fixed length along the reduction, each from fresh accumulators, added in ascending order. How rows
// and columns are tiled never shows in the bits, so a token's result cannot depend on the tokens beside it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtype.h"

namespace polymoe {

// plain: rows along the reduction, as nn.Linear stores them. packed: panels of kPanel columns (rows of W). Then the
// families of quantised formats, rows along the reduction too; last those whose kernels round A to 8-bit integers, in
// groups of 32 or 128.
enum class WeightFormat : int {
  plain,
  packed,
  fp8,
  mxfp8,
  mxfp4,
  int8,
  int4,
  mxfp4_by_int8,
  int8_by_int8,
  int4_by_int8,
  mxfp4_by_int8_g128,
  int8_by_int8_g128,
  int4_by_int8_g128
};
constexpr int kWeightFormats = 13;

constexpr bool rounds_to_int8(WeightFormat format) { return format >= WeightFormat::mxfp4_by_int8; }

// A packed matrix [N, D] is N / kPanel panels and one of the N % kPanel columns left, all without padding. In a panel
// of c columns step s of the reduction is c * step elements: column by column, `step` elements each. Where D is no
// multiple of the step, the last element of each of the c columns follows.
constexpr int64_t kPanel = 32;

// GemmKernel::slice of packed weights.
constexpr int64_t kSlice = 512;

// A quantised matrix [N, D]: strides in bytes from a row to the next.
struct QuantizedMatrix {
  const char *data, *scale, *zero;  // zero: null where there are no zero points
  int64_t data_stride, scale_stride, zero_stride;
  int64_t scale_rows, scale_columns;  // elements that share a scale: down, and along the reduction; 0: the whole row
  bool exponents;                     // scales are e8m0; else f32
};

// Rows of A that are multiplied together.
constexpr int64_t kMostRows = 256;

// Whether a quantised weight is decoded once for all rows of A, into a panel that the caches hold, or again for every
// register tile of them. The bits of the result are the same.
[[gnu::always_inline]] inline bool decodes_once(int64_t rows, int64_t max_rows) { return rows > max_rows; }

// Columns of C, that is rows of W, in up to two runs: the gate half and the up half of an expert.
struct Weights {
  const char* first;   // row 0; of packed weights, a panel
  const char* second;  // row `split`
  int64_t split;       // rows in the first run
  int64_t stride;      // plain: bytes from a row to the next within a run
  int64_t left;        // packed: rows from the begin of either run to the end of its matrix
  const char* next;    // where the next call will begin, or null: fetched ahead while the last rows are used

  // Of quantised weights: the matrix, its rows at which the two runs begin and how far apart their rows are, and memory
  // for GemmKernel::workspace bytes.
  const QuantizedMatrix* matrix = nullptr;
  int64_t first_row = 0, second_row = 0, row_step = 1;
  char* workspace = nullptr;
};

// Takes a row group's sums: its first row and how many there are.
struct GroupSink {
  void (*take)(void* context, int64_t first, int64_t rows);
  void* context;
};

struct GemmKernel {
  int step;         // elements of the reduction taken at a time; packed rows of A are padded with zeros to whole steps
  int packed_size;  // bytes that an element of A takes once packed
  int max_rows;     // rows of a register tile, and so of a row group
  int columns;      // a run of W must begin at a multiple of it: kPanel for packed weights

  // Packs elements [0, d) of `count` <= max_rows rows of A, d > 0, as one row group: step s of row r goes to
  // out + (s * count + r) * step * packed_size.
  void (*pack_rows)(const char* const* rows, int64_t count, int64_t d, char* out);

  // c[i * ldc + j] for i < m, j < n: f32, or f64 for f64. `a` holds m rows packed in the groups of RowGroups, of
  // quantised weights kMostRows at most.
  void (*multiply)(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc);

  // Bytes of Weights::workspace for rows of `d` elements; null for weights that are not quantised.
  int64_t (*workspace)(int64_t d) = nullptr;

  // Copies W[n, d] of which the `n` rows lie side by side, `stride` bytes from an element to the next along d, to the
  // layout that the kernel multiplies with, with zeros up to whole steps of the reduction. Null where such weights are
  // better multiplied as they lie.
  void (*pack_columns)(const char* w, int64_t stride, int64_t n, int64_t d, char* out) = nullptr;

  // Both in one, a block at a time that is used while the caches hold it, for a long reduction. `workspace` has room
  // for column_workspace(d) bytes, 64-byte aligned.
  void (*multiply_columns)(const char* a, int64_t m, const char* w, int64_t stride, int64_t n, int64_t d,
                           char* workspace, void* c, int64_t ldc) = nullptr;
  int64_t (*column_workspace)(int64_t d) = nullptr;

  // Elements [begin, begin + count) of row n of a quantised matrix as f32, code times scale; `begin` is a multiple of
  // 32. Null for other weights, and where A is rounded.
  void (*decode)(const QuantizedMatrix& m, int64_t n, int64_t begin, int64_t count, float* out) = nullptr;

  // Elements of the reduction, at most, that `multiply` takes through all of a call's rows at a time, and whose part of
  // A the caches should hold; 0: it takes whole rows.
  int64_t slice = 0;

  // Multiplies a copy by pack_columns, whose `d` is whole steps, with one row group after the other. The sums of each
  // replace those of the group before; `sink` takes them.
  void (*multiply_groups)(const char* a, int64_t m, const char* w, int64_t n, int64_t d, float* sums, int64_t lds,
                          const GroupSink& sink) = nullptr;
};

// nullptr where the level has no kernel for the dtype (f64 above the portable level).
struct GemmTable {
  const GemmKernel* by_dtype[kDtypes];
};

// m rows in as few groups of at most `max_rows` as possible, as even as possible: 5 rows are 3 + 2, not 4 + 1.
// A group holds its rows interleaved by step, and the groups lie one after the other.
//
// Always inlined: sources of every ISA level share this, and the linker must have no copy to choose.
struct RowGroups {
  int64_t count, size, larger;  // `larger` groups of size + 1 come first

  [[gnu::always_inline]] RowGroups(int64_t m, int64_t max_rows)
      : count((m + max_rows - 1) / max_rows), size(count ? m / count : 0), larger(count ? m % count : 0) {}

  [[gnu::always_inline]] int64_t first_row(int64_t group) const {
    return group * size + (group < larger ? group : larger);
  }
  [[gnu::always_inline]] int rows(int64_t group) const { return int(size + (group < larger)); }
};

}  // namespace polymoe
