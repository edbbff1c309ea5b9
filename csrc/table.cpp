#include "table.h"

#include "isa.h"

#define POLYMOE_LEVEL_TABLES(level)                               \
  namespace polymoe::level {                                      \
  extern const GemmTable plain_gemm_table;                        \
  extern const GemmTable packed_gemm_table;                       \
  extern const GemmTable fp8_gemm_table;                          \
  extern const GemmTable mxfp8_gemm_table;                        \
  extern const GemmTable mxfp4_gemm_table;                        \
  extern const GemmTable int8_gemm_table;                         \
  extern const GemmTable int4_gemm_table;                         \
  extern const GemmTable mxfp4_by_int8_gemm_table;                \
  extern const GemmTable int8_by_int8_gemm_table;                 \
  extern const GemmTable int4_by_int8_gemm_table;                 \
  extern const GemmTable mxfp4_by_int8_g128_gemm_table;           \
  extern const GemmTable int8_by_int8_g128_gemm_table;            \
  extern const GemmTable int4_by_int8_g128_gemm_table;            \
  extern const RowGemmTable row_gemm_table;                       \
  extern const ActivationTable activation_table;                  \
  extern const ActivationGradientTable activation_gradient_table; \
  extern const RowTable row_table;                                \
  extern const ScoreTable score_table;                            \
  }

POLYMOE_LEVEL_TABLES(portable)
#if defined(__x86_64__)
POLYMOE_LEVEL_TABLES(avx2)
POLYMOE_LEVEL_TABLES(avx512)
POLYMOE_LEVEL_TABLES(avx512_bf16)
POLYMOE_LEVEL_TABLES(amx)
#endif

namespace polymoe {
namespace {

#define POLYMOE_LEVEL_ENTRY(level)                                                                                \
  {{&level::plain_gemm_table, &level::packed_gemm_table, &level::fp8_gemm_table, &level::mxfp8_gemm_table,        \
    &level::mxfp4_gemm_table, &level::int8_gemm_table, &level::int4_gemm_table, &level::mxfp4_by_int8_gemm_table, \
    &level::int8_by_int8_gemm_table, &level::int4_by_int8_gemm_table, &level::mxfp4_by_int8_g128_gemm_table,      \
    &level::int8_by_int8_g128_gemm_table, &level::int4_by_int8_g128_gemm_table},                                  \
   &level::row_gemm_table,                                                                                        \
   &level::activation_table,                                                                                      \
   &level::activation_gradient_table,                                                                             \
   &level::row_table,                                                                                             \
   &level::score_table}

// In the order of Isa. Other machines have the portable level alone, and isa.cpp lets no other become active.
constexpr LevelTable kTables[] = {
    POLYMOE_LEVEL_ENTRY(portable),
#if defined(__x86_64__)
    POLYMOE_LEVEL_ENTRY(avx2),        POLYMOE_LEVEL_ENTRY(avx512),
    POLYMOE_LEVEL_ENTRY(avx512_bf16), POLYMOE_LEVEL_ENTRY(amx),
#endif
};

}  // namespace

const LevelTable& level_table() { return kTables[static_cast<int>(active_isa())]; }

const LevelTable& level_table(Dtype dtype) {
  return dtype == Dtype::f64 ? kTables[static_cast<int>(Isa::portable)] : level_table();
}

}  // namespace polymoe
