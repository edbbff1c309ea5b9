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

// A part of a row, as the gradient of an activation sees it. Inputs are f32, or f64 where the outputs are f64.
struct ActivationGradient {
  const void *gate, *up;  // of the forward; `up` is null for ungated kinds
  const void* grad;       // of the result
  const void* weight;     // one number, or null
  void *d_gate, *d_up;    // rounded once; d_up is null for ungated kinds
  void* dot;              // f32 (f64): the sum of grad[i] * activation[i], without the weight
};

struct ActivationGradientTable {
  // n is at most 2048, so that a lane of the dot product sums few terms. By the type of d_gate and d_up.
  void (*gradient_row[kDtypes])(const ActivationSpec& spec, const ActivationGradient& row, int64_t n);
};

}  // namespace polymoe
