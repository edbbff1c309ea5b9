#include "aten_grouped_mm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_grouped_mm_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "grouped_mm.h"
#include "tiling.h"

namespace polymoe {
namespace {

constexpr int64_t kRowAlignment = 16;  // bytes; torch asks it of the operands' strides and gives it to the result's

std::atomic<int64_t> served{0}, passed_on{0};

// Torch takes matrices that are contiguous along one of their dimensions, with aligned strides along the other.
bool regular(const at::Tensor& t) {
  const int64_t aligned = kRowAlignment / t.element_size();
  const int64_t rows = t.size(-2), columns = t.size(-1), row_stride = t.stride(-2), column_stride = t.stride(-1);
  if (row_stride == 1 && column_stride >= std::max<int64_t>(1, rows)) return column_stride % aligned == 0;
  return column_stride == 1 && row_stride >= std::max<int64_t>(1, columns) && row_stride % aligned == 0;
}

bool usable(const at::Tensor& t) {
  const at::ScalarType dtype = t.scalar_type();
  return t.device().is_cpu() && (dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat) &&
         (t.dim() == 2 || t.dim() == 3) && regular(t);
}

// The ends of the groups, unless there is anything unusual about them: torch clamps what lies outside.
std::optional<std::vector<int64_t>> ordinary_ends(const at::Tensor& offs, int64_t ragged) {
  if (!offs.device().is_cpu() || offs.scalar_type() != at::kInt || offs.dim() != 1) return std::nullopt;
  std::vector<int64_t> ends(size_t(offs.size(0)));
  int64_t previous = 0;
  for (size_t g = 0; g < ends.size(); ++g) {
    ends[g] = offs.const_data_ptr<int32_t>()[int64_t(g) * offs.stride(0)];
    if (ends[g] < previous || ends[g] > ragged) return std::nullopt;
    previous = ends[g];
  }
  return ends;
}

// The call in polymoe's terms, if it is one that torch accepts: whether to refuse any other, and how, is left to torch.
std::optional<GroupedMm> understood(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& offs,
                                    const std::optional<at::Tensor>& bias, std::optional<at::ScalarType> out_dtype) {
  if (!usable(a) || !usable(b) || a.scalar_type() != b.scalar_type() || a.size(-1) != b.size(-2)) return std::nullopt;
  if (bias || out_dtype.value_or(a.scalar_type()) != a.scalar_type()) return std::nullopt;
  if (a.dim() == 3 && b.dim() == 3) {
    if (offs || a.size(0) != b.size(0)) return std::nullopt;
    return GroupedMm{a, b, {}, a.size(0), {}, {WeightFormat::plain, 1}, false};
  }
  if (!offs) return std::nullopt;
  auto ends = ordinary_ends(*offs, b.dim() == 3 ? a.size(0) : a.dim() == 3 ? b.size(1) : a.size(1));
  if (!ends) return std::nullopt;
  const int64_t groups = int64_t(ends->size());
  if ((a.dim() == 3 && a.size(0) != groups) || (b.dim() == 3 && b.size(0) != groups)) return std::nullopt;
  return GroupedMm{a, b, std::move(*ends), groups, {}, {WeightFormat::plain, 1}, false};
}

at::Tensor grouped_mm(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& offs,
                      const std::optional<at::Tensor>& bias, std::optional<at::ScalarType> out_dtype) {
  const std::optional<GroupedMm> mm = understood(a, b, offs, bias, out_dtype);
  if (!mm) {
    passed_on.fetch_add(1, std::memory_order_relaxed);
    return at::compositeexplicitautograd::_grouped_mm(a, b, offs, bias, out_dtype);
  }
  served.fetch_add(1, std::memory_order_relaxed);
  const std::vector<int64_t> sizes = mm->out_sizes();
  const int64_t aligned = kRowAlignment / a.element_size(), row = ceil_div(sizes.back(), aligned) * aligned;
  const at::Tensor out = mm->per_group() ? at::empty_strided(sizes, {sizes[1] * row, row, 1}, a.options())
                                         : at::empty_strided(sizes, {row, 1}, a.options());
  compute(*mm, out);
  return out;
}

}  // namespace

void serve_aten_grouped_mm(bool on) {
  static std::unique_ptr<torch::Library> registration;  // guarded by the GIL
  if (on == bool(registration)) return;
  if (on) {
    registration = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__,
                                                    uint32_t(__LINE__));
    registration->impl("_grouped_mm", TORCH_FN(grouped_mm));
  } else {
    registration.reset();
  }
}

AtenCalls aten_grouped_mm_calls() { return {served.load(), passed_on.load()}; }

}  // namespace polymoe
