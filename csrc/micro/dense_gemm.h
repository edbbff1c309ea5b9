// The dense matmul of one ISA level: C[m, n] = sum over d of A[m, d] * W[n, d], both stored along the reduction.
//
// Every element of C is summed in one order that depends on the level, the dtype and the reduction length alone:
// each lane of a vector accumulator takes its elements in ascending order within a block of kBlockSteps steps, the
// lanes are added in a fixed tree, and the blocks are added in ascending order. How rows and columns are tiled never
// shows in the bits, so a token's result cannot depend on the tokens beside it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtype.h"

namespace polymoe {

// Rows of W in up to two runs of evenly spaced rows: the gate half and the up half of an expert.
struct WeightRows {
  const char* first;   // row 0
  const char* second;  // row `split`
  int64_t split;       // rows in the first run
  int64_t stride;      // bytes from a row to the next within a run
  const char* next;    // where the next call will begin, or null: fetched ahead while the last rows are used
};

struct DenseGemm {
  int step;         // elements of the reduction taken at a time; packed rows are padded with zeros to whole steps
  int packed_size;  // bytes of one packed element: bf16 stays bf16 where the level multiplies it, else it is widened
  int max_rows;     // rows of a register tile, and so of a row group

  // Packs elements [0, d) of one row of A, d > 0: step s goes to out + s * step_stride.
  void (*pack_row)(const char* row, int64_t d, char* out, int64_t step_stride);

  // c[i * ldc + j] for i < m, j < n: f32, or f64 for f64. `a` holds m rows packed in the groups of RowGroups.
  void (*multiply)(const char* a, int64_t m, const WeightRows& w, int64_t n, int64_t d, void* c, int64_t ldc);
};

// nullptr where the level has no kernel for the dtype (f64 above the portable level).
struct DenseGemmTable {
  const DenseGemm* by_dtype[kDtypes];
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
  [[gnu::always_inline]] int64_t group_of(int64_t row) const {
    const int64_t in_larger = larger * (size + 1);
    return row < in_larger ? row / (size + 1) : larger + (row - in_larger) / size;
  }
};

}  // namespace polymoe
