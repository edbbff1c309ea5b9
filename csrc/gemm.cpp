#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace polymoe {

Dtype kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_INTERNAL_ASSERT(dtype == at::kDouble);
      return Dtype::f64;
  }
}

namespace {

struct Free {
  void operator()(char* p) const { std::free(p); }
};

struct Buffer {
  std::unique_ptr<char, Free> memory;
  int64_t bytes = 0;
};

template <class T>
void copy_strided(const Operand& from, int64_t rows, int64_t d, T* out) {
  // Square blocks, so that both sides stay in the L1 cache when one is read across its rows.
  constexpr int64_t block = 32;
  for (int64_t d0 = 0; d0 < d; d0 += block) {
    const int64_t d1 = std::min(d0 + block, d);
    for (int64_t r0 = 0; r0 < rows; r0 += block) {
      const int64_t r1 = std::min(r0 + block, rows);
      for (int64_t k = d0; k < d1; ++k)
        for (int64_t r = r0; r < r1; ++r)
          std::memcpy(out + r * d + k, from.data + r * from.row_stride + k * from.d_stride, sizeof(T));
    }
  }
}

}  // namespace

char* scratch(Scratch slot, int64_t bytes) {
  thread_local Buffer buffers[5];
  Buffer& buffer = buffers[int(slot)];
  if (buffer.bytes < bytes) {
    const int64_t rounded = ceil_div(bytes, 4096) * 4096;
    buffer.memory.reset(static_cast<char*>(std::aligned_alloc(64, size_t(rounded))));
    buffer.bytes = buffer.memory ? rounded : 0;
    if (!buffer.memory) throw std::bad_alloc();
  }
  return buffer.memory.get();
}

void copy_rows(const Operand& from, int64_t rows, int64_t d, int64_t element_size, char* out) {
  if (from.d_stride == element_size) {
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(out + r * d * element_size, from.data + r * from.row_stride, size_t(d * element_size));
    return;
  }
  switch (element_size) {
    case 2:
      return copy_strided(from, rows, d, reinterpret_cast<uint16_t*>(out));
    case 4:
      return copy_strided(from, rows, d, reinterpret_cast<uint32_t*>(out));
    default:
      return copy_strided(from, rows, d, reinterpret_cast<uint64_t*>(out));
  }
}

Tiling choose_tiling(int64_t width, int64_t unit, int64_t row_bytes, int64_t groups, int threads, int64_t l2_bytes) {
  constexpr int64_t kMinRows = 16;       // fewer would read weights again too often
  constexpr int64_t kMaxRows = 256;      // more gains nothing, and a hot expert should be shared out
  constexpr int64_t kTargetColumns = 192;
  constexpr int64_t kTasksPerThread = 12;

  const int64_t rows = std::clamp(l2_bytes / 2 / std::max<int64_t>(row_bytes, 1), kMinRows, kMaxRows);
  int64_t columns = ceil_div(kTargetColumns, unit) * unit;
  while (columns > unit && groups * ceil_div(width, columns) < threads * kTasksPerThread)
    columns = ceil_div(columns / 2, unit) * unit;
  return {rows, columns};
}

}  // namespace polymoe
