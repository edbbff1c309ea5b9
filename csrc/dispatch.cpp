// dispatch on the CPU: row r of the output is the token of slot row_slot[r], times its routing weight if there is one.
#include <ATen/ops/empty.h>

#include <cstring>
#include <optional>

#include "check.h"
#include "route.h"
#include "row_op.h"

namespace polymoe {
namespace {

constexpr const char* kOp = "dispatch";

at::Tensor dispatch_cpu(const at::Tensor& x, const at::Tensor& row_slot, const at::Tensor& slot_row,
                        const std::optional<at::Tensor>& weights, c10::string_view) {
  check_cpu(kOp, "x", x);
  check_dtype(kOp, "x", x, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  check_shape(kOp, "x", x, {{"T"}, {"H"}});
  const int64_t T = x.size(0), H = x.size(1);
  check_cpu(kOp, "slot_row", slot_row);
  check_dtype(kOp, "slot_row", slot_row, {at::kInt});
  check_shape(kOp, "slot_row", slot_row, {{"T", T}, {"K"}});
  const int64_t K = slot_row.size(1), S = T * K;
  check_cpu(kOp, "row_slot", row_slot);
  check_dtype(kOp, "row_slot", row_slot, {at::kInt});
  check_shape(kOp, "row_slot", row_slot, {{"S", S}});
  const Dtype dtype = kernel_dtype(x.scalar_type());
  const at::Tensor w = routing_weights(kOp, weights, {at::kFloat, x.scalar_type()}, T, K, dtype);
  const at::Tensor slots = plan_indices(kOp, "row_slot", row_slot, S);

  const at::Tensor out = at::empty({S, H}, x.options());
  const int64_t size = x.element_size();
  const Operand from = rows_of(x);
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  const int32_t* const slot_of = slots.const_data_ptr<int32_t>();
  const char* const weight_of = w.defined() ? static_cast<const char*>(w.const_data_ptr()) : nullptr;
  const auto scale_row = level_table(dtype).rows->scale_row[static_cast<int>(dtype)];

  for_row_tiles(S, H, 2 * size, [&](int64_t row, int64_t begin, int64_t end) {
    char* const target = to + (row * H + begin) * size;
    const int64_t slot = slot_of[row], n = end - begin;
    if (slot < 0) {
      std::memset(target, 0, static_cast<size_t>(n * size));
      return;
    }
    const char* const source = contiguous_row(from, slot / K, begin, n, size, target);
    if (weight_of) {
      scale_row(source, weight_of + slot * accumulator_size(dtype), target, n);
    } else if (source != target) {
      std::memcpy(target, source, static_cast<size_t>(n * size));
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "dispatch", dispatch_cpu); }

}  // namespace
}  // namespace polymoe
