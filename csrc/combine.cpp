// combine on the CPU: each token sums its rows in slot order; skipped slots add nothing.
#include <ATen/ops/empty.h>

#include <optional>
#include <vector>

#include "check.h"
#include "route.h"
#include "row_op.h"

namespace polymoe {
namespace {

constexpr const char* kOp = "combine";

at::Tensor combine_cpu(const at::Tensor& y, const at::Tensor& slot_row, const std::optional<at::Tensor>& weights,
                       std::optional<at::ScalarType> out_dtype, c10::string_view) {
  check_cpu(kOp, "y", y);
  check_dtype(kOp, "y", y, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  check_cpu(kOp, "slot_row", slot_row);
  check_dtype(kOp, "slot_row", slot_row, {at::kInt});
  check_shape(kOp, "slot_row", slot_row, {{"T"}, {"K"}});
  const int64_t T = slot_row.size(0), K = slot_row.size(1), S = T * K;
  check_shape(kOp, "y", y, {{"S", S}, {"H"}});
  const int64_t H = y.size(1);
  const at::ScalarType result = output_dtype(kOp, out_dtype, y.scalar_type());
  const Dtype in = kernel_dtype(y.scalar_type()), to = kernel_dtype(result);
  const at::Tensor w = routing_weights(kOp, weights, {at::kFloat, y.scalar_type(), result}, T, K, in);
  const at::Tensor rows = plan_indices(kOp, "slot_row", slot_row, S);

  const at::Tensor out = at::empty({T, H}, y.options().dtype(result));
  const int64_t size = y.element_size(), out_size = out.element_size(), weight_size = accumulator_size(in);
  const Operand from = rows_of(y);
  char* const out_data = static_cast<char*>(out.mutable_data_ptr());
  const int32_t* const row_of = rows.const_data_ptr<int32_t>();
  const char* const weight_of = w.defined() ? static_cast<const char*>(w.const_data_ptr()) : nullptr;
  const auto combine_row = level_table(in).rows->combine_row[static_cast<int>(in)][static_cast<int>(to)];

  for_row_tiles(T, H, K * size + out_size, [&](int64_t t, int64_t begin, int64_t end) {
    thread_local std::vector<const void*> sources;
    sources.resize(static_cast<size_t>(K));
    const int64_t n = end - begin;
    char* const copies = from.d_stride == size ? nullptr : scratch(Scratch::row, K * n * size);
    char* const taken = scratch(Scratch::weights, K * weight_size);
    int count = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t slot = t * K + k, row = row_of[slot];
      if (row < 0) continue;
      sources[static_cast<size_t>(count)] = contiguous_row(from, row, begin, n, size, copies + count * n * size);
      if (weight_of) std::copy_n(weight_of + slot * weight_size, weight_size, taken + count * weight_size);
      ++count;
    }
    combine_row(sources.data(), weight_of ? taken : nullptr, count, out_data + (t * H + begin) * out_size, n);
  });
  return out;
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "combine", combine_cpu); }

}  // namespace
}  // namespace polymoe
