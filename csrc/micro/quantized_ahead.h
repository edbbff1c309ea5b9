// The rows of quantised weights that will be read next, to be asked for meanwhile.
#pragma once

#include "../formats/quantized.h"
#include "streams.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// The row of the matrix that column `next` of n is, or that the next call begins with: counted from this matrix on, for
// experts lie one after the other. -1 where neither is known.
inline int64_t row_ahead(const Weights& w, int64_t next, int64_t n) {
  if (next < n) return matrix_row(w, next);
  return w.next && w.matrix->data_stride ? (w.next - w.matrix->data) / w.matrix->data_stride : -1;
}

// Of up to `rows` quantised rows of d elements from column `next` of n on; past n, of as many strips of `rows` from
// where the next call begins.
inline Streams streams_ahead(const Weights& w, int64_t next, int64_t n, int64_t rows, int64_t d, int bits) {
  const QuantizedMatrix& m = *w.matrix;
  const int64_t stride = w.row_step * m.data_stride, bytes = (d * bits + 7) / 8;
  if (next >= n) {
    if (!w.next) return {};
    const int64_t past = next - (n + rows - 1) / rows * rows;
    return Streams(w.next + (past > 0 ? past : 0) * stride, rows, bytes, stride);
  }
  return Streams(m.data + matrix_row(w, next) * m.data_stride, n - next < rows ? n - next : rows, bytes, stride);
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
