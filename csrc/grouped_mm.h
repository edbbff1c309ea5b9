// The computation of polymoe::grouped_mm, for callers that have checked their arguments themselves.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "quantized_weight.h"
#include "weight_format.h"

namespace polymoe {

struct GroupedMm {
  const at::Tensor &a, &b;    // CPU tensors of one dtype, with two or three dimensions each
  std::vector<int64_t> ends;  // of the groups, non-decreasing and within the ragged dimension; empty for 3-D x 3-D
  int64_t groups;
  at::Tensor bias;  // undefined: none
  StoredAs b_stored{WeightFormat::plain, 1};
  // Sum rows times weights in the order of polymoe::experts, for the same bits, even where another order is faster.
  bool as_experts = true;
  bool accumulate = false;  // add to `out`; groups without a row are left alone

  std::optional<QuantizedWeight> quantized = std::nullopt;  // what b is the transposed data of

  bool a_ragged() const { return a.dim() == 2; }
  bool b_ragged() const { return b.dim() == 2; }
  bool per_group() const { return a_ragged() == b_ragged(); }  // the result has a matrix for each group
  std::vector<int64_t> out_sizes() const {
    if (per_group()) return {groups, a.size(-2), b.size(-1)};
    return {a.size(-2), b.size(-1)};
  }
};

// Ends of the groups, cumulative, checked against the size of the dimension that is cut.
std::vector<int64_t> group_ends(const char* op, const at::Tensor& offs, int64_t ragged);

// Writes all of `out`, of out_sizes(): its last stride is 1, the others are any.
void compute(const GroupedMm& mm, const at::Tensor& out);

}  // namespace polymoe
