// The routed part of an MoE layer on the CPU, for a chunk of tokens whose plan is known.
//
// Phase 1, a task per (expert, block of rows, block of columns of I): gather rows of x into a packed panel, multiply
// by the gate and up rows of the weights, activate, and write the result straight into the packed panels of phase 2.
// Phase 2, for one stretch of columns of H after the other, as wide as the L3 cache holds the sums of all rows: a task
// per (expert, block of rows, block of columns) multiplies by the down rows, then each token's slots are summed in
// slot order. So no [S, H] tensor exists, and the order of every sum is fixed.
#pragma once

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "quantized_weight.h"

namespace polymoe {

enum class WeightPlacement { output, activation, input };

// One layer's arguments, resolved. Pointers are to the chunk's first token where they depend on tokens.
struct ExpertsArguments {
  Dtype dtype;
  int64_t tokens, hidden, intermediate, experts, slots;  // T, H, I, E, K
  ActivationSpec activation;
  WeightPlacement placement;
  bool interleaved;     // gate and up rows, their biases and pre_activation alternate
  WeightFormat format;  // packed: gate_up[e] is the gate half, then the up half, whatever `interleaved` says

  const char* x;  // rows contiguous along H
  int64_t x_stride;
  const char* weights;  // [T, K], contiguous, f32 (f64 for f64)

  Operand gate_up, down;  // of expert 0; of quantised weights, the data
  int64_t gate_up_expert_stride, down_expert_stride;
  const QuantizedWeight *quantized_gate_up, *quantized_down;  // null for weights that are not quantised
  const char *gate_up_bias, *down_bias;                       // [E, 2I] and [E, H], contiguous, or null
  Dtype gate_up_bias_dtype, down_bias_dtype;

  char* out;                          // [T, H], contiguous
  char* pre_activation;               // [S, 2I] in the row order of `pre_activation_row`, or null
  const int32_t* pre_activation_row;  // [T, K]: the row of each slot in pre_activation

  bool gated() const { return is_gated(activation.kind); }
  bool quantized() const { return quantized_gate_up != nullptr; }
  int64_t halves() const { return gated() ? 2 : 1; }
};

// The plan of the chunk, as the op `plan` defines it.
struct ChunkPlan {
  const int32_t *offsets, *row_slot, *slot_row;
};

void run_experts(const ExpertsArguments& args, const ChunkPlan& plan);

}  // namespace polymoe
