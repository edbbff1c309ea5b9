// The matmul of one ISA level for weights stored along their output columns: C[m, n] = sum over d of A[m, d] * W[d, n].
// Gradients need it: dX multiplies by the transpose of what the forward does, and dW is a sum over tokens.
//
// Vectors run along n, so an element of C is one lane and nothing is summed across lanes. It is summed in ascending
// order in blocks of fixed length, and the blocks are added in ascending order: like those of the other kernels, these
// bits depend on the level, the dtype and the reduction length alone, but they are not the same bits.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "gemm_kernel.h"

namespace polymoe {

// Where sums go that are neither added to nor biased: past the caches to rows `stride` bytes apart, in the type of the
// sums, or rounded to that of W. Rows are aligned to a cache line.
struct RowGemmOut {
  void* data;
  int64_t stride;
  bool rounded;
};

struct RowGemm {
  int max_rows;     // of a row group
  int width;        // a row of C has room for a multiple of this
  int step;         // elements of the reduction taken at a time; packed rows of A are padded with zeros to whole steps
  int packed_size;  // bytes that an element of A takes once packed

  // Packs elements [0, d) of `rows` rows, a row group, as step s of row r to place s * rows + r. Strides in bytes.
  void (*pack)(const char* a, int64_t row_stride, int64_t d_stride, int64_t rows, int64_t d, void* out);
  // The same for the kernel of the type of the sums, widened to it.
  void (*widen)(const char* a, int64_t row_stride, int64_t d_stride, int64_t rows, int64_t d, void* out);

  // c[i * ldc + j] for i < m, j < n, and anything in the rest of the last vector: f32, or f64 for f64. `a` holds the
  // groups of RowGroups one after the other. Row k of W begins at w + k * stride; stride in bytes. With `out.data` the
  // sums go there, and c is for what they come to after a part of the reduction; `n` is then a multiple of `width`.
  void (*multiply)(const void* a, int64_t m, const char* w, int64_t stride, int64_t n, int64_t d, void* c, int64_t ldc,
                   const RowGemmOut& out);
};

// nullptr where the level has no kernel for the dtype (f64 above the portable level).
struct RowGemmTable {
  const RowGemm* by_dtype[kDtypes];
};

}  // namespace polymoe
