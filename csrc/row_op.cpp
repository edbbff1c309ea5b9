#include "row_op.h"

#include "check.h"

namespace polymoe {

at::ScalarType output_dtype(const char* op, std::optional<at::ScalarType> out_dtype, at::ScalarType input) {
  const at::ScalarType out = out_dtype.value_or(input);
  const bool wide = input == at::kDouble;
  POLYMOE_CHECK(wide ? out == at::kDouble : out == at::kFloat || out == at::kBFloat16 || out == at::kHalf, op,
                "out_dtype",
                c10::str(wide ? "float64" : "float32, bfloat16 or float16", " for ", dtype_name(input), " input"),
                dtype_name(out));
  return out;
}

at::Tensor routing_weights(const char* op, const std::optional<at::Tensor>& weights,
                           std::initializer_list<at::ScalarType> accepted, int64_t T, int64_t K, Dtype input) {
  if (!weights) return {};
  check_cpu(op, "weights", *weights);
  check_dtype(op, "weights", *weights, accepted);
  check_shape(op, "weights", *weights, {{"T", T}, {"K", K}});
  return weights->to(accumulator_dtype(input)).contiguous();
}

at::Tensor plan_indices(const char* op, const char* argument, const at::Tensor& indices, int64_t S) {
  const at::Tensor contiguous = indices.contiguous();
  const int32_t* const data = contiguous.const_data_ptr<int32_t>();
  int32_t largest = -1;
  for (int64_t i = 0; i < contiguous.numel(); ++i) largest = std::max(largest, data[i]);
  POLYMOE_CHECK(largest < S, op, argument, c10::str("indices below S=", S), largest);
  return contiguous;
}

}  // namespace polymoe
