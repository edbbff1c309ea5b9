// The matmul kernels for bf16 on AMX tiles, for the level that has them.
#pragma once

#include "gemm_kernel.h"

namespace polymoe::amx {

extern const GemmKernel plain_bf16, packed_bf16, int8_bf16, int4_bf16, fp8_bf16, mxfp8_bf16, mxfp4_bf16;

}  // namespace polymoe::amx
