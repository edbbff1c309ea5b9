// What kernels of the modes "int8" and "int8_g128" ask for while they multiply: the rows of W that will be read next.
#pragma once

#include "../formats/quantized.h"
#include "int8_piece.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// A tile asks for the rows side by side, an equal part of the lines with every piece: the fill buffers of the L1 cache
// are few, and its own loads need them, too.
struct Ahead {
  static constexpr int kMost = 2 * VF::width;

  const char* row[kMost];
  int count = 0;
  int64_t piece_bytes = 0;
  int per_line = 1;  // pieces, a power of two

  Ahead() = default;
  // Up to `most` <= kMost rows, whose pieces take `bytes` bytes, from column `next` of n on, or where the next call
  // begins.
  Ahead(const Weights& w, int64_t next, int64_t n, int64_t most, int64_t bytes)
      : piece_bytes(bytes), per_line(int(64 / bytes)) {
    const QuantizedMatrix& m = *w.matrix;
    for (; count < most; ++count) {
      if (next < n ? next + count >= n : !w.next) return;
      row[count] =
          next < n ? m.data + matrix_row(w, next + count) * m.data_stride : w.next + count * w.row_step * m.data_stride;
    }
  }

  // For rows [first, last), with piece p.
  void ask(int64_t p, int first, int last) const {
    for (int r = first + int(p & (per_line - 1)); r < last; r += per_line)
      __builtin_prefetch(row[r] + p * piece_bytes, 0, 2);
  }
};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
