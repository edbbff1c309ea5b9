#include "router.h"

#include "check.h"

namespace polymoe {

Scoring parse_scoring(const char* op, c10::string_view name) {
  if (name == "softmax") return Scoring::softmax;
  if (name == "softmax_topk") return Scoring::softmax_topk;
  if (name == "sigmoid") return Scoring::sigmoid;
  POLYMOE_CHECK(name == "sqrtsoftplus", op, "scoring", "one of softmax, softmax_topk, sigmoid, sqrtsoftplus", "\"",
                name, "\"");
  return Scoring::sqrtsoftplus;
}

Renormalize parse_renormalize(const char* op, c10::string_view name) {
  if (name == "none") return Renormalize::none;
  if (name == "max") return Renormalize::max;
  POLYMOE_CHECK(name == "add", op, "renormalize", "one of none, max, add", "\"", name, "\"");
  return Renormalize::add;
}

void check_gate_bias(const char* op, const at::Tensor& logits, const std::optional<at::Tensor>& bias) {
  if (!bias) return;
  check_cpu(op, "bias", *bias);
  if (logits.scalar_type() == at::kDouble)
    check_dtype(op, "bias", *bias, {at::kFloat, at::kDouble});
  else
    check_dtype(op, "bias", *bias, {at::kFloat});
  check_shape(op, "bias", *bias, {{"E", logits.size(1)}});
}

}  // namespace polymoe
