// Register tiles of a few rows of A, one element at a time, by a few vectors of a row of W.
#include "row_gemm.h"

#include "span.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// Products that are added one after the other before the sum goes to C, which keeps f32 sums accurate.
constexpr int64_t kBlock = 128;

// A tile that fills the registers.
#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
constexpr int kMaxRows = 6, kVectors = 4;
#elif defined(POLYMOE_LEVEL_AVX2)
constexpr int kMaxRows = 6, kVectors = 2;
#else
constexpr int kMaxRows = 2, kVectors = 1;
#endif

template <class T, int ROWS, int VECTORS, class Part>
void tile(const typename Compute<T>::Value* a, const char* w, int64_t stride, int64_t begin, int64_t end, int64_t ahead,
          typename Compute<T>::Value* c, int64_t ldc, Part part) {
  using V = typename Compute<T>::Vector;
  V acc[ROWS * VECTORS];
#pragma GCC unroll 32
  for (V& v : acc) v = set<V>(0);
  for (int64_t k = begin; k < end; ++k) {
    const T* const row = reinterpret_cast<const T*>(w + k * stride);
    V x[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) x[v] = read<V>(row + v * V::width, part);
    for (int64_t line = 0; line < VECTORS * V::width * int64_t(sizeof(T)); line += 64)
      __builtin_prefetch(w + k * stride + ahead + line, 0, 2);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const V factor = set<V>(a[k * ROWS + i]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) acc[i * VECTORS + v] = fma(factor, x[v], acc[i * VECTORS + v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      auto* const out = c + i * ldc + v * V::width;
      store(out, begin == 0 ? acc[i * VECTORS + v] : load<V>(out) + acc[i * VECTORS + v]);
    }
}

template <class T, int VECTORS, class Part>
void tile_of(int rows, const typename Compute<T>::Value* a, const char* w, int64_t stride, int64_t begin, int64_t end,
             int64_t ahead, typename Compute<T>::Value* c, int64_t ldc, Part part) {
  switch (rows) {
    case 1:
      return tile<T, 1, VECTORS>(a, w, stride, begin, end, ahead, c, ldc, part);
    case 2:
      return tile<T, 2, VECTORS>(a, w, stride, begin, end, ahead, c, ldc, part);
    case 3:
      return tile<T, (kMaxRows >= 3 ? 3 : 1), VECTORS>(a, w, stride, begin, end, ahead, c, ldc, part);
    case 4:
      return tile<T, (kMaxRows >= 4 ? 4 : 1), VECTORS>(a, w, stride, begin, end, ahead, c, ldc, part);
    case 5:
      return tile<T, (kMaxRows >= 5 ? 5 : 1), VECTORS>(a, w, stride, begin, end, ahead, c, ldc, part);
    default:
      return tile<T, (kMaxRows >= 6 ? 6 : 1), VECTORS>(a, w, stride, begin, end, ahead, c, ldc, part);
  }
}

template <class T>
void multiply(const void* a, int64_t m, const char* w, int64_t stride, int64_t n, int64_t d, void* c, int64_t ldc) {
  using Value = typename Compute<T>::Value;
  constexpr int64_t width = Compute<T>::Vector::width, strip = kVectors * width;
  const RowGroups groups(m, kMaxRows);
  for (int64_t begin = 0; begin == 0 || begin < d; begin += kBlock) {
    const int64_t end = begin + kBlock < d ? begin + kBlock : d;
    for (int64_t j = 0; j < n;) {
      const int64_t left = n - j, taken = left >= strip ? strip : left >= width ? width : left;
      // The next strip is asked for while this one computes; after the last one, the next block's first.
      const int64_t ahead = left > taken ? taken * int64_t(sizeof(T)) : kBlock * stride - j * int64_t(sizeof(T));
      // Groups inside, so that this part of W stays in the L1 cache for all of them.
      for (int64_t group = 0; group < groups.count; ++group) {
        const int64_t first = groups.first_row(group);
        const Value* const rows = static_cast<const Value*>(a) + first * d;
        Value* const out = static_cast<Value*>(c) + first * ldc + j;
        const char* const part = w + j * int64_t(sizeof(T));
        if (taken == strip)
          tile_of<T, kVectors>(groups.rows(group), rows, part, stride, begin, end, ahead, out, ldc, Full{});
        else if (taken == width)
          tile_of<T, 1>(groups.rows(group), rows, part, stride, begin, end, ahead, out, ldc, Full{});
        else
          tile_of<T, 1>(groups.rows(group), rows, part, stride, begin, end, ahead, out, ldc, Tail{int(taken)});
      }
      j += taken;
    }
  }
}

template <class T>
void pack(const char* a, int64_t row_stride, int64_t d_stride, int64_t rows, int64_t d, void* out) {
  auto* to = static_cast<typename Compute<T>::Value*>(out);
  for (int64_t k = 0; k < d; ++k)
    for (int64_t r = 0; r < rows; ++r) *to++ = widen(*reinterpret_cast<const T*>(a + r * row_stride + k * d_stride));
}

template <class T>
constexpr RowGemm kernel = {kMaxRows, Compute<T>::Vector::width, pack<T>, multiply<T>};

}  // namespace

extern const RowGemmTable row_gemm_table;
const RowGemmTable row_gemm_table = {{&kernel<float>, &kernel<bf16>, &kernel<f16>,
#if defined(POLYMOE_LEVEL_PORTABLE)
                                      &kernel<double>
#else
                                      nullptr
#endif
}};

}  // namespace polymoe::POLYMOE_LEVEL
