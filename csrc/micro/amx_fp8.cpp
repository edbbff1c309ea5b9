// The matmul kernel for fp8 weights and bf16 on AMX tiles.
#include "amx_gemm.h"

#if defined(POLYMOE_LEVEL_AMX)

#include "amx_quantized.h"

namespace polymoe::POLYMOE_LEVEL {

const GemmKernel fp8_bf16 = kOnTiles<Fp8<Pairs>>;

}  // namespace polymoe::POLYMOE_LEVEL
#endif
