// Rows of W evenly apart: their addresses take fewer registers than there are rows.
#pragma once

#include "../formats/quantized.h"
#include "gemm_kernel.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

struct EvenRows {
  const char* from = nullptr;
  int64_t stride = 0;

  [[gnu::always_inline]] const char* row(int r) const { return from + r * stride; }
};

// `rows` quantised rows of `bytes` bytes, those of columns from `column` on, at `row`; past `count` they repeat. Where
// they lie, if evenly, and if `padded` is no more than `bytes`; else a copy, with zeros up to `padded` bytes.
inline EvenRows even_rows(const Weights& w, int64_t column, int64_t count, const char* const* row, int rows,
                          int64_t bytes, int64_t padded, char* copy) {
  const bool one_run = column + rows <= w.split || column >= w.split;
  if (count >= rows && one_run && padded == bytes) return {row[0], w.row_step * w.matrix->data_stride};
  for (int r = 0; r < rows; ++r) {
    __builtin_memcpy(copy + r * padded, row[r], size_t(bytes));
    __builtin_memset(copy + r * padded + bytes, 0, size_t(padded - bytes));
  }
  return {copy, padded};
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
