// The gradient of activate on the CPU: one task per row, tile by tile, so that the dot product of a row, which is the
// gradient of its routing weight, is summed in one order.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <optional>
#include <tuple>

#include "activation_rows.h"
#include "check.h"
#include "route.h"

namespace polymoe {
namespace {

constexpr const char* kOp = "activate_backward";

// The gradient of one row of h; the row's dot product of `grad` and the activation.
template <class T>
class Rows {
 public:
  Rows(const ActivationSpec& spec, const at::Tensor& h, const at::Tensor& grad, bool interleaved, const at::Tensor& out)
      : spec_(spec),
        columns_(grad.size(1)),
        size_(h.element_size()),
        interleaved_(interleaved),
        out_(static_cast<char*>(out.mutable_data_ptr())),
        out_stride_(h.size(1) * size_) {
    const Dtype dtype = kernel_dtype(h.scalar_type()), grad_dtype = kernel_dtype(grad.scalar_type());
    const LevelTable& table = level_table(dtype);
    const auto [gate, up] = split(h, columns_, interleaved);
    gate_ = {gate, dtype, table.rows->widen_row[int(dtype)]};
    up_ = {up, dtype, table.rows->widen_row[int(dtype)]};
    grad_ = {rows_of(grad), grad_dtype, table.rows->widen_row[int(grad_dtype)]};
    gradient_row_ = table.activation_gradient->gradient_row[int(dtype)];
  }

  T run(int64_t row, const void* weight) const {
    T total = 0;
    for (int64_t begin = 0; begin < columns_; begin += kTileColumns)
      total += run(row, weight, begin, std::min(kTileColumns, columns_ - begin));
    return total;
  }

  void zero(int64_t row) const { std::memset(out_ + row * out_stride_, 0, size_t(out_stride_)); }

 private:
  T run(int64_t row, const void* weight, int64_t begin, int64_t n) const {
    const bool gated = is_gated(spec_.kind);
    char* const memory = scratch(Scratch::accumulators, 3 * kTileColumns * int64_t(sizeof(T)));
    const auto part = [&](int64_t i) { return memory + i * kTileColumns * int64_t(sizeof(T)); };
    T dot;
    char* const target = out_ + row * out_stride_;
    char* const pairs = interleaved_ ? scratch(Scratch::weights, 2 * kTileColumns * size_) : nullptr;
    char* const d_gate = interleaved_ ? pairs : target + begin * size_;
    char* const d_up = interleaved_ ? pairs + n * size_ : gated ? target + (columns_ + begin) * size_ : nullptr;
    const char* const g = gate_.read(row, begin, n, part(0));
    const char* const u = gated ? up_.read(row, begin, n, part(1)) : nullptr;
    gradient_row_(spec_, {g, u, grad_.read(row, begin, n, part(2)), weight, d_gate, d_up, &dot}, n);
    if (interleaved_) copy_rows({pairs, size_, n * size_}, n, 2, size_, target + 2 * begin * size_);
    return dot;
  }

  const ActivationSpec spec_;
  const int64_t columns_, size_;
  const bool interleaved_;
  char* const out_;
  const int64_t out_stride_;
  Reader gate_, up_, grad_;
  void (*gradient_row_)(const ActivationSpec&, const ActivationGradient&, int64_t);
};

template <class T>
void run(const Rows<T>& rows, const at::Tensor& slots, const at::Tensor& weights, const at::Tensor& d_weights,
         int64_t S, int64_t I) {
  const int32_t* const slot_of = slots.defined() ? slots.const_data_ptr<int32_t>() : nullptr;
  const T* const weight_of = weights.defined() ? weights.const_data_ptr<T>() : nullptr;
  T* const dots = d_weights.numel() ? d_weights.mutable_data_ptr<T>() : nullptr;
  constexpr int64_t kBytesPerElement = 64;  // it is arithmetic, not memory, that costs
  // Rows as one tile each, whatever their length.
  for_row_tiles(S, 1, I * kBytesPerElement, [&](int64_t row, int64_t, int64_t) {
    if (slot_of && slot_of[row] < 0) return rows.zero(row);
    const T dot = rows.run(row, weight_of ? weight_of + slot_of[row] : nullptr);
    if (dots) dots[slot_of[row]] = dot;
  });
}

std::tuple<at::Tensor, at::Tensor> activate_backward_cpu(const at::Tensor& h, const at::Tensor& grad,
                                                         c10::string_view kind, std::optional<double> alpha,
                                                         std::optional<double> limit, bool interleaved,
                                                         const std::optional<at::Tensor>& row_slot,
                                                         const std::optional<at::Tensor>& weights, bool need_weights,
                                                         c10::string_view) {
  check_cpu(kOp, "h", h);
  check_dtype(kOp, "h", h, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  const ActivationSpec spec = parse_activation(kOp, "kind", kind, alpha, limit);
  const bool gated = is_gated(spec.kind), wide = h.scalar_type() == at::kDouble;
  check_activation_rows(kOp, h, kind, gated, interleaved);
  const int64_t S = h.size(0), I = gated ? h.size(1) / 2 : h.size(1);
  check_cpu(kOp, "grad", grad);
  if (wide)
    check_dtype(kOp, "grad", grad, {at::kDouble});
  else
    check_dtype(kOp, "grad", grad, {at::kFloat, at::kBFloat16, at::kHalf});
  check_shape(kOp, "grad", grad, {{"S", S}, {"I", I}});
  const at::Tensor slots = activation_slots(kOp, row_slot, S);
  const at::Tensor w = activation_weights(kOp, h, row_slot, weights, grad.scalar_type());
  POLYMOE_CHECK(!need_weights || w.defined(), kOp, "need_weights", "False without weights", "True");

  const at::Tensor d_h = at::empty(h.sizes(), h.options());
  // Slots that the plan skips have no row to write them.
  const at::Tensor d_weights = need_weights ? at::zeros(w.sizes(), w.options())
                                            : at::empty({0}, h.options().dtype(wide ? at::kDouble : at::kFloat));
  if (wide)
    run(Rows<double>(spec, h, grad, interleaved, d_h), slots, w, d_weights, S, I);
  else
    run(Rows<float>(spec, h, grad, interleaved, d_h), slots, w, d_weights, S, I);
  return {d_h, d_weights};
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "activate_backward", activate_backward_cpu); }

}  // namespace
}  // namespace polymoe
