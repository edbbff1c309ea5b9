// The activation between the two matmuls of an expert, of one ISA level.
//
// One routine serves the `activate` op and the fused `experts`, so both give the same bits. Arithmetic is independent
// by lane and masked at the end of a row, so that the bits do not depend on where a row is cut either.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtype.h"

namespace polymoe {

// Gated kinds come before silu.
enum class Activation : int {
  swiglu,
  swiglu_clamped,
  swiglu_clamped_after,
  swiglu_oai,
  geglu,
  geglu_tanh,
  reglu,
  softcapped,
  silu,
  gelu,
  gelu_tanh,
  relu,
  relu2,
};
constexpr int kActivations = 13;

constexpr bool is_gated(Activation kind) { return kind < Activation::silu; }

struct ActivationSpec {
  Activation kind;
  double alpha;
  double limit;  // +infinity when there is none
};

// Inputs are f32, or f64 when the output is f64. Entries for f64 exist at the portable level alone.
struct ActivationTable {
  // out[i] = activation(gate[i], up[i]) * weight[0], rounded once; `up` is null for ungated kinds, `weight` may be
  // null.
  void (*activate_row[kDtypes])(const ActivationSpec& spec, const void* gate, const void* up, const void* weight,
                                void* out, int64_t n);
};

}  // namespace polymoe
