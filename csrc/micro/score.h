// Router scores of one token, of one ISA level.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtype.h"

namespace polymoe {

enum class Scoring : int { softmax, softmax_topk, sigmoid, sqrtsoftplus };

// Rows given to these kernels have a length that is a multiple of this; a caller fills the rest with NaN logits.
constexpr int kScorePadding = 16;

// Entries exist for f32, and for f64 at the portable level.
struct ScoreTable {
  // For every expert: its score (the bounded logit itself for softmax_topk) and the key it is selected by, which is
  // score + bias, or -infinity when the expert cannot be used. An unusable expert's score is 0.
  void (*score_row[kDtypes])(Scoring scoring, const void* logits, const void* bias, void* score, void* key, int64_t n);

  // out[i] = exp(in[i] - max[0]), for any n.
  void (*exp_row[kDtypes])(const void* in, const void* max, void* out, int64_t n);
};

}  // namespace polymoe
