// The products that gradients of grouped_mm need: of rows with transposed weights, and of rows with rows, added to a
// gradient that is there already.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "grouped_mm.h"
#include "route.h"
#include "row_op.h"

namespace polymoe {
namespace {

at::Tensor grouped_mm_dx_cpu(const at::Tensor& grad, const at::Tensor& b, const at::Tensor& offs,
                             std::optional<at::ScalarType> out_dtype, c10::string_view) {
  constexpr const char* kOp = "grouped_mm_dx";
  check_cpu(kOp, "grad", grad);
  check_dtype(kOp, "grad", grad, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  check_shape(kOp, "grad", grad, {{"S"}, {"N"}});
  check_cpu(kOp, "b", b);
  check_dtype(kOp, "b", b, {grad.scalar_type()});
  check_shape(kOp, "b", b, {{"G"}, {"D"}, {"N", grad.size(1)}});
  const at::ScalarType result = output_dtype(kOp, out_dtype, grad.scalar_type());
  std::vector<int64_t> ends = group_ends(kOp, offs, grad.size(0));
  POLYMOE_CHECK(int64_t(ends.size()) == b.size(0), kOp, "offs", c10::str("a tensor [G=", b.size(0), "]"),
                describe(offs));
  const at::Tensor weights = b.transpose(1, 2);
  const GroupedMm mm{grad, weights, std::move(ends), b.size(0), {}, {WeightFormat::plain, 1}, false};
  const at::Tensor out = at::empty(mm.out_sizes(), grad.options().dtype(result));
  compute(mm, out);
  return out;
}

// Whether elements may share memory, as those of an expanded tensor do.
bool overlaps(const at::Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride and size
  for (int64_t d = 0; d < tensor.dim(); ++d) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dimensions.begin(), dimensions.end());
  int64_t extent = 1;  // of the dimensions with smaller strides
  for (const auto& [stride, size] : dimensions) {
    if (size > 1 && stride < extent) return tensor.numel() > 0;
    extent += (size - 1) * stride;
  }
  return false;
}

void grouped_mm_dw_cpu(const at::Tensor& main, const at::Tensor& a, const at::Tensor& grad, const at::Tensor& offs,
                       c10::string_view) {
  constexpr const char* kOp = "grouped_mm_dw_";
  check_cpu(kOp, "a", a);
  check_dtype(kOp, "a", a, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  check_shape(kOp, "a", a, {{"S"}, {"D"}});
  check_cpu(kOp, "grad", grad);
  check_dtype(kOp, "grad", grad, {a.scalar_type()});
  check_shape(kOp, "grad", grad, {{"S", a.size(0)}, {"N"}});
  check_cpu(kOp, "main", main);
  if (a.scalar_type() == at::kDouble)
    check_dtype(kOp, "main", main, {at::kDouble});
  else
    check_dtype(kOp, "main", main, {at::kFloat, at::kBFloat16, at::kHalf});
  check_shape(kOp, "main", main, {{"G"}, {"D", a.size(1)}, {"N", grad.size(1)}});
  std::vector<int64_t> ends = group_ends(kOp, offs, a.size(0));
  POLYMOE_CHECK(int64_t(ends.size()) == main.size(0), kOp, "offs", c10::str("a tensor [G=", main.size(0), "]"),
                describe(offs));
  // The result has its columns next to one another, so a gradient that is stored transposed is computed transposed.
  const bool flipped = main.stride(2) != 1 && main.stride(1) == 1;
  const at::Tensor out = flipped ? main.transpose(1, 2) : main;
  POLYMOE_CHECK(out.stride(2) == 1 || out.size(2) <= 1, kOp, "main", "a tensor with a stride of 1 in dimension 1 or 2",
                describe(main), " with strides ", main.strides());
  POLYMOE_CHECK(!overlaps(main), kOp, "main", "a tensor whose elements share no memory", describe(main),
                " with strides ", main.strides());
  const at::Tensor left = (flipped ? grad : a).t(), right = flipped ? a : grad;
  compute({left, right, std::move(ends), main.size(0), {}, {WeightFormat::plain, 1}, false, true}, out);
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) {
  POLYMOE_IMPL(m, "grouped_mm_dx", grouped_mm_dx_cpu);
  POLYMOE_IMPL(m, "grouped_mm_dw_", grouped_mm_dw_cpu);
}

}  // namespace
}  // namespace polymoe
