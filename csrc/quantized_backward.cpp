// The op `quantized_backward` on the CPU: rows times the quantised weight of their group, along its rows. A slab of
// columns of one weight at a time is decoded to f32, code times scale, for all rows of the group.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"
#include "gemm.h"
#include "grouped_mm.h"
#include "quantized_weight.h"
#include "route.h"
#include "row_op.h"
#include "threads.h"

namespace polymoe {
namespace {

constexpr const char* kOp = "quantized_backward";
constexpr int64_t kSlab = 256;  // columns decoded at a time
constexpr int64_t kRows = 64;   // rows multiplied at a time

// Rows [begin, begin + count) of a group, and the columns of one slab.
struct Task {
  int64_t group, begin, count, column;
};

struct Product {
  const LevelTable& table;
  const at::Tensor &grad, &out;  // [rows, N] and [rows, D]
  const QuantizedWeight& weight;

  void run(const Task& task) const {
    const Dtype dtype = kernel_dtype(grad.scalar_type()), out_dtype = kernel_dtype(out.scalar_type());
    const RowGemm& gemm = *table.row_gemm->by_dtype[int(Dtype::f32)];
    const RowGemm& packer = *table.row_gemm->by_dtype[int(dtype)];
    const int64_t N = grad.size(1), D = out.size(1), columns = std::min(kSlab, D - task.column);
    float* const slab = reinterpret_cast<float*>(scratch(Scratch::weights, std::max<int64_t>(N, 1) * kSlab * 4));
    const QuantizedMatrix matrix = weight.of_group(task.group);
    const auto decode = gemm_kernel(table, weight.format, Dtype::f32).decode;
    for (int64_t n = 0; n < N; ++n) decode(matrix, n, task.column, columns, slab + n * kSlab);

    const Operand rows{static_cast<const char*>(grad.const_data_ptr()), grad.stride(0) * grad.element_size(),
                       grad.stride(1) * grad.element_size()};
    const int64_t stride = ceil_div(columns, gemm.width) * gemm.width;
    for (int64_t first = 0; first < task.count; first += kRows) {
      const int64_t count = std::min(kRows, task.count - first);
      const RowGroups groups(count, gemm.max_rows);
      char* const panel = scratch(Scratch::panel, count * N * 4 + 64);
      float* const sums = reinterpret_cast<float*>(scratch(Scratch::accumulators, count * stride * 4));
      for (int64_t group = 0; group < groups.count; ++group) {
        const int64_t row = groups.first_row(group);
        packer.widen(rows.at(task.begin + first + row).data, rows.row_stride, rows.d_stride, groups.rows(group), N,
                     panel + row * N * 4);
      }
      gemm.multiply(panel, count, reinterpret_cast<const char*>(slab), kSlab * 4, columns, N, sums, stride, {});
      for (int64_t r = 0; r < count; ++r) {
        char* const to = static_cast<char*>(out.mutable_data_ptr()) +
                         ((task.begin + first + r) * D + task.column) * size_of(out_dtype);
        table.rows->store_row[int(out_dtype)](sums + r * stride, nullptr, to, columns);
      }
    }
  }
};

// The first row of every group and the end of the last one.
std::vector<int64_t> bounds_of(const at::Tensor& grad, const std::optional<at::Tensor>& offs, int64_t groups) {
  std::vector<int64_t> bounds(size_t(groups) + 1, 0);
  if (!offs) {
    for (int64_t g = 0; g < groups; ++g) bounds[size_t(g) + 1] = (g + 1) * grad.size(1);
    return bounds;
  }
  check_shape(kOp, "offs", *offs, {{"G", groups}});
  const std::vector<int64_t> ends = group_ends(kOp, *offs, grad.size(0));
  std::copy(ends.begin(), ends.end(), bounds.begin() + 1);
  return bounds;
}

at::Tensor quantized_backward_cpu(const at::Tensor& grad, const at::Tensor& data, const at::Tensor& scale,
                                  const std::optional<at::Tensor>& zero, const std::optional<at::Tensor>& offs,
                                  c10::SymInt symbolic_D, c10::string_view weight_format,
                                  std::optional<at::ScalarType> out_dtype, c10::string_view) {
  const int64_t D = symbolic_D.guard_int(__FILE__, __LINE__);
  check_cpu(kOp, "grad", grad);
  check_dtype(kOp, "grad", grad, {at::kFloat, at::kBFloat16, at::kHalf});
  const QuantizedWeight weight =
      check_quantized(kOp, {"data", "scale", "zero"}, data, scale, zero, weight_format, "weight_only", D);
  if (offs)
    check_shape(kOp, "grad", grad, {{"M"}, {"N", weight.rows}});
  else
    check_shape(kOp, "grad", grad, {{"G", weight.groups}, {"M"}, {"N", weight.rows}});
  const at::ScalarType dtype = output_dtype(kOp, out_dtype, grad.scalar_type());
  const std::vector<int64_t> bounds = bounds_of(grad, offs, weight.groups);

  std::vector<int64_t> sizes = grad.sizes().vec();
  sizes.back() = D;
  const at::Tensor out = at::empty(sizes, grad.options().dtype(dtype));
  const at::Tensor rows = offs ? grad : grad.reshape({-1, weight.rows}), out_rows = offs ? out : out.view({-1, D});
  out_rows.narrow(0, bounds.back(), out_rows.size(0) - bounds.back()).zero_();

  std::vector<Task> tasks;
  for (int64_t g = 0; g < weight.groups; ++g)
    for (int64_t column = 0; column < D && bounds[size_t(g)] < bounds[size_t(g) + 1]; column += kSlab)
      tasks.push_back({g, bounds[size_t(g)], bounds[size_t(g) + 1] - bounds[size_t(g)], column});
  const Product product{level_table(Dtype::f32), rows, out_rows, weight};
  DynamicTasks queue(int64_t(tasks.size()));
  parallel_region(int(std::min<int64_t>(num_threads(), int64_t(tasks.size()))), [&](int) {
    for (Range range = queue.next(); !range.empty(); range = queue.next()) product.run(tasks[size_t(range.begin)]);
  });
  return out;
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "quantized_backward", quantized_backward_cpu); }

}  // namespace
}  // namespace polymoe
