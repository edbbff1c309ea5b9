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

// What the row groups of a strip ask for while they compute: cache lines, row by row of a later strip of W.
struct Fetch {
  static constexpr int64_t line = 64, one = 256;
  const char* row;
  int64_t stride, row_bytes;
  int64_t per_step;         // in parts of `one`
  int64_t at = 0, due = 0;  // of the next line in its row, and what of it has become due

  // The lines of `count` rows in `steps` steps of all groups; none where `rows` is null.
  Fetch(const char* rows, int64_t stride, int64_t row_bytes, int64_t count, int64_t steps)
      : row(rows), stride(stride), row_bytes(row_bytes) {
    const int64_t all = rows ? count * ((row_bytes + line - 1) / line) : 0;
    per_step = steps ? (all * one + steps - 1) / steps : 0;
  }

  void step() {
    for (due += per_step; due >= one; due -= one) {
      __builtin_prefetch(row + at, 0, 2);
      at += line;
      if (at < row_bytes) continue;
      at = 0;
      row += stride;
    }
  }
};

// Where a tile reads W: a strip of columns of W itself, or a copy of it, `stride` elements from row to row.
template <class T>
struct Strip {
  const T* w;
  int64_t stride;
  typename Compute<T>::Value* copy;  // takes what is read, kStrip elements from row to row; or null
};

// Where sums are kept from block to block of the reduction, and where the last block's go: past the caches to `out`,
// or where `out` is null there, too.
template <class Value>
struct Sums {
  Value* c;
  int64_t ldc;
  Value* out;
  int64_t ldo;

  Sums at(int64_t row, int64_t column) const {
    return {c + row * ldc + column, ldc, out ? out + row * ldo + column : nullptr, ldo};
  }
};

template <class T>
constexpr int64_t kStrip = kVectors * Compute<T>::Vector::width;

template <class T, int ROWS, int VECTORS, class Part>
void tile(const typename Compute<T>::Value* a, const Strip<T>& strip, int64_t steps, bool add,
          const Sums<typename Compute<T>::Value>& sums, Fetch& fetch, Part part) {
  using V = typename Compute<T>::Vector;
  V acc[ROWS * VECTORS];
#pragma GCC unroll 32
  for (V& v : acc) v = set<V>(0);
  const T* row = strip.w;
  auto* copy = strip.copy;
  for (int64_t k = 0; k < steps; ++k, row += strip.stride) {
    V x[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) x[v] = read<V>(row + v * V::width, part);
    if (copy) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) store(copy + v * V::width, x[v]);
      copy += kStrip<T>;
    }
    fetch.step();
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
      auto* const c = sums.c + i * sums.ldc + v * V::width;
      const V sum = add ? load<V>(c) + acc[i * VECTORS + v] : acc[i * VECTORS + v];
      if (sums.out)
        stream(sums.out + i * sums.ldo + v * V::width, sum);
      else
        store(c, sum);
    }
}

template <class T, int VECTORS, class Part>
void tile_of(int rows, const typename Compute<T>::Value* a, const Strip<T>& strip, int64_t steps, bool add,
             const Sums<typename Compute<T>::Value>& sums, Fetch& fetch, Part part) {
  switch (rows) {
    case 1:
      return tile<T, 1, VECTORS>(a, strip, steps, add, sums, fetch, part);
    case 2:
      return tile<T, 2, VECTORS>(a, strip, steps, add, sums, fetch, part);
    case 3:
      return tile<T, (kMaxRows >= 3 ? 3 : 1), VECTORS>(a, strip, steps, add, sums, fetch, part);
    case 4:
      return tile<T, (kMaxRows >= 4 ? 4 : 1), VECTORS>(a, strip, steps, add, sums, fetch, part);
    case 5:
      return tile<T, (kMaxRows >= 5 ? 5 : 1), VECTORS>(a, strip, steps, add, sums, fetch, part);
    default:
      return tile<T, (kMaxRows >= 6 ? 6 : 1), VECTORS>(a, strip, steps, add, sums, fetch, part);
  }
}

// The rows of A of a call.
template <class T>
struct Rows {
  const typename Compute<T>::Value* a;
  RowGroups groups;
  int64_t d;
};

// All row groups times one strip of VECTORS vectors, of rows [begin, begin + steps) of W. The first group reads W and
// leaves a copy for the others, widened and dense: rows of W a power of two apart would fall into a few sets of the L1
// cache. Together they ask for what is `ahead`, whose share is not worked out again for every tile: a tile of dW is
// short.
template <int VECTORS, class T, class Part>
void multiply_strip(const Rows<T>& rows, Strip<T> strip, int64_t begin, int64_t steps,
                    const Sums<typename Compute<T>::Value>& sums, const char* ahead, Part part) {
  using V = typename Compute<T>::Vector;
  const int64_t count = rows.groups.count, stride = strip.stride * int64_t(sizeof(T));
  const Strip<typename Compute<T>::Value> dense{strip.copy, kStrip<T>, nullptr};
  if (count == 1) strip.copy = nullptr;
  Fetch fetch(ahead, stride, VECTORS * V::width * int64_t(sizeof(T)), steps, steps * count);
  for (int64_t group = 0; group < count; ++group) {
    const int64_t first = rows.groups.first_row(group);
    const int taken = rows.groups.rows(group);
    const auto* const a = rows.a + first * rows.d + begin * taken;
    if (group == 0)
      tile_of<T, VECTORS>(taken, a, strip, steps, begin != 0, sums.at(first, 0), fetch, part);
    else
      tile_of<typename Compute<T>::Value, VECTORS>(taken, a, dense, steps, begin != 0, sums.at(first, 0), fetch,
                                                   Full{});
  }
}

template <class T>
void multiply(const void* a, int64_t m, const char* w, int64_t stride, int64_t n, int64_t d, void* c, int64_t ldc,
              void* out, int64_t ldo) {
  using V = typename Compute<T>::Vector;
  using Value = typename Compute<T>::Value;
  constexpr int64_t width = V::width, full = kStrip<T>;
  const Rows<T> rows{static_cast<const Value*>(a), RowGroups(m, kMaxRows), d};
  alignas(64) Value copy[kBlock * full];
  for (int64_t begin = 0; begin == 0 || begin < d; begin += kBlock) {
    const bool last = d - begin <= kBlock;
    const int64_t steps = last ? d - begin : kBlock;
    const Sums<Value> whole{static_cast<Value*>(c), ldc, last ? static_cast<Value*>(out) : nullptr, ldo};
    for (int64_t j = 0; j < n;) {
      const int64_t left = n - j, taken = left >= full ? full : left >= width ? width : left;
      const char* const from = w + begin * stride + j * int64_t(sizeof(T));
      // The next strip is asked for while this one computes; after the last one, the next block's first.
      const char* const below = last ? nullptr : w + (begin + kBlock) * stride;
      const char* const ahead = left > taken ? from + taken * int64_t(sizeof(T)) : below;
      const Strip<T> strip{reinterpret_cast<const T*>(from), stride / int64_t(sizeof(T)), copy};
      const Sums<Value> sums = whole.at(0, j);
      if (taken == full)
        multiply_strip<kVectors>(rows, strip, begin, steps, sums, ahead, Full{});
      else if (taken == width)
        multiply_strip<1>(rows, strip, begin, steps, sums, ahead, Full{});
      else
        multiply_strip<1>(rows, strip, begin, steps, sums, ahead, Tail{int(taken)});
      j += taken;
    }
  }
}

template <class T>
void pack(const char* a, int64_t row_stride, int64_t d_stride, int64_t rows, int64_t d, void* out) {
  auto* to = static_cast<typename Compute<T>::Value*>(out);
  const auto at = [&](int64_t r, int64_t k) { return reinterpret_cast<const T*>(a + r * row_stride + k * d_stride); };
  int64_t k = 0;
#if !defined(POLYMOE_LEVEL_PORTABLE)
  constexpr int64_t width = VF::width;
  static_assert(kMaxRows <= width);
  if (row_stride == int64_t(sizeof(T)))
    for (; k < d; ++k) store_n(to + k * rows, load_n<VF>(at(0, k), int(rows)), int(rows));
  else if (d_stride == int64_t(sizeof(T)))
    for (; k + width <= d; k += width) {
      VF v[width];
      for (int64_t r = 0; r < width; ++r) v[r] = r < rows ? load<VF>(at(r, k)) : set<VF>(0);
      transpose(v);
      for (int64_t i = 0; i < width; ++i) store_n(to + (k + i) * rows, v[i], int(rows));
    }
#endif
  for (; k < d; ++k)
    for (int64_t r = 0; r < rows; ++r) to[k * rows + r] = widen(*at(r, k));
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
