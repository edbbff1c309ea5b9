// What the ops that work row by row share: dispatch, activate, combine.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "gemm.h"
#include "threads.h"

namespace polymoe {

// Elements of one row that a task works on at a time, few enough that its scratch rows stay in the L1 or L2 cache.
constexpr int64_t kTileColumns = 2048;

// Calls fn(row, begin, end) for every row and every tile of its columns, in parallel when there is enough to do.
// `element_bytes`: memory moved per element.
template <class F>
void for_row_tiles(int64_t rows, int64_t columns, int64_t element_bytes, F fn) {
  constexpr int64_t kSerialBytes = 128 * 1024;  // less is done sooner than a thread wakes up
  constexpr int64_t kChunksPerThread = 8;
  const int64_t per_row = ceil_div(columns, kTileColumns), tiles = rows * per_row;
  const auto run = [&](Range range) {
    for (int64_t tile = range.begin; tile < range.end; ++tile) {
      const int64_t begin = tile % per_row * kTileColumns;
      fn(tile / per_row, begin, std::min(begin + kTileColumns, columns));
    }
  };
  const int threads = num_threads();
  if (threads == 1 || rows * columns * element_bytes < kSerialBytes) return run({0, tiles});
  const int64_t chunk = std::max<int64_t>(1, tiles / (threads * kChunksPerThread));
  DynamicTasks queue(tiles);
  parallel_region(static_cast<int>(std::min<int64_t>(threads, tiles)), [&](int) {
    for (Range range = queue.next(chunk); !range.empty(); range = queue.next(chunk)) run(range);
  });
}

// A matrix as the kernels read it.
inline Operand rows_of(const at::Tensor& matrix) {
  const int64_t size = matrix.element_size();
  return {static_cast<const char*>(matrix.const_data_ptr()), matrix.stride(0) * size, matrix.stride(1) * size};
}

// Elements [begin, begin + n) of a row, contiguous: in place where they are already, else copied to `copy`.
inline const char* contiguous_row(const Operand& matrix, int64_t row, int64_t begin, int64_t n, int64_t element_size,
                                  char* copy) {
  const Operand part{matrix.data + row * matrix.row_stride + begin * matrix.d_stride, 0, matrix.d_stride};
  if (matrix.d_stride == element_size || n == 1) return part.data;
  copy_rows(part, 1, n, element_size, copy);
  return copy;
}

// The dtype of the result, checked: by default the input's; float64 if and only if the input is float64.
at::ScalarType output_dtype(const char* op, std::optional<at::ScalarType> out_dtype, at::ScalarType input);

// Routing weights as the kernels read them, contiguous f32 (f64 for an `input` of f64); undefined when there are none.
at::Tensor routing_weights(const char* op, const std::optional<at::Tensor>& weights,
                           std::initializer_list<at::ScalarType> accepted, int64_t T, int64_t K, Dtype input);

// One of the index tensors of a plan, made contiguous; negative entries mean "none", others are below S.
at::Tensor plan_indices(const char* op, const char* argument, const at::Tensor& indices, int64_t S);

}  // namespace polymoe
