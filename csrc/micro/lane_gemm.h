// The matmul kernels for quantised weights and bf16 whose lanes are columns, for the level that has them.
#pragma once

#include "gemm_kernel.h"

namespace polymoe::avx512_bf16 {

extern const GemmKernel fp8_bf16, mxfp8_bf16, mxfp4_bf16, int4_bf16;

}  // namespace polymoe::avx512_bf16
