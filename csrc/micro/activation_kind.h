// From an activation as a value to one as a constant of the code.
#pragma once

#include "activation.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

template <Activation kind>
struct Kind {
  static constexpr Activation value = kind;
};

// f(Kind<kind>{})
template <class F>
inline void with_kind(Activation kind, F f) {
#define POLYMOE_CASE(name) \
  case Activation::name:   \
    return f(Kind<Activation::name>{});
  switch (kind) {
    POLYMOE_CASE(swiglu)
    POLYMOE_CASE(swiglu_clamped)
    POLYMOE_CASE(swiglu_clamped_after)
    POLYMOE_CASE(swiglu_oai)
    POLYMOE_CASE(geglu)
    POLYMOE_CASE(geglu_tanh)
    POLYMOE_CASE(reglu)
    POLYMOE_CASE(softcapped)
    POLYMOE_CASE(silu)
    POLYMOE_CASE(gelu)
    POLYMOE_CASE(gelu_tanh)
    POLYMOE_CASE(relu)
    POLYMOE_CASE(relu2)
  }
#undef POLYMOE_CASE
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
