// The matmul kernels for bf16 on AMX tiles, for the level that has them.
#pragma once

#include "gemm_kernel.h"

namespace polymoe::amx {

extern const GemmKernel plain_bf16, packed_bf16;

}  // namespace polymoe::amx
