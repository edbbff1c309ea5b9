// The op `quantized_backward` on the CPU: rows times the quantised weight of their group, along its rows. A slab of
// columns of one weight at a time is decoded to f32, code times scale, for all rows of the group.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cstring>
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
constexpr int64_t kSlab = 256;  // columns decoded at a time; even, so that no slab begins within a byte
constexpr int64_t kRows = 64;   // rows multiplied at a time

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

float from_e8m0(uint8_t code) { return from_bits(code == 255 ? 0x7fc00000u : code == 0 ? 1u << 22 : code << 23); }

// What the codes of a format stand for, without scale and zero point.
std::array<float, 256> values_of(WeightFormat format) {
  constexpr float e2m1[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  std::array<float, 256> values{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    float& value = values[size_t(code)];
    if (format == WeightFormat::int8) {
      value = float(int8_t(uint8_t(code)));
    } else if (format == WeightFormat::int4) {
      value = float(code & 15);
    } else if (format == WeightFormat::mxfp4) {
      value = code & 8 ? -e2m1[code & 7] : e2m1[code & 7];
    } else {
      const float magnitude = (code & 127) == 127 ? from_bits(0x7fc00000u)
                              : exponent == 0     ? float(mantissa) * 0x1p-9f
                                                  : float(8 + mantissa) * from_bits(uint32_t(exponent + 117) << 23);
      value = code & 128 ? -magnitude : magnitude;
    }
  }
  return values;
}

struct Decoder {
  QuantizedMatrix matrix;
  int64_t width;  // D
  bool nibbles, zero_points;
  const std::array<float, 256>& values;

  // Elements [begin, end) of row n.
  void row(int64_t n, int64_t begin, int64_t end, float* out) const {
    const uint8_t* const data = reinterpret_cast<const uint8_t*>(matrix.data + n * matrix.data_stride);
    const char* const scales = matrix.scale + n / matrix.scale_rows * matrix.scale_stride;
    const int64_t share = matrix.scale_columns ? matrix.scale_columns : width;
    for (int64_t from = begin; from < end;) {
      const int64_t block = from / share, to = std::min(end, (block + 1) * share);
      float scale, zero = 0;
      if (matrix.exponents)
        scale = from_e8m0(uint8_t(scales[block]));
      else
        std::memcpy(&scale, scales + block * 4, 4);
      if (zero_points) zero = matrix.zero ? float(uint8_t(matrix.zero[n * matrix.zero_stride + block])) : 8.0f;
      if (nibbles)
        for (; from < to; ++from) *out++ = (values[data[from / 2] >> (from % 2 * 4) & 15] - zero) * scale;
      else
        for (; from < to; ++from) *out++ = values[data[from]] * scale;
    }
  }
};

// Rows [begin, begin + count) of a group, and the columns of one slab.
struct Task {
  int64_t group, begin, count, column;
};

struct Product {
  const LevelTable& table;
  const at::Tensor &grad, &out;  // [rows, N] and [rows, D]
  const QuantizedWeight& weight;
  const std::array<float, 256>& values;
  bool nibbles, zero_points;

  void run(const Task& task) const {
    const Dtype dtype = kernel_dtype(grad.scalar_type()), out_dtype = kernel_dtype(out.scalar_type());
    const RowGemm& gemm = *table.row_gemm->by_dtype[int(Dtype::f32)];
    const RowGemm& packer = *table.row_gemm->by_dtype[int(dtype)];  // widens to the same panels
    const int64_t N = grad.size(1), D = out.size(1), columns = std::min(kSlab, D - task.column);
    float* const slab = reinterpret_cast<float*>(scratch(Scratch::weights, std::max<int64_t>(N, 1) * kSlab * 4));
    const Decoder decoder{weight.of_group(task.group), D, nibbles, zero_points, values};
    for (int64_t n = 0; n < N; ++n) decoder.row(n, task.column, task.column + columns, slab + n * kSlab);

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
        packer.pack(rows.at(task.begin + first + row).data, rows.row_stride, rows.d_stride, groups.rows(group), N,
                    panel + row * N * 4);
      }
      gemm.multiply(panel, count, reinterpret_cast<const char*>(slab), kSlab * 4, columns, N, sums, stride);
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
  const std::array<float, 256> values = values_of(weight.format);
  const bool int4 = weight.format == WeightFormat::int4;
  const Product product{
      level_table(Dtype::f32), rows, out_rows, weight, values, int4 || weight.format == WeightFormat::mxfp4, int4};
  DynamicTasks queue(int64_t(tasks.size()));
  parallel_region(int(std::min<int64_t>(num_threads(), int64_t(tasks.size()))), [&](int) {
    for (Range range = queue.next(); !range.empty(); range = queue.next()) product.run(tasks[size_t(range.begin)]);
  });
  return out;
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "quantized_backward", quantized_backward_cpu); }

}  // namespace
}  // namespace polymoe
