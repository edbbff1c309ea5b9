// What the ops that multiply matrices share: packed panels of A, rows of W wherever they lie in memory, and scratch
// memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "table.h"
#include "tiling.h"

namespace polymoe {

// The kernels' name of a tensor's dtype, which must be one of the four.
Dtype kernel_dtype(at::ScalarType dtype);

// Accumulators, biases and pre-activations are f32, and f64 for f64.
inline int64_t accumulator_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }
inline at::ScalarType accumulator_dtype(Dtype dtype) { return dtype == Dtype::f64 ? at::kDouble : at::kFloat; }

// A bias of x's dtype or f32, contiguous, in a dtype that RowTable::widen_row turns into accumulators: f64 has to be
// f64 already, but widens a bias that is not.
at::Tensor kernel_bias(const at::Tensor& bias, Dtype dtype);

// A matrix in memory, one row per row of A or of W: strides in bytes, `d` along the reduction.
struct Operand {
  const char* data;
  int64_t row_stride;
  int64_t d_stride;

  Operand at(int64_t row) const { return {data + row * row_stride, row_stride, d_stride}; }
};

// Memory of the calling thread, 64-byte aligned, kept for the thread's next use of the same slot; contents undefined.
enum class Scratch : int { panel, weights, accumulators, row, bias, sums, plan, activations, rounded };
inline constexpr int kScratches = 9;
char* scratch(Scratch slot, int64_t bytes);

// Memory of one call, aligned alike: the thread's own where it is little, which the allocator would slow down, and
// where it is much freed with the object.
class Memory {
 public:
  Memory() = default;
  Memory(Scratch slot, int64_t bytes);
  char* data() const { return data_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> owned_;
  char* data_ = nullptr;
};

// Copies elements [0, d) of rows [0, rows) to out[row][element], whatever the strides.
void copy_rows(const Operand& from, int64_t rows, int64_t d, int64_t element_size, char* out);

// The kernel for weights of this format and dtype at the level of `table`.
inline const GemmKernel& gemm_kernel(const LevelTable& table, WeightFormat format, Dtype dtype) {
  return *table.gemm[int(format)]->by_dtype[int(dtype)];
}

// Rows of A packed for GemmKernel::multiply.
class Panel {
 public:
  Panel(const GemmKernel& kernel, int64_t rows, int64_t d)
      : kernel_(kernel), groups_(rows, kernel.max_rows), row_bytes_(row_bytes(kernel, d)), rows_(rows) {}

  static int64_t row_bytes(const GemmKernel& kernel, int64_t d) {
    return ceil_div(d, kernel.step) * kernel.step * kernel.packed_size;
  }
  // Of a row of `d` elements, what the caches should hold while it is multiplied.
  static int64_t resident_bytes(const GemmKernel& kernel, int64_t d) {
    return row_bytes(kernel, kernel.slice ? std::min(d, kernel.slice) : d);
  }
  int64_t bytes() const { return rows_ * row_bytes_; }

  // Packs elements [begin, begin + d) of all rows; row(r) points to these elements of row r. `begin` is a multiple of
  // the kernel's step.
  template <class Row>
  void pack(char* panel, int64_t begin, int64_t d, Row&& row) const {
    constexpr int kMaxRows = 32;
    const char* rows[kMaxRows];
    if (d == 0) return;
    for (int64_t group = 0; group < groups_.count; ++group) {
      const int64_t first = groups_.first_row(group);
      const int count = groups_.rows(group);
      for (int r = 0; r < count; ++r) rows[r] = row(first + r);
      kernel_.pack_rows(rows, count, d, panel + first * row_bytes_ + begin * count * kernel_.packed_size);
    }
  }

  // Fills the panel with rows that were packed one by one; row(r) points to row r.
  template <class Row>
  void copy(char* panel, Row&& row) const {
    const int64_t step_bytes = int64_t(kernel_.step) * kernel_.packed_size, steps = row_bytes_ / step_bytes;
    for (int64_t group = 0; group < groups_.count; ++group) {
      const int64_t first = groups_.first_row(group);
      const int count = groups_.rows(group);
      char* const out = panel + first * row_bytes_;
      for (int r = 0; r < count; ++r) {
        const char* const from = row(first + r);
        for (int64_t s = 0; s < steps; ++s)
          std::memcpy(out + (s * count + r) * step_bytes, from + s * step_bytes, size_t(step_bytes));
      }
    }
  }

 private:
  const GemmKernel& kernel_;
  RowGroups groups_;
  int64_t row_bytes_, rows_;
};

// One of `count` even parts of [0, total).
inline std::pair<int64_t, int64_t> even_part(int64_t total, int64_t count, int64_t index) {
  return {total * index / count, total * (index + 1) / count};
}

}  // namespace polymoe
