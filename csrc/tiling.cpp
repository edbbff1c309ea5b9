#include "tiling.h"

#include <algorithm>

#include "micro/gemm_kernel.h"

namespace polymoe {

int64_t block_rows(int64_t row_bytes, int64_t l2_bytes) {
  constexpr int64_t kMin = 16;
  return std::clamp(l2_bytes / 2 / std::max<int64_t>(row_bytes, 1), kMin, kMostRows);
}

int64_t task_columns(int64_t width, int64_t unit, int64_t target, int64_t blocks, int threads) {
  constexpr int64_t kTasksPerThread = 12;
  const int64_t wanted = threads > 1 ? threads * kTasksPerThread : 1;
  int64_t columns = ceil_div(target, unit) * unit;
  while (columns > unit && blocks * ceil_div(width, columns) < wanted) columns = ceil_div(columns / 2, unit) * unit;
  return columns;
}

int64_t sum_columns(int64_t hidden, int64_t unit, int64_t column_bytes, int64_t l3_bytes) {
  constexpr int64_t kUnknown = 8 << 20, kMost = 32 << 20;
  const int64_t budget = std::min(l3_bytes > 0 ? l3_bytes / 2 : kUnknown, kMost);
  const int64_t units = std::max<int64_t>(ceil_div(hidden, unit), 1);
  const int64_t most = std::clamp<int64_t>(budget / (std::max<int64_t>(column_bytes, 1) * unit), 1, units);
  return ceil_div(units, ceil_div(units, most)) * unit;
}

int worthwhile_threads(int threads, int64_t rows, int64_t elements) {
  constexpr int64_t kLeast = 128 << 10;  // multiplications: some microseconds
  return rows * elements < kLeast ? 1 : threads;
}

}  // namespace polymoe
