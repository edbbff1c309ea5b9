// The matmul kernel for mxfp8 weights and bf16 on AMX tiles.
#include "amx_gemm.h"

#if defined(POLYMOE_LEVEL_AMX)

#include "amx_quantized.h"

namespace polymoe::POLYMOE_LEVEL {

const GemmKernel mxfp8_bf16 = kOnTiles<Mxfp8<Pairs>>;

}  // namespace polymoe::POLYMOE_LEVEL
#endif
