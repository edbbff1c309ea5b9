// The matmul kernels on AMX tiles, for the level that has them: for bf16, and for rows rounded to 8-bit integers.
#pragma once

#include "gemm_kernel.h"

namespace polymoe::amx {

extern const GemmKernel plain_bf16, packed_bf16, int8_bf16, int4_bf16, fp8_bf16, mxfp8_bf16, mxfp4_bf16;

// Rows of A in groups of 32 and of 128, which int8_gemm.cpp packs.
struct Piece;
// Columns [column, column + columns) of n, all of them with other kernels.
using MultiplyColumns = void (*)(const Piece* a, const RowGroups& groups, const Weights& w, int64_t column,
                                 int64_t columns, int64_t n, int64_t d, float* c, int64_t ldc);
struct Int8Tiles {
  // m rows of A; the workspace also has what `otherwise` needs, which takes columns that tiles cannot.
  void (*multiply)(const Piece* a, const RowGroups& groups, int64_t m, const Weights& w, int64_t n, int64_t d, float* c,
                   int64_t ldc, MultiplyColumns otherwise);
  int64_t (*workspace)(int64_t pieces);  // bytes
};
extern const Int8Tiles int8_tiles, int8_g128_tiles, mxfp4_g128_tiles, int4_g128_tiles;

}  // namespace polymoe::amx
