// The plan of a routing: slots sorted by expert, as `polymoe.plan` defines it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace polymoe {

// All int32: offsets [E+1], row_slot [T*K], slot_row [T, K].
struct PlanTensors {
  at::Tensor offsets, row_slot, slot_row;
};

// ids is a checked tensor [T, K] of int32 or int64, of any strides, with T*K < 2^31.
PlanTensors build_plan(const at::Tensor& ids, int64_t num_experts);

// The same into memory of the caller's, for as many elements.
void build_plan(const at::Tensor& ids, int64_t num_experts, int32_t* offsets, int32_t* row_slot, int32_t* slot_row);

}  // namespace polymoe
