// The kernels of each ISA level, gathered from the micro sources.
#pragma once

#include "micro/activation.h"
#include "micro/gemm_kernel.h"
#include "micro/row_gemm.h"
#include "micro/rows.h"
#include "micro/score.h"

namespace polymoe {

struct LevelTable {
  const GemmTable* gemm[kWeightFormats];
  const RowGemmTable* row_gemm;
  const ActivationTable* activation;
  const ActivationGradientTable* activation_gradient;
  const RowTable* rows;
  const ScoreTable* score;
};

// Of the active level. An op asks once, at its start, so that it finishes at the level it began with.
const LevelTable& level_table();

// The same, but the portable level for f64, which no other level serves.
const LevelTable& level_table(Dtype dtype);

}  // namespace polymoe
