// The matmul kernels for quantised weights and bf16 whose lanes are columns, for the level that has them.
#pragma once

#include "gemm_kernel.h"

namespace polymoe::avx512_bf16 {

extern const GemmKernel fp8_lanes, mxfp8_lanes, mxfp4_lanes, int4_lanes;

}  // namespace polymoe::avx512_bf16
