// The matmul kernel for int4 weights and bf16 on AMX tiles.
#include "amx_gemm.h"

#if defined(POLYMOE_LEVEL_AMX)

#include "amx_quantized.h"

namespace polymoe::POLYMOE_LEVEL {

const GemmKernel int4_bf16 = kOnTiles<Int4<Pairs>>;

}  // namespace polymoe::POLYMOE_LEVEL
#endif
