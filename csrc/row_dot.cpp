// row_dot on the CPU: the gradient of the routing weights that multiply rows.
#include <ATen/ops/empty.h>

#include "check.h"
#include "route.h"
#include "row_op.h"

namespace polymoe {
namespace {

constexpr const char* kOp = "row_dot";

at::Tensor row_dot_cpu(const at::Tensor& x, const at::Tensor& rows, const at::Tensor& slot_row, c10::string_view) {
  check_cpu(kOp, "x", x);
  check_dtype(kOp, "x", x, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  check_shape(kOp, "x", x, {{"T"}, {"H"}});
  check_cpu(kOp, "slot_row", slot_row);
  check_dtype(kOp, "slot_row", slot_row, {at::kInt});
  check_shape(kOp, "slot_row", slot_row, {{"T", x.size(0)}, {"K"}});
  const int64_t T = x.size(0), H = x.size(1), K = slot_row.size(1);
  check_cpu(kOp, "rows", rows);
  const bool wide = x.scalar_type() == at::kDouble;
  if (wide)
    check_dtype(kOp, "rows", rows, {at::kDouble});
  else
    check_dtype(kOp, "rows", rows, {at::kFloat, at::kBFloat16, at::kHalf});
  check_shape(kOp, "rows", rows, {{"S", T * K}, {"H", H}});
  const at::Tensor indices = plan_indices(kOp, "slot_row", slot_row, T * K);

  const Dtype a = kernel_dtype(x.scalar_type()), b = kernel_dtype(rows.scalar_type());
  const at::Tensor out = at::empty({T, K}, x.options().dtype(accumulator_dtype(a)));
  const int64_t out_size = out.element_size();
  char* const dots = static_cast<char*>(out.mutable_data_ptr());
  const Operand tokens = rows_of(x), others = rows_of(rows);
  const int32_t* const row_of = indices.const_data_ptr<int32_t>();
  const auto dot_row = level_table(a).rows->dot_row[int(a)][int(b)];
  // A row as one tile, whatever its length: its sum has one order.
  for_row_tiles(T, 1, H * (x.element_size() + K * rows.element_size()), [&](int64_t t, int64_t, int64_t) {
    char* const copy = tokens.d_stride == size_of(a) ? nullptr : scratch(Scratch::row, H * size_of(a));
    char* const other_copy = others.d_stride == size_of(b) ? nullptr : scratch(Scratch::weights, H * size_of(b));
    const char* const token = contiguous_row(tokens, t, 0, H, size_of(a), copy);
    for (int64_t slot = t * K; slot < (t + 1) * K; ++slot) {
      char* const target = dots + slot * out_size;
      if (row_of[slot] < 0)
        std::fill_n(target, out_size, char(0));
      else
        dot_row(token, contiguous_row(others, row_of[slot], 0, H, size_of(b), other_copy), target, H);
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "row_dot", row_dot_cpu); }

}  // namespace
}  // namespace polymoe
