// What the ops that multiply matrices share: packed panels of A, rows of W wherever they lie in memory, and scratch
// memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
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
enum class Scratch : int { panel, weights, accumulators, row, bias };
char* scratch(Scratch slot, int64_t bytes);

// Copies elements [0, d) of rows [0, rows) to out[row][element], whatever the strides.
void copy_rows(const Operand& from, int64_t rows, int64_t d, int64_t element_size, char* out);

// Rows of A packed for DenseGemm::multiply.
class Panel {
 public:
  Panel(const DenseGemm& gemm, int64_t rows, int64_t d)
      : gemm_(&gemm),
        groups_(rows, gemm.max_rows),
        step_bytes_(int64_t(gemm.step) * gemm.packed_size),
        row_bytes_(row_bytes(gemm, d)),
        rows_(rows) {}

  static int64_t row_bytes(const DenseGemm& gemm, int64_t d) {
    return (d + gemm.step - 1) / gemm.step * gemm.step * gemm.packed_size;
  }
  int64_t bytes() const { return rows_ * row_bytes_; }

  // Packs elements [begin, begin + d) of a row from `source`, which holds just these; begin is a multiple of the step.
  void pack(char* panel, int64_t row, const char* source, int64_t begin, int64_t d) const {
    if (d == 0) return;
    const int64_t group = groups_.group_of(row), first = groups_.first_row(group), rows = groups_.rows(group);
    char* const place = panel + first * row_bytes_ + (begin / gemm_->step * rows + (row - first)) * step_bytes_;
    gemm_->pack_row(source, d, place, rows * step_bytes_);
  }

 private:
  const DenseGemm* gemm_;
  RowGroups groups_;
  int64_t step_bytes_, row_bytes_, rows_;
};

// One of `count` even parts of [0, total).
inline std::pair<int64_t, int64_t> even_part(int64_t total, int64_t count, int64_t index) {
  return {total * index / count, total * (index + 1) / count};
}

}  // namespace polymoe
