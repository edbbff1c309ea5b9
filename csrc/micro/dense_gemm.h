// The dense matmul of one ISA level: C[m, n] = sum over d of A[m, d] * W[n, d], both stored along the reduction.
//
// Every element of C is summed in one order that depends on the level, the dtype and the reduction length alone:
// lane l of a vector accumulator takes the elements of its lane in ascending order within a block of kBlockSteps
// steps, the lanes are added in a fixed tree, and the blocks are added in ascending order. How rows and columns are
// tiled never shows in the bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtype.h"

namespace polymoe {

// Rows of W, n of them, in up to two runs of evenly spaced rows: the gate half and the up half of an expert.
struct WeightRows {
  const char* first;        // row 0
  const char* second;       // row `split`
  int64_t split;            // rows in the first run
  int64_t stride;           // bytes from a row to the next within a run
};

struct DenseGemm {
  int step;          // elements of the reduction in one step; packed rows are padded with zeros to whole steps
  int packed_size;   // bytes of one packed element: bf16 stays bf16 where the level multiplies it, else f32
  int max_rows;      // rows in a packed group, at most

  // Packs elements [0, d) of `rows` (<= max_rows) rows into out, interleaved by step: [step][row][element].
  // `row[i]` points at the first element of row i; elements are contiguous.
  void (*pack)(const char* const* row, int rows, int64_t d, char* out);

  // c[i * ldc + j] = sum over d of a[i, d] * w[j, d] for the rows of one packed group and columns [0, n).
  // While it works, it asks for `prefetch_rows` rows of W from `prefetch` on, where the next call will begin.
  void (*multiply)(const char* a, int rows, const WeightRows& w, int64_t begin, int64_t n, int64_t d, void* c, int64_t ldc,
                   bool prefetch);
};

// nullptr where the level has no kernel for the dtype (f64 above the portable level).
struct DenseGemmTable {
  const DenseGemm* by_dtype[kDtypes];
};

}  // namespace polymoe
