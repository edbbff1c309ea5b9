// The op `experts` on the CPU: arguments, and the chunks of tokens that bound its memory.
#include <ATen/EmptyTensor.h>

#include <limits>
#include <optional>
#include <tuple>

#include "activation_spec.h"
#include "check.h"
#include "experts_run.h"
#include "plan.h"
#include "route.h"
#include "table.h"
#include "weight_format.h"

namespace polymoe {
namespace {

constexpr const char* kOp = "experts";

// Slots computed at a time, at most: bounds the activations [S, I] and the owners' buffers [S, columns] however many
// tokens come, and is still so many that every expert's weights are read for enough rows.
constexpr int64_t kChunkSlots = 16384;

WeightPlacement parse_placement(c10::string_view name) {
  if (name == "output") return WeightPlacement::output;
  if (name == "activation") return WeightPlacement::activation;
  POLYMOE_CHECK(name == "input", kOp, "weight_placement", "one of 'output', 'activation', 'input'", "'", name, "'");
  return WeightPlacement::input;
}

struct Shapes {
  int64_t T, H, I, E, K;
  int64_t width;  // 2I, or I if ungated
};

void check_x(const at::Tensor& x) {
  check_cpu(kOp, "x", x);
  check_dtype(kOp, "x", x, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  check_shape(kOp, "x", x, {{"T"}, {"H"}});
}

Shapes check_shapes(const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& weights,
                    const at::Tensor& ids, bool gated, bool transposed, bool quantized) {
  check_x(x);
  const int64_t T = x.size(0), H = x.size(1);
  for (const auto& [name, weight] : {std::pair<const char*, const at::Tensor&>{"gate_up", gate_up}, {"down", down}}) {
    check_cpu(kOp, name, weight);
    if (!quantized) check_dtype(kOp, name, weight, {x.scalar_type()});
    POLYMOE_CHECK(weight.dim() == 3, kOp, name, "a 3-D tensor", describe(weight));
  }
  const int64_t E = gate_up.size(0), width = gate_up.size(transposed ? 2 : 1);
  POLYMOE_CHECK(E >= 1, kOp, "gate_up", "at least 1 expert", describe(gate_up));
  const char* const letter = gated ? "2I" : "I";
  POLYMOE_CHECK(!gated || width % 2 == 0, kOp, "gate_up", "an even 2I", describe(gate_up));
  const int64_t I = gated ? width / 2 : width;
  if (transposed) {
    check_shape(kOp, "gate_up", gate_up, {{"E", E}, {"H", H}, {letter, width}});
    check_shape(kOp, "down", down, {{"E", E}, {"I", I}, {"H", H}});
  } else if (quantized) {
    check_shape(kOp, "down", down, {{"E", E}, {"H", H}, {"data of I"}});
  } else {
    check_shape(kOp, "gate_up", gate_up, {{"E", E}, {letter, width}, {"H", H}});
    check_shape(kOp, "down", down, {{"E", E}, {"H", H}, {"I", I}});
  }
  check_cpu(kOp, "ids", ids);
  check_dtype(kOp, "ids", ids, {at::kInt, at::kLong});
  check_shape(kOp, "ids", ids, {{"T", T}, {"K"}});
  const int64_t K = ids.size(1);
  POLYMOE_CHECK(ids.numel() <= std::numeric_limits<int32_t>::max(), kOp, "ids", "fewer than 2^31 slots", describe(ids));
  check_cpu(kOp, "weights", weights);
  check_dtype(kOp, "weights", weights, {at::kFloat, x.scalar_type()});
  check_shape(kOp, "weights", weights, {{"T", T}, {"K", K}});
  return {T, H, I, E, K, width};
}

// Contiguous, or undefined when there is none.
at::Tensor check_bias(const char* name, const std::optional<at::Tensor>& bias, const at::Tensor& x, Dim experts,
                      Dim width) {
  if (!bias) return {};
  check_cpu(kOp, name, *bias);
  check_dtype(kOp, name, *bias, {x.scalar_type(), at::kFloat});
  check_shape(kOp, name, *bias, {experts, width});
  return kernel_bias(*bias, kernel_dtype(x.scalar_type()));
}

ChunkPlan pointers(const PlanTensors& plan) {
  return {plan.offsets.const_data_ptr<int32_t>(), plan.row_slot.const_data_ptr<int32_t>(),
          plan.slot_row.const_data_ptr<int32_t>()};
}

// The plan of some tokens, in memory of the calling thread.
ChunkPlan chunk_plan(const at::Tensor& ids, int64_t num_experts) {
  const int64_t slots = ids.numel(), ends = num_experts + 1;
  auto* const offsets = reinterpret_cast<int32_t*>(scratch(Scratch::plan, (ends + 2 * slots) * sizeof(int32_t)));
  build_plan(ids, num_experts, offsets, offsets + ends, offsets + ends + slots);
  return {offsets, offsets + ends, offsets + ends + slots};
}

// Past the dispatcher, which takes longer than the allocation.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_cpu(sizes, at::TensorOptions(dtype));
}

// The routing weights as accumulators, contiguous.
at::Tensor widen(const at::Tensor& weights, Dtype dtype) {
  const at::ScalarType wide = accumulator_dtype(dtype);
  if (weights.scalar_type() == wide || wide == at::kDouble) return weights.to(wide).contiguous();
  const at::Tensor rows = weights.contiguous(), out = empty(rows.sizes(), wide);
  level_table(dtype).rows->widen_row[int(kernel_dtype(rows.scalar_type()))](rows.const_data_ptr(),
                                                                            out.mutable_data_ptr(), rows.numel());
  return out;
}

Operand rows_of_expert_0(const at::Tensor& weight, bool transposed) {
  const int64_t size = weight.element_size();
  return {static_cast<const char*>(weight.const_data_ptr()), weight.stride(transposed ? 2 : 1) * size,
          weight.stride(transposed ? 1 : 2) * size};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> experts_cpu(
    const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& weights,
    const at::Tensor& ids, c10::string_view activation, std::optional<double> alpha, std::optional<double> limit,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias, bool transposed,
    bool interleaved, c10::string_view weight_placement, bool save, c10::string_view weight_format,
    const std::optional<at::Tensor>& gate_up_scale, const std::optional<at::Tensor>& down_scale,
    const std::optional<at::Tensor>& gate_up_zero, const std::optional<at::Tensor>& down_zero, c10::string_view mode,
    c10::string_view) {
  const bool quantized = is_quantized(weight_format);
  if (quantized && x.scalar_type() == at::kDouble) {
    static const auto routed = routed_op<decltype(experts_cpu)>("polymoe::experts");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return routed.call(x, gate_up, down, weights, ids, activation, alpha, limit, gate_up_bias, down_bias, transposed,
                       interleaved, weight_placement, save, weight_format, gate_up_scale, down_scale, gate_up_zero,
                       down_zero, mode, "reference");
  }
  const ActivationSpec spec = parse_activation(kOp, "activation", activation, alpha, limit);
  POLYMOE_CHECK(!interleaved || is_gated(spec.kind), kOp, "interleaved", c10::str("False with '", activation, "'"),
                "True");
  const WeightPlacement placement = parse_placement(weight_placement);
  std::optional<QuantizedWeight> up_stored, down_stored;
  WeightFormat format;
  if (quantized) {
    POLYMOE_CHECK(!transposed, kOp, "transposed", c10::str("False for ", weight_format), "True");
    check_x(x);
    up_stored = check_quantized(kOp, {"gate_up", "gate_up_scale", "gate_up_zero"}, gate_up, gate_up_scale, gate_up_zero,
                                weight_format, mode, x.size(1));
    POLYMOE_CHECK(down.dim() == 3 && down.size(0) == up_stored->groups && down.size(1) == x.size(1), kOp, "down",
                  c10::str("a tensor [E=", up_stored->groups, ", H=", x.size(1), ", data of I]"), describe(down));
    const int64_t I = up_stored->rows / (is_gated(spec.kind) ? 2 : 1);
    down_stored =
        check_quantized(kOp, {"down", "down_scale", "down_zero"}, down, down_scale, down_zero, weight_format, mode, I);
    format = up_stored->format;
  } else {
    const StoredAs stored = parse_weight_format(kOp, weight_format);
    POLYMOE_CHECK(stored.matrices == 1, kOp, "weight_format", "'plain', 'packed' or a quantised format", "'",
                  weight_format, "'");
    format = stored.format;
    check_unquantized(kOp, weight_format, mode,
                      {{"gate_up_scale", gate_up_scale},
                       {"down_scale", down_scale},
                       {"gate_up_zero", gate_up_zero},
                       {"down_zero", down_zero}});
  }
  const Shapes s = check_shapes(x, gate_up, down, weights, ids, is_gated(spec.kind), transposed, quantized);
  if (format == WeightFormat::packed) {
    check_contiguous(kOp, "gate_up", gate_up);
    check_contiguous(kOp, "down", down);
  }
  const at::Tensor up_bias =
      check_bias("gate_up_bias", gate_up_bias, x, {"E", s.E}, {is_gated(spec.kind) ? "2I" : "I", s.width});
  const at::Tensor out_bias = check_bias("down_bias", down_bias, x, {"E", s.E}, {"H", s.H});

  const Dtype dtype = kernel_dtype(x.scalar_type());
  const at::Tensor rows = s.H > 1 && x.stride(1) != 1 ? x.contiguous() : x;
  const at::Tensor routing = widen(weights, dtype);
  const at::Tensor out = empty({s.T, s.H}, x.scalar_type());
  const at::Tensor pre = save ? empty({s.T * s.K, s.width}, x.scalar_type()) : empty({0}, x.scalar_type());

  const int64_t size = x.element_size();
  ExpertsArguments args{};
  args.dtype = dtype;
  args.hidden = s.H;
  args.intermediate = s.I;
  args.experts = s.E;
  args.slots = s.K;
  args.activation = spec;
  args.placement = placement;
  args.interleaved = interleaved;
  args.format = format;
  args.x_stride = rows.stride(0) * size;
  args.gate_up = rows_of_expert_0(gate_up, transposed);
  args.down = rows_of_expert_0(down, transposed);
  args.gate_up_expert_stride = gate_up.stride(0) * gate_up.element_size();
  args.down_expert_stride = down.stride(0) * down.element_size();
  args.quantized_gate_up = up_stored ? &*up_stored : nullptr;
  args.quantized_down = down_stored ? &*down_stored : nullptr;
  if (up_bias.defined()) {
    args.gate_up_bias = static_cast<const char*>(up_bias.const_data_ptr());
    args.gate_up_bias_dtype = kernel_dtype(up_bias.scalar_type());
  }
  if (out_bias.defined()) {
    args.down_bias = static_cast<const char*>(out_bias.const_data_ptr());
    args.down_bias_dtype = kernel_dtype(out_bias.scalar_type());
  }

  PlanTensors whole;
  if (save) {
    whole = build_plan(ids, s.E);
    args.pre_activation = static_cast<char*>(pre.mutable_data_ptr());
    const int64_t used = pointers(whole).offsets[s.E];
    pre.narrow(0, used, s.T * s.K - used).zero_();
  }
  const int64_t step = std::max<int64_t>(1, kChunkSlots / std::max<int64_t>(s.K, 1));
  for (int64_t begin = 0; begin < s.T; begin += step) {
    args.tokens = std::min(step, s.T - begin);
    args.x = static_cast<const char*>(rows.const_data_ptr()) + begin * args.x_stride;
    args.weights = static_cast<const char*>(routing.const_data_ptr()) + begin * s.K * routing.element_size();
    args.out = static_cast<char*>(out.mutable_data_ptr()) + begin * s.H * size;
    if (save) args.pre_activation_row = pointers(whole).slot_row + begin * s.K;
    if (save && args.tokens == s.T) {
      run_experts(args, pointers(whole));
    } else {
      run_experts(args, chunk_plan(args.tokens == s.T ? ids : ids.narrow(0, begin, args.tokens), s.E));
    }
  }
  if (!save) return {out, pre, empty({0}, at::kInt), empty({0}, at::kInt), empty({0}, at::kInt)};
  return {out, pre, whole.offsets, whole.row_slot, whole.slot_row};
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "experts", experts_cpu); }

}  // namespace
}  // namespace polymoe
