// What activate and its gradient share: rows of the pre-activation as f32, and the checks of their arguments.
#pragma once

#include <optional>

#include "activation_spec.h"
#include "row_op.h"

namespace polymoe {

// Reads a part of a row as f32 (f64 for f64).
struct Reader {
  Operand matrix;
  Dtype dtype;
  void (*widen_row)(const void*, void*, int64_t);

  const char* read(int64_t row, int64_t begin, int64_t n, char* wide) const {
    char* const copy = scratch(Scratch::row, kTileColumns * 8);
    const bool is_wide = dtype == Dtype::f32 || dtype == Dtype::f64;
    const char* const narrow = contiguous_row(matrix, row, begin, n, size_of(dtype), is_wide ? wide : copy);
    if (is_wide) return narrow;
    widen_row(narrow, wide, n);
    return wide;
  }
};

struct Halves {
  Operand gate, up;
};

inline Halves split(const at::Tensor& h, int64_t I, bool interleaved) {
  const Operand all = rows_of(h);
  if (!interleaved) return {all, {all.data + I * all.d_stride, all.row_stride, all.d_stride}};
  return {{all.data, all.row_stride, 2 * all.d_stride}, {all.data + all.d_stride, all.row_stride, 2 * all.d_stride}};
}

// Raises ValueError unless h is [S, 2I] or [S, I], as the activation has it.
void check_activation_rows(const char* op, const at::Tensor& h, c10::string_view kind, bool gated, bool interleaved);

// The slots of a plan's rows, contiguous; undefined when there are none.
at::Tensor activation_slots(const char* op, const std::optional<at::Tensor>& row_slot, int64_t S);

// Contiguous weights by slot, f32 (f64 for f64); undefined when there are none.
at::Tensor activation_weights(const char* op, const at::Tensor& h, const std::optional<at::Tensor>& row_slot,
                              const std::optional<at::Tensor>& weights, at::ScalarType result);

}  // namespace polymoe
