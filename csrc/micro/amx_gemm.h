// The matmul kernels on AMX tiles, for the level that has them: for bf16, and for rows rounded to 8-bit integers.
#pragma once

#include "gemm_kernel.h"

namespace polymoe::amx {

extern const GemmKernel plain_bf16, packed_bf16, int8_bf16, int4_bf16, fp8_bf16, mxfp8_bf16, mxfp4_bf16;

// Multiplies m rows of A with int8 weights, each row with a scale, in groups of 32 and of 128: int8_gemm.cpp packs A,
// and its workspace is used.
struct Piece;
using MultiplyInt8 = void (*)(const Piece* a, const RowGroups& groups, int64_t m, const Weights& w, int64_t n,
                              int64_t d, float* c, int64_t ldc);
extern const MultiplyInt8 int8_tiles, int8_g128_tiles;

}  // namespace polymoe::amx
