#include "activation.h"

#include "activation_kind.h"
#include "math.h"
#include "span.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

template <class V>
struct Parameters {
  explicit Parameters(const ActivationSpec& spec)
      : scale(spec.alpha), alpha(set<V>(spec.alpha)), limit(set<V>(spec.limit)), minus_limit(set<V>(-spec.limit)) {}
  SigmoidScale<V> scale;
  V alpha, limit, minus_limit;
};

// min and max return their second argument for a NaN, so NaN passes through all of these.
template <class V>
inline V at_most_limit(const Parameters<V>& p, V x) {
  return min(p.limit, x);
}
template <class V>
inline V within_limit(const Parameters<V>& p, V x) {
  return max(p.minus_limit, min(p.limit, x));
}
template <class V>
inline V rectified(V x) {
  return max(set<V>(0), x);
}

template <Activation kind, class V>
inline V activation(const Parameters<V>& p, V g, V u) {
  if constexpr (kind == Activation::swiglu) return silu(g) * u;
  if constexpr (kind == Activation::swiglu_clamped) return silu(at_most_limit(p, g)) * within_limit(p, u);
  if constexpr (kind == Activation::swiglu_clamped_after) return at_most_limit(p, silu(g)) * within_limit(p, u);
  if constexpr (kind == Activation::swiglu_oai)
    return scaled_silu(at_most_limit(p, g), p.scale) * (within_limit(p, u) + set<V>(1));
  if constexpr (kind == Activation::geglu) return gelu(g) * u;
  if constexpr (kind == Activation::geglu_tanh) return gelu_tanh(g) * u;
  if constexpr (kind == Activation::reglu) return rectified(g) * u;
  if constexpr (kind == Activation::softcapped)
    return product_with_sigmoid(p.alpha * tanh(g / p.alpha), g) * (p.limit * tanh(u / p.limit));
  if constexpr (kind == Activation::silu) return silu(g);
  if constexpr (kind == Activation::gelu) return gelu(g);
  if constexpr (kind == Activation::gelu_tanh) return gelu_tanh(g);
  if constexpr (kind == Activation::relu) return rectified(g);
  if constexpr (kind == Activation::relu2) return rectified(g) * rectified(g);
}

template <class Out, Activation kind>
void activate(const ActivationSpec& spec, const void* gate, const void* up, const void* weight, void* out, int64_t n) {
  using V = typename Compute<Out>::Vector;
  using Value = typename Compute<Out>::Value;
  const Value* g = static_cast<const Value*>(gate);
  const Value* u = is_gated(kind) ? static_cast<const Value*>(up) : g;
  Out* to = static_cast<Out*>(out);
  const Parameters<V> parameters(spec);
  // A product with 1 is exact, so a row without a weight needs no code of its own.
  const V w = set<V>(weight ? *static_cast<const Value*>(weight) : Value(1));
  for_vectors<V>(n, [&](int64_t i, auto part) {
    const V a = activation<kind>(parameters, read<V>(g + i, part), read<V>(u + i, part));
    write(to + i, a * w, part);
  });
}

template <class Out>
void activate_row(const ActivationSpec& spec, const void* gate, const void* up, const void* weight, void* out,
                  int64_t n) {
  with_kind(spec.kind, [&](auto kind) { activate<Out, kind.value>(spec, gate, up, weight, out, n); });
}

}  // namespace

extern const ActivationTable activation_table;
const ActivationTable activation_table = {{
    activate_row<float>,
    activate_row<bf16>,
    activate_row<f16>,
#if defined(POLYMOE_LEVEL_PORTABLE)
    activate_row<double>,
#else
    nullptr,
#endif
}};

}  // namespace polymoe::POLYMOE_LEVEL
