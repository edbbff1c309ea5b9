// The weight formats of the ops' `weight_format` argument.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include "micro/gemm_kernel.h"

namespace polymoe {

// How a weight tensor is stored: the kernel's format, and how many packed matrices, one after the other, make up the
// matrix of one expert ("packed_gate_up": two halves).
struct StoredAs {
  WeightFormat format;
  int64_t matrices;
};

StoredAs parse_weight_format(const char* op, c10::string_view name);

}  // namespace polymoe
