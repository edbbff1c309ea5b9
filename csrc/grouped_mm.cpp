// grouped_mm on the CPU: the checks of its arguments, and the op.
#include "grouped_mm.h"

#include <ATen/ops/empty.h>

#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "gemm.h"
#include "route.h"

namespace polymoe {
namespace {

constexpr const char* kOp = "grouped_mm";

struct Arguments {
  GroupedMm mm;
  at::ScalarType out_dtype;
};

void check_plain(const at::Tensor& a, const at::Tensor& b) {
  check_dtype(kOp, "b", b, {a.scalar_type()});
  POLYMOE_CHECK(b.dim() == 2 || b.dim() == 3, kOp, "b", "a tensor [D, N] or [G, D, N]", describe(b));
  POLYMOE_CHECK(a.size(-1) == b.size(-2), kOp, "b", c10::str("its second last size to be D=", a.size(-1)), describe(b));
}

Arguments check(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& offs,
                const std::optional<at::Tensor>& bias, std::optional<at::ScalarType> out_dtype,
                c10::string_view weight_format, const std::optional<at::Tensor>& scale,
                const std::optional<at::Tensor>& zero, c10::string_view mode) {
  check_cpu(kOp, "a", a);
  check_cpu(kOp, "b", b);
  check_dtype(kOp, "a", a, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  POLYMOE_CHECK(a.dim() == 2 || a.dim() == 3, kOp, "a", "a tensor [M, D] or [G, M, D]", describe(a));
  std::optional<QuantizedWeight> quantized;
  if (is_quantized(weight_format)) {
    const at::Tensor data = b.dim() >= 2 ? b.transpose(-1, -2) : b;
    quantized = check_quantized(kOp, {"b", "scale", "zero"}, data, scale, zero, weight_format, mode, a.size(-1));
  } else {
    check_unquantized(kOp, weight_format, mode, {{"scale", scale}, {"zero", zero}});
    check_plain(a, b);
  }
  const bool ragged = a.dim() == 2 || b.dim() == 2;
  POLYMOE_CHECK(offs.has_value() == ragged, kOp, "offs",
                ragged ? "cumulative ends [G], since an operand is 2-D" : "None, since both operands are 3-D",
                offs ? describe(*offs) : "None");
  GroupedMm mm{a,  b,
               {}, a.dim() == 3 ? a.size(0) : b.dim() == 3 ? b.size(0) : offs->size(0),
               {}, quantized ? StoredAs{quantized->format, 1} : parse_weight_format(kOp, weight_format)};
  mm.quantized = quantized;
  if (mm.b_stored.format == WeightFormat::packed)
    POLYMOE_CHECK(b.dim() == 3 && (b.is_contiguous() || b.transpose(1, 2).is_contiguous()) &&
                      b.size(-1) % mm.b_stored.matrices == 0,
                  kOp, "b", c10::str("a tensor [G, D, N] of ", weight_format, " weights"), describe(b));
  if (a.dim() == 3 && b.dim() == 3)
    POLYMOE_CHECK(a.size(0) == b.size(0), kOp, "b", c10::str("G=", a.size(0), " matrices"), describe(b));
  if (ragged) {
    mm.ends = group_ends(kOp, *offs, b.dim() == 3 ? a.size(0) : a.dim() == 3 ? b.size(1) : a.size(1));
    POLYMOE_CHECK(int64_t(mm.ends.size()) == mm.groups, kOp, "offs", c10::str("a tensor [G=", mm.groups, "]"),
                  describe(*offs));
  }
  if (bias) {
    check_cpu(kOp, "bias", *bias);
    check_dtype(kOp, "bias", *bias, {a.scalar_type(), at::kFloat});
    if (a.dim() == 3 && b.dim() == 2)
      check_shape(kOp, "bias", *bias, {{"N", b.size(-1)}});
    else
      check_shape(kOp, "bias", *bias, {{"G", mm.groups}, {"N", b.size(-1)}});
    mm.bias = kernel_bias(*bias, kernel_dtype(a.scalar_type()));
  }
  const at::ScalarType out = out_dtype.value_or(a.scalar_type());
  const bool wide = a.scalar_type() == at::kDouble;
  POLYMOE_CHECK(wide ? out == at::kDouble : out == at::kFloat || out == at::kBFloat16 || out == at::kHalf, kOp,
                "out_dtype", wide ? "float64" : "float32, bfloat16 or float16", dtype_name(out));
  return {std::move(mm), out};
}

at::Tensor grouped_mm_cpu(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& offs,
                          const std::optional<at::Tensor>& bias, std::optional<at::ScalarType> out_dtype,
                          c10::string_view weight_format, const std::optional<at::Tensor>& scale,
                          const std::optional<at::Tensor>& zero, c10::string_view mode, c10::string_view) {
  if (is_quantized(weight_format) && a.scalar_type() == at::kDouble) {
    static const auto routed = routed_op<decltype(grouped_mm_cpu)>("polymoe::grouped_mm");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return routed.call(a, b, offs, bias, out_dtype, weight_format, scale, zero, mode, "reference");
  }
  const Arguments args = check(a, b, offs, bias, out_dtype, weight_format, scale, zero, mode);
  const at::Tensor out = at::empty(args.mm.out_sizes(), a.options().dtype(args.out_dtype));
  compute(args.mm, out);
  return out;
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "grouped_mm", grouped_mm_cpu); }

}  // namespace

std::vector<int64_t> group_ends(const char* op, const at::Tensor& offs, int64_t ragged) {
  check_cpu(op, "offs", offs);
  check_dtype(op, "offs", offs, {at::kInt, at::kLong});
  POLYMOE_CHECK(offs.dim() == 1, op, "offs", "a tensor [G]", describe(offs));
  std::vector<int64_t> ends(size_t(offs.size(0)));
  int64_t previous = 0;
  for (size_t g = 0; g < ends.size(); ++g) {
    const int64_t at = int64_t(g) * offs.stride(0);
    ends[g] = offs.scalar_type() == at::kInt ? offs.const_data_ptr<int32_t>()[at] : offs.const_data_ptr<int64_t>()[at];
    POLYMOE_CHECK(ends[g] >= previous && ends[g] <= ragged, op, "offs",
                  c10::str("cumulative ends, non-decreasing, from 0 to ", ragged), ends[g], " after ", previous);
    previous = ends[g];
  }
  return ends;
}

}  // namespace polymoe
