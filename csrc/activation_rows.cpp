#include "activation_rows.h"

#include "check.h"

namespace polymoe {

void check_activation_rows(const char* op, const at::Tensor& h, c10::string_view kind, bool gated, bool interleaved) {
  check_shape(op, "h", h, {{"S"}, {gated ? "2I" : "I"}});
  POLYMOE_CHECK(!interleaved || gated, op, "interleaved", c10::str("False for ", kind, ", which has no gate"), "True");
  POLYMOE_CHECK(!gated || h.size(1) % 2 == 0, op, "h", "an even number of columns 2I", describe(h));
}

at::Tensor activation_slots(const char* op, const std::optional<at::Tensor>& row_slot, int64_t S) {
  if (!row_slot) return {};
  check_cpu(op, "row_slot", *row_slot);
  check_dtype(op, "row_slot", *row_slot, {at::kInt});
  check_shape(op, "row_slot", *row_slot, {{"S", S}});
  return plan_indices(op, "row_slot", *row_slot, S);
}

at::Tensor activation_weights(const char* op, const at::Tensor& h, const std::optional<at::Tensor>& row_slot,
                              const std::optional<at::Tensor>& weights, at::ScalarType result) {
  if (!weights) return {};
  POLYMOE_CHECK(row_slot.has_value(), op, "weights", "nothing without a plan", describe(*weights));
  POLYMOE_CHECK(weights->dim() == 2 && weights->numel() == h.size(0), op, "weights",
                c10::str("a tensor [T, K] with T*K=", h.size(0)), describe(*weights));
  return routing_weights(op, weights, {at::kFloat, h.scalar_type(), result}, weights->size(0), weights->size(1),
                         kernel_dtype(h.scalar_type()));
}

}  // namespace polymoe
