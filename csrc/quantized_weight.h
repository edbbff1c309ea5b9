// Quantised weights as arguments of the ops: data, scales and zero points, and the format by name.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>

#include "micro/gemm_kernel.h"

namespace polymoe {

// A weight [G, N, D] whose tensors are checked, contiguous, and outlive this.
struct QuantizedWeight {
  WeightFormat format;
  QuantizedMatrix matrix;                       // of group 0
  int64_t groups, rows;                         // G, N
  int64_t data_group, scale_group, zero_group;  // bytes from a group to the next

  QuantizedMatrix of_group(int64_t g) const {
    QuantizedMatrix m = matrix;
    m.data += g * data_group;
    m.scale += g * scale_group;
    if (m.zero) m.zero += g * zero_group;
    return m;
  }
};

// The names of the arguments, for errors.
struct QuantizedNames {
  const char *data, *scale, *zero;
};

// Checks everything but the number of groups and rows, and refuses what is not the layout of polymoe.formats for rows
// of D elements.
QuantizedWeight check_quantized(const char* op, const QuantizedNames& names, const at::Tensor& data,
                                const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& zero,
                                c10::string_view weight_format, c10::string_view mode, int64_t D);

}  // namespace polymoe
