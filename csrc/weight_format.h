// The weight formats and modes of the ops' arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <initializer_list>
#include <optional>
#include <utility>

#include "micro/gemm_kernel.h"

namespace polymoe {

// How a weight tensor is stored: the kernel's format, and how many packed matrices, one after the other, make up the
// matrix of one expert ("packed_gate_up": two halves).
struct StoredAs {
  WeightFormat format;
  int64_t matrices;
};

StoredAs parse_weight_format(const char* op, c10::string_view name);

// True for the names of quantised formats; the Python side of the ops knows which there are.
bool is_quantized(c10::string_view weight_format);

// Refuses a mode other than "weight_only", and scales or zero points, for weights that are not quantised.
void check_unquantized(const char* op, c10::string_view weight_format, c10::string_view mode,
                       std::initializer_list<std::pair<const char*, const std::optional<at::Tensor>&>> companions);

}  // namespace polymoe
