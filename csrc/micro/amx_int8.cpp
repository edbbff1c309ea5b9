// The matmul kernel for int8 weights and bf16 on AMX tiles.
#include "amx_gemm.h"

#if defined(POLYMOE_LEVEL_AMX)

#include "amx_quantized.h"

namespace polymoe::POLYMOE_LEVEL {

const GemmKernel int8_bf16 = kOnTiles<Int8<Pairs>>;

}  // namespace polymoe::POLYMOE_LEVEL
#endif
