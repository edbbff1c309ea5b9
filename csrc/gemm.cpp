#include "gemm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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

// Copies a tile of kTile rows by kTile elements: element k of row r is at from + r * sizeof(T) + k * stride.
constexpr int64_t kTile = 8;

template <class T>
void transpose_tile(const char* from, int64_t stride, T* out, int64_t out_stride) {
  for (int64_t k = 0; k < kTile; ++k)
    for (int64_t r = 0; r < kTile; ++r)
      std::memcpy(out + r * out_stride + k, from + k * stride + r * sizeof(T), sizeof(T));
}

#if defined(__SSE2__)
// Every x86-64 has these instructions, and this is most of the time of one token through transposed weights.
template <>
void transpose_tile<uint16_t>(const char* from, int64_t stride, uint16_t* out, int64_t out_stride) {
  __m128i a[8], b[8];
  for (int k = 0; k < 8; ++k) a[k] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k * stride));
  for (int k = 0; k < 4; ++k) {
    b[2 * k] = _mm_unpacklo_epi16(a[2 * k], a[2 * k + 1]);      // rows 0 to 3, elements 2k and 2k + 1
    b[2 * k + 1] = _mm_unpackhi_epi16(a[2 * k], a[2 * k + 1]);  // rows 4 to 7
  }
  for (int half = 0; half < 2; ++half) {  // rows 0 to 3, then 4 to 7
    const __m128i low01 = _mm_unpacklo_epi32(b[half], b[half + 2]), low23 = _mm_unpackhi_epi32(b[half], b[half + 2]);
    const __m128i high01 = _mm_unpacklo_epi32(b[half + 4], b[half + 6]);
    const __m128i high23 = _mm_unpackhi_epi32(b[half + 4], b[half + 6]);
    const __m128i rows[4] = {_mm_unpacklo_epi64(low01, high01), _mm_unpackhi_epi64(low01, high01),
                             _mm_unpacklo_epi64(low23, high23), _mm_unpackhi_epi64(low23, high23)};
    for (int r = 0; r < 4; ++r)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (4 * half + r) * out_stride), rows[r]);
  }
}
#endif

template <class T>
void copy_strided(const Operand& from, int64_t rows, int64_t d, T* out) {
  // Blocks that the L1 cache holds on both sides, whichever way the source runs.
  constexpr int64_t block = 64;
  const bool tiles = from.row_stride == int64_t(sizeof(T));
  for (int64_t d0 = 0; d0 < d; d0 += block) {
    const int64_t d1 = std::min(d0 + block, d);
    for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
      const int64_t r1 = std::min(r0 + kTile, rows);
      int64_t k = d0;
      if (tiles && r1 - r0 == kTile)
        for (; k + kTile <= d1; k += kTile)
          transpose_tile(from.data + r0 * from.row_stride + k * from.d_stride, from.d_stride, out + r0 * d + k, d);
      for (; k < d1; ++k)
        for (int64_t r = r0; r < r1; ++r)
          std::memcpy(out + r * d + k, from.data + r * from.row_stride + k * from.d_stride, sizeof(T));
    }
  }
}

}  // namespace

at::Tensor kernel_bias(const at::Tensor& bias, Dtype dtype) {
  return (dtype == Dtype::f64 ? bias.to(at::kDouble) : bias).contiguous();
}

char* scratch(Scratch slot, int64_t bytes) {
  thread_local Buffer buffers[kScratches];
  Buffer& buffer = buffers[int(slot)];
  if (buffer.bytes < bytes) {
    const int64_t rounded = ceil_div(bytes, 4096) * 4096;
    buffer.memory.reset(static_cast<char*>(std::aligned_alloc(64, size_t(rounded))));
    buffer.bytes = buffer.memory ? rounded : 0;
    if (!buffer.memory) throw std::bad_alloc();
  }
  return buffer.memory.get();
}

Memory::Memory(Scratch slot, int64_t bytes) {
  constexpr int64_t kLittle = 1 << 20;
  if (bytes > kLittle) {
    owned_.reset(static_cast<char*>(std::aligned_alloc(64, size_t(ceil_div(bytes, 64) * 64))));
    if (!owned_) throw std::bad_alloc();
  }
  data_ = owned_ ? owned_.get() : scratch(slot, bytes);
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

}  // namespace polymoe
