#include "activation_spec.h"

#include <cmath>
#include <limits>
#include <string>

#include "check.h"

namespace polymoe {
namespace {

enum class Use { none, optional, required };

struct Kind {
  const char* name;
  Activation kind;
  Use alpha;
  Use limit;
};

constexpr Kind kKinds[kActivations] = {
    {"swiglu", Activation::swiglu, Use::none, Use::none},
    {"swiglu_clamped", Activation::swiglu_clamped, Use::none, Use::required},
    {"swiglu_clamped_after", Activation::swiglu_clamped_after, Use::none, Use::required},
    {"swiglu_oai", Activation::swiglu_oai, Use::optional, Use::optional},
    {"geglu", Activation::geglu, Use::none, Use::none},
    {"geglu_tanh", Activation::geglu_tanh, Use::none, Use::none},
    {"reglu", Activation::reglu, Use::none, Use::none},
    {"softcapped", Activation::softcapped, Use::required, Use::required},
    {"silu", Activation::silu, Use::none, Use::none},
    {"gelu", Activation::gelu, Use::none, Use::none},
    {"gelu_tanh", Activation::gelu_tanh, Use::none, Use::none},
    {"relu", Activation::relu, Use::none, Use::none},
    {"relu2", Activation::relu2, Use::none, Use::none},
};

std::string known_kinds() {
  std::string names = "one of ";
  for (const Kind& kind : kKinds) names += (&kind == kKinds ? "" : ", ") + std::string(kind.name);
  return names;
}

void check_number(const char* op, const char* argument, Use use, const char* kind, std::optional<double> value) {
  POLYMOE_CHECK(use != Use::none || !value, op, argument, c10::str("nothing for ", kind), *value);
  POLYMOE_CHECK(use != Use::required || value, op, argument, c10::str("a number for ", kind), "None");
  POLYMOE_CHECK(!value || (*value > 0 && std::isfinite(*value)), op, argument, "a positive finite number", *value);
}

}  // namespace

ActivationSpec parse_activation(const char* op, const char* argument, c10::string_view kind,
                                std::optional<double> alpha, std::optional<double> limit) {
  for (const Kind& known : kKinds) {
    if (kind != known.name) continue;
    check_number(op, "alpha", known.alpha, known.name, alpha);
    check_number(op, "limit", known.limit, known.name, limit);
    return {known.kind, alpha.value_or(1.702), limit.value_or(std::numeric_limits<double>::infinity())};
  }
  POLYMOE_CHECK(false, op, argument, known_kinds(), "\"", kind, "\"");
}

}  // namespace polymoe
