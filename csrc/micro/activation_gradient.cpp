// What autograd needs of an activation: each formula as a product of a factor of the gate and a factor of up, with the
// slopes of both. Beyond a few units in the last place nothing here follows the forward's bits.
#include "activation.h"
#include "activation_kind.h"
#include "math.h"
#include "span.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

template <class V>
struct Factor {
  V value, slope;
};

template <class V>
struct Sigmoids {
  V of, of_minus;  // sigmoid(x) and sigmoid(-x), neither by subtraction
};

template <class V>
inline Sigmoids<V> sigmoids(V x) {
  const V one = set<V>(1), e = exp(set<V>(0) - abs(x));
  const V larger = one / (one + e), smaller = e / (one + e);
  const auto negative = less(x, set<V>(0));
  return {select(negative, smaller, larger), select(negative, larger, smaller)};
}

// Bounds keep infinity times zero out of tails that are constant or straight to the last bit. NaN passes.
template <class V>
inline V bounded(V x, V bound) {
  return min(bound, max(set<V>(0) - bound, x));
}

// z * sigmoid(alpha z)
template <class V>
inline Factor<V> scaled_silu_factor(V z, V alpha) {
  const V x = bounded(alpha * z, set<V>(1000)), one = set<V>(1);
  const auto [s, s_minus] = sigmoids(x);
  return {z * s, s * (one + x * s_minus)};
}

// z * Phi(z); the slope Phi(z) + z * density(z) takes Phi from gelu, and near zero from its tangent.
template <class V>
inline Factor<V> gelu_factor(V z) {
  const V x = bounded(z, set<V>(40)), near = set<V>(0x1p-18f);
  const auto is_near = less(abs(x), near);
  const V density = set<V>(0.39894228040143267794) * exp(set<V>(-0.5) * x * x);
  const V tangent = set<V>(0.5) + x * set<V>(0.39894228040143267794);
  const V phi = select(is_near, tangent, gelu(x) / select(is_near, set<V>(1), x));
  return {gelu(z), phi + x * density};
}

// z * sigmoid(y), y = 2 sqrt(2 / pi) (z + 0.044715 z^3)
template <class V>
inline Factor<V> gelu_tanh_factor(V z) {
  const V x = bounded(z, set<V>(40)), one = set<V>(1), square = x * x;
  const V factor = set<V>(1.59576912160573071176), cubic = set<V>(0.044715);
  const auto [s, s_minus] = sigmoids(factor * (x + cubic * square * x));
  const V slope = factor * (one + set<V>(3 * 0.044715) * square);
  return {gelu_tanh(z), s * (one + x * slope * s_minus)};
}

template <class V>
inline Factor<V> relu_factor(V z) {
  return {max(set<V>(0), z), select(less(set<V>(0), z), set<V>(1), set<V>(0))};
}

// cap * tanh(z / cap)
template <class V>
inline Factor<V> capped_factor(V z, V cap) {
  const V t = tanh(z / cap);
  return {cap * t, set<V>(1) - t * t};
}

// The slope is zero where the bound acted and whole on it.
template <class V>
inline Factor<V> at_most(V z, V high) {
  return {min(high, z), select(less(high, z), set<V>(0), set<V>(1))};
}
template <class V>
inline Factor<V> within(V z, V bound) {
  const V low = set<V>(0) - bound;
  const Factor<V> above = at_most(z, bound);
  return {max(low, above.value), select(less(z, low), set<V>(0), above.slope)};
}

template <class V>
struct Parameters {
  explicit Parameters(const ActivationSpec& spec) : alpha(set<V>(spec.alpha)), limit(set<V>(spec.limit)) {}
  V alpha, limit;
};

template <Activation kind, class V>
inline Factor<V> gate_factor(const Parameters<V>& p, V g) {
  const V one = set<V>(1);
  if constexpr (kind == Activation::swiglu || kind == Activation::silu) return scaled_silu_factor(g, one);
  if constexpr (kind == Activation::geglu || kind == Activation::gelu) return gelu_factor(g);
  if constexpr (kind == Activation::geglu_tanh || kind == Activation::gelu_tanh) return gelu_tanh_factor(g);
  if constexpr (kind == Activation::reglu || kind == Activation::relu) return relu_factor(g);
  if constexpr (kind == Activation::relu2) {
    const V positive = max(set<V>(0), g);
    return {positive * positive, positive + positive};
  }
  if constexpr (kind == Activation::swiglu_clamped || kind == Activation::swiglu_oai) {
    const Factor<V> z = at_most(g, p.limit);
    const Factor<V> silu = scaled_silu_factor(z.value, kind == Activation::swiglu_oai ? p.alpha : one);
    return {silu.value, silu.slope * z.slope};
  }
  if constexpr (kind == Activation::swiglu_clamped_after) {
    const Factor<V> silu = scaled_silu_factor(g, one), z = at_most(silu.value, p.limit);
    return {z.value, silu.slope * z.slope};
  }
  if constexpr (kind == Activation::softcapped) {
    const Factor<V> capped = capped_factor(g, p.alpha);
    const auto [s, s_minus] = sigmoids(g);
    return {capped.value * s, capped.slope * s + capped.value * s * s_minus};
  }
}

template <Activation kind, class V>
inline Factor<V> up_factor(const Parameters<V>& p, V u) {
  if constexpr (kind == Activation::softcapped) return capped_factor(u, p.limit);
  if constexpr (kind == Activation::swiglu_clamped || kind == Activation::swiglu_clamped_after)
    return within(u, p.limit);
  if constexpr (kind == Activation::swiglu_oai) {
    const Factor<V> z = within(u, p.limit);
    return {z.value + set<V>(1), z.slope};
  }
  return {u, set<V>(1)};
}

template <class Out, Activation kind>
void gradient(const ActivationSpec& spec, const ActivationGradient& row, int64_t n) {
  using V = typename Compute<Out>::Vector;
  using Value = typename Compute<Out>::Value;
  const auto in = [](const void* p) { return static_cast<const Value*>(p); };
  const Value *gate = in(row.gate), *up = in(row.up), *grad = in(row.grad);
  Out *d_gate = static_cast<Out*>(row.d_gate), *d_up = static_cast<Out*>(row.d_up);
  const Parameters<V> parameters(spec);
  const V w = set<V>(row.weight ? *in(row.weight) : Value(1));
  V dots = set<V>(0);
  for_vectors<V>(n, [&](int64_t i, auto part) {
    const V d = read<V>(grad + i, part), weighted = d * w;
    const Factor<V> left = gate_factor<kind>(parameters, read<V>(gate + i, part));
    if constexpr (is_gated(kind)) {
      const Factor<V> right = up_factor<kind>(parameters, read<V>(up + i, part));
      write(d_gate + i, weighted * left.slope * right.value, part);
      write(d_up + i, weighted * left.value * right.slope, part);
      dots = dots + d * (left.value * right.value);
    } else {
      write(d_gate + i, weighted * left.slope, part);
      dots = dots + d * left.value;
    }
  });
  *static_cast<Value*>(row.dot) = sum(dots);
}

template <class Out>
void gradient_row(const ActivationSpec& spec, const ActivationGradient& row, int64_t n) {
  with_kind(spec.kind, [&](auto kind) { gradient<Out, kind.value>(spec, row, n); });
}

}  // namespace

extern const ActivationGradientTable activation_gradient_table;
const ActivationGradientTable activation_gradient_table = {{
    gradient_row<float>,
    gradient_row<bf16>,
    gradient_row<f16>,
#if defined(POLYMOE_LEVEL_PORTABLE)
    gradient_row<double>,
#else
    nullptr,
#endif
}};

}  // namespace polymoe::POLYMOE_LEVEL
