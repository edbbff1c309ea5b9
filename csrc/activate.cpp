// activate on the CPU: rows widened to f32 tile by tile, then the same routine as in `experts`.
#include <ATen/ops/empty.h>

#include <cstring>
#include <optional>

#include "activation_rows.h"
#include "check.h"
#include "route.h"
#include "row_op.h"

namespace polymoe {
namespace {

constexpr const char* kOp = "activate";

at::Tensor activate_cpu(const at::Tensor& h, c10::string_view kind, std::optional<double> alpha,
                        std::optional<double> limit, bool interleaved, const std::optional<at::Tensor>& row_slot,
                        const std::optional<at::Tensor>& weights, std::optional<at::ScalarType> out_dtype,
                        c10::string_view) {
  check_cpu(kOp, "h", h);
  check_dtype(kOp, "h", h, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  const ActivationSpec spec = parse_activation(kOp, "kind", kind, alpha, limit);
  const bool gated = is_gated(spec.kind);
  check_activation_rows(kOp, h, kind, gated, interleaved);
  const int64_t S = h.size(0), I = gated ? h.size(1) / 2 : h.size(1);
  const at::ScalarType result = output_dtype(kOp, out_dtype, h.scalar_type());
  const at::Tensor slots = activation_slots(kOp, row_slot, S);
  const at::Tensor w = activation_weights(kOp, h, row_slot, weights, result);

  const Dtype in = kernel_dtype(h.scalar_type()), to = kernel_dtype(result);
  const LevelTable& table = level_table(in);
  const at::Tensor out = at::empty({S, I}, h.options().dtype(result));
  const int64_t out_size = out.element_size(), wide = accumulator_size(in);
  char* const out_data = static_cast<char*>(out.mutable_data_ptr());
  const auto [gate_rows, up_rows] = split(h, I, interleaved);
  const auto widen_row = table.rows->widen_row[static_cast<int>(in)];
  const Reader gate{gate_rows, in, widen_row}, up{up_rows, in, widen_row};
  const auto activate_row = table.activation->activate_row[static_cast<int>(to)];
  const int32_t* const slot_of = slots.defined() ? slots.const_data_ptr<int32_t>() : nullptr;
  const char* const weight_of = w.defined() ? static_cast<const char*>(w.const_data_ptr()) : nullptr;

  constexpr int64_t kBytesPerElement = 32;  // it is arithmetic, not memory, that costs
  for_row_tiles(S, I, kBytesPerElement, [&](int64_t row, int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    char* const target = out_data + (row * I + begin) * out_size;
    if (slot_of && slot_of[row] < 0) {
      std::memset(target, 0, static_cast<size_t>(n * out_size));
      return;
    }
    char* const memory = scratch(Scratch::accumulators, 2 * kTileColumns * wide);
    const char* const g = gate.read(row, begin, n, memory);
    const char* const u = gated ? up.read(row, begin, n, memory + kTileColumns * wide) : nullptr;
    activate_row(spec, g, u, weight_of ? weight_of + slot_of[row] * wide : nullptr, target, n);
  });
  return out;
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "activate", activate_cpu); }

}  // namespace
}  // namespace polymoe
