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

// Where a tile reads W: a strip of columns of W itself, or a copy of it, `stride` elements from row to row. While the
// tile computes it asks for as many rows of the strip after it, from `ahead` on, or for none.
template <class T>
struct Strip {
  const T* w;
  int64_t stride;
  const char* ahead;
  int64_t ahead_stride;
};

template <class T, int ROWS, int VECTORS, class Part>
void tile(const typename Compute<T>::Value* a, const Strip<T>& strip, int64_t steps, bool add,
          typename Compute<T>::Value* c, int64_t ldc, Part part) {
  using V = typename Compute<T>::Vector;
  V acc[ROWS * VECTORS];
#pragma GCC unroll 32
  for (V& v : acc) v = set<V>(0);
  const T* row = strip.w;
  const char* next = strip.ahead;
  for (int64_t k = 0; k < steps; ++k, row += strip.stride) {
    V x[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) x[v] = read<V>(row + v * V::width, part);
    if (next) {
      for (int64_t line = 0; line < VECTORS * V::width * int64_t(sizeof(T)); line += 64)
        __builtin_prefetch(next + line, 0, 2);
      next += strip.ahead_stride;
    }
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
      store(out, add ? load<V>(out) + acc[i * VECTORS + v] : acc[i * VECTORS + v]);
    }
}

template <class T, int VECTORS, class Part>
void tile_of(int rows, const typename Compute<T>::Value* a, const Strip<T>& strip, int64_t steps, bool add,
             typename Compute<T>::Value* c, int64_t ldc, Part part) {
  switch (rows) {
    case 1:
      return tile<T, 1, VECTORS>(a, strip, steps, add, c, ldc, part);
    case 2:
      return tile<T, 2, VECTORS>(a, strip, steps, add, c, ldc, part);
    case 3:
      return tile<T, (kMaxRows >= 3 ? 3 : 1), VECTORS>(a, strip, steps, add, c, ldc, part);
    case 4:
      return tile<T, (kMaxRows >= 4 ? 4 : 1), VECTORS>(a, strip, steps, add, c, ldc, part);
    case 5:
      return tile<T, (kMaxRows >= 5 ? 5 : 1), VECTORS>(a, strip, steps, add, c, ldc, part);
    default:
      return tile<T, (kMaxRows >= 6 ? 6 : 1), VECTORS>(a, strip, steps, add, c, ldc, part);
  }
}

// The rows of A of a call, and where their products go.
template <class T>
struct Rows {
  using Value = typename Compute<T>::Value;
  const Value* a;
  RowGroups groups;
  int64_t d;
  Value* c;
  int64_t ldc;
};

// All row groups times one strip of at most kVectors vectors, of rows [begin, begin + steps) of W.
template <class T, class S, class Part>
void multiply_strip(const Rows<T>& rows, Strip<S> strip, int64_t begin, int64_t steps, int64_t column, bool whole,
                    Part part) {
  for (int64_t group = 0; group < rows.groups.count; ++group) {
    const int count = rows.groups.rows(group);
    const int64_t first = rows.groups.first_row(group);
    const auto* const a = rows.a + first * rows.d + begin * count;
    auto* const c = rows.c + first * rows.ldc + column;
    if (whole)
      tile_of<S, kVectors>(count, a, strip, steps, begin != 0, c, rows.ldc, part);
    else
      tile_of<S, 1>(count, a, strip, steps, begin != 0, c, rows.ldc, part);
    strip.ahead = nullptr;
  }
}

template <class T>
void multiply(const void* a, int64_t m, const char* w, int64_t stride, int64_t n, int64_t d, void* c, int64_t ldc) {
  using V = typename Compute<T>::Vector;
  using Value = typename Compute<T>::Value;
  constexpr int64_t width = V::width, full = kVectors * width;
  const Rows<T> rows{static_cast<const Value*>(a), RowGroups(m, kMaxRows), d, static_cast<Value*>(c), ldc};
  // A strip of W is widened once for all row groups, and lies dense: rows of W a power of two apart would fall into a
  // few sets of the L1 cache.
  alignas(64) Value copy[kBlock * full];
  for (int64_t begin = 0; begin == 0 || begin < d; begin += kBlock) {
    const int64_t steps = begin + kBlock < d ? kBlock : d - begin;
    for (int64_t j = 0; j < n;) {
      const int64_t left = n - j, taken = left >= full ? full : left >= width ? width : left;
      const char* const strip = w + begin * stride + j * int64_t(sizeof(T));
      // The next strip is asked for while this one computes; after the last one, the next block's first.
      const char* const ahead = left > taken ? strip + taken * int64_t(sizeof(T)) : w + (begin + kBlock) * stride;
      if (rows.groups.count == 1) {
        const Strip<T> direct{reinterpret_cast<const T*>(strip), stride / int64_t(sizeof(T)), ahead, stride};
        if (taken < width)
          multiply_strip(rows, direct, begin, steps, j, false, Tail{int(taken)});
        else
          multiply_strip(rows, direct, begin, steps, j, taken == full, Full{});
      } else {
        for (int64_t k = 0; k < steps; ++k) {
          const T* const from = reinterpret_cast<const T*>(strip + k * stride);
          for (int64_t v = 0; v < taken; v += width)
            store(copy + k * full + v, taken < width ? load_n<V>(from, int(taken)) : load<V>(from + v));
        }
        multiply_strip(rows, Strip<Value>{copy, full, ahead, stride}, begin, steps, j, taken == full, Full{});
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
