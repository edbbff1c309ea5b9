// Register tiles of a few rows of A by a few vectors of a row of W, one element of the reduction at a time, or a pair.
#include "row_gemm.h"

#include "row_products.h"

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
  static constexpr int64_t line = 64;
  const char* row;
  int64_t stride, row_bytes;
  int64_t left, per_step;  // lines, the same number in each step until there are no more: a branch that is foreseen
  int64_t at = 0;          // of the next line in its row

  // The lines of `count` rows in `steps` steps of all groups; none where `rows` is null.
  Fetch(const char* rows, int64_t stride, int64_t row_bytes, int64_t count, int64_t steps)
      : row(rows), stride(stride), row_bytes(row_bytes) {
    left = rows ? count * ((row_bytes + line - 1) / line) : 0;
    per_step = steps ? (left + steps - 1) / steps : 0;
  }

  [[gnu::always_inline]] void step() {
    if (left <= 0) return;
    left -= per_step;
    for (int64_t i = 0; i < per_step; ++i) {
      __builtin_prefetch(row + at, 0, 2);
      at += line;
      if (at < row_bytes) continue;
      at = 0;
      row += stride;
    }
  }
};

// Where a tile reads W: a strip of columns of W itself, or a copy of it.
template <class P>
struct Strip {
  const char* w;
  int64_t stride;           // bytes from a row to the next, or from a step of a copy
  int64_t rows;             // of W itself
  typename P::Value* copy;  // takes what is read, kStrip elements from step to step; or null
};

// Where sums are kept from block to block of the reduction, and where the last block's go: past the caches to `out`, as
// they are or rounded to the type of W, or where `out` is null there, too.
template <class P>
struct Sums {
  using Value = typename P::Value;
  Value* c;
  int64_t ldc;
  char* out;
  int64_t ldo;  // bytes
  bool rounded;

  Sums at(int64_t row, int64_t column) const {
    const int64_t size = rounded ? sizeof(typename P::Stored) : sizeof(Value);
    return {c + row * ldc + column, ldc, out ? out + row * ldo + column * size : nullptr, ldo, rounded};
  }
};

template <class P>
constexpr int64_t kStrip = kVectors * P::V::width;

// One or two vectors that follow one another.
template <int COUNT, class T, class V>
[[gnu::always_inline]] inline void stream_some(T* to, V first, V second) {
  if constexpr (COUNT == 2)
    stream(to, first, second);
  else
    stream(to, first);
}

// The sums of a tile, added to what C has or not, to where they go. Indices alone, no pointers into `acc`: it is in
// registers.
template <class P, int ROWS, int VECTORS>
[[gnu::always_inline]] inline void put_sums(typename P::V (&acc)[ROWS * VECTORS], bool add, const Sums<P>& sums) {
  using V = typename P::V;
  constexpr int kTogether = VECTORS % 2 == 0 ? 2 : 1;
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v += kTogether) {
      auto* const c = sums.c + i * sums.ldc + v * V::width;
      V& first = acc[i * VECTORS + v];
      V& second = acc[i * VECTORS + v + kTogether - 1];
      if (add) {
        first = load<V>(c) + first;
        if (kTogether == 2) second = load<V>(c + V::width) + second;
      }
      if (!sums.out) {
        store(c, first);
        if (kTogether == 2) store(c + V::width, second);
      } else if (sums.rounded) {
        stream_some<kTogether>(reinterpret_cast<typename P::Stored*>(sums.out + i * sums.ldo) + v * V::width, first,
                               second);
      } else {
        stream_some<kTogether>(reinterpret_cast<typename P::Value*>(sums.out + i * sums.ldo) + v * V::width, first,
                               second);
      }
    }
}

// COPIED: the strip is a copy.
template <class P, bool COPIED, int ROWS, int VECTORS, class Part>
[[gnu::noinline]] void tile(const typename P::Value* a, const Strip<P>& strip, int64_t steps, bool add,
                            const Sums<P>& sums, Fetch& fetch, Part part) {
  using V = typename P::V;
  Fetch ahead = fetch;  // a copy, which stores cannot change
  V acc[ROWS * VECTORS];
#pragma GCC unroll 32
  for (V& v : acc) v = set<V>(0);
  const char* row = strip.w;
  int64_t left = strip.rows;
  auto* copy = strip.copy;
  for (int64_t s = 0; s < steps; ++s) {
    typename P::X x[VECTORS];
    if constexpr (COPIED) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) x[v] = P::load(reinterpret_cast<const typename P::Value*>(row) + v * V::width);
      row += strip.stride;
    } else {
      P::read(row, left > 1 ? strip.stride : 0, left > 1, x, part);
      row += P::step * strip.stride;
      left -= P::step;
      if (copy) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) P::store(copy + v * V::width, x[v]);
        copy += kStrip<P>;
      }
    }
    ahead.step();
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const typename P::X factor = P::factor(a + s * ROWS + i);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) acc[i * VECTORS + v] = P::multiply_add(acc[i * VECTORS + v], factor, x[v]);
    }
  }
  fetch = ahead;
  put_sums<P, ROWS, VECTORS>(acc, add, sums);
}

template <class P, bool COPIED, int VECTORS, class Part>
void tile_of(int rows, const typename P::Value* a, const Strip<P>& strip, int64_t steps, bool add, const Sums<P>& sums,
             Fetch& fetch, Part part) {
  switch (rows) {
    case 1:
      return tile<P, COPIED, 1, VECTORS>(a, strip, steps, add, sums, fetch, part);
    case 2:
      return tile<P, COPIED, 2, VECTORS>(a, strip, steps, add, sums, fetch, part);
    case 3:
      return tile<P, COPIED, (kMaxRows >= 3 ? 3 : 1), VECTORS>(a, strip, steps, add, sums, fetch, part);
    case 4:
      return tile<P, COPIED, (kMaxRows >= 4 ? 4 : 1), VECTORS>(a, strip, steps, add, sums, fetch, part);
    case 5:
      return tile<P, COPIED, (kMaxRows >= 5 ? 5 : 1), VECTORS>(a, strip, steps, add, sums, fetch, part);
    default:
      return tile<P, COPIED, (kMaxRows >= 6 ? 6 : 1), VECTORS>(a, strip, steps, add, sums, fetch, part);
  }
}

template <class P>
int64_t steps_of(int64_t d) {
  return (d + P::step - 1) / P::step;
}

// The rows of A of a call.
template <class P>
struct Rows {
  const typename P::Value* a;
  RowGroups groups;
  int64_t steps;
};

// All row groups times one strip of VECTORS vectors, `strip.rows` rows of W from the one that step `begin` has on. The
// first group reads W and leaves a copy for the others, widened or paired, and dense: rows of W a power of two apart
// would fall into a few sets of the L1 cache. Together they ask for what is `ahead`, whose share is not worked out
// again for every tile: a tile of dW is short.
template <int VECTORS, class P, class Part>
void multiply_strip(const Rows<P>& rows, Strip<P> strip, int64_t begin, const Sums<P>& sums, const char* ahead,
                    Part part) {
  const int64_t count = rows.groups.count, steps = steps_of<P>(strip.rows);
  const Strip<P> dense{reinterpret_cast<const char*>(strip.copy), kStrip<P> * int64_t(sizeof(*strip.copy)), 0, nullptr};
  if (count == 1) strip.copy = nullptr;
  Fetch fetch(ahead, strip.stride, VECTORS * P::V::width * int64_t(sizeof(typename P::Stored)), strip.rows,
              steps * count);
  for (int64_t group = 0; group < count; ++group) {
    const int64_t first = rows.groups.first_row(group);
    const int taken = rows.groups.rows(group);
    const auto* const a = rows.a + first * rows.steps + begin * taken;
    if (group == 0)
      tile_of<P, false, VECTORS>(taken, a, strip, steps, begin != 0, sums.at(first, 0), fetch, part);
    else
      tile_of<P, true, VECTORS>(taken, a, dense, steps, begin != 0, sums.at(first, 0), fetch, Full{});
  }
}

template <class P>
void multiply(const void* a, int64_t m, const char* w, int64_t stride, int64_t n, int64_t d, void* c, int64_t ldc,
              const RowGemmOut& out) {
  using Value = typename P::Value;
  constexpr int64_t width = P::V::width, full = kStrip<P>, size = sizeof(typename P::Stored);
  const Rows<P> rows{static_cast<const Value*>(a), RowGroups(m, kMaxRows), steps_of<P>(d)};
  alignas(64) Value copy[kBlock / P::step * full];
  for (int64_t begin = 0; begin == 0 || begin < d; begin += kBlock) {
    const bool last = d - begin <= kBlock;
    const int64_t taken_rows = last ? d - begin : kBlock;
    const Sums<P> whole{static_cast<Value*>(c), ldc, last ? static_cast<char*>(out.data) : nullptr, out.stride,
                        out.rounded};
    for (int64_t j = 0; j < n;) {
      const int64_t left = n - j, taken = left >= full ? full : left >= width ? width : left;
      const char* const from = w + begin * stride + j * size;
      // The next strip is asked for while this one computes; after the last one, the next block's first.
      const char* const below = last ? nullptr : w + (begin + kBlock) * stride;
      const char* const ahead = left > taken ? from + taken * size : below;
      const Strip<P> strip{from, stride, taken_rows, copy};
      const Sums<P> sums = whole.at(0, j);
      if (taken == full)
        multiply_strip<kVectors>(rows, strip, begin / P::step, sums, ahead, Full{});
      else if (taken == width)
        multiply_strip<1>(rows, strip, begin / P::step, sums, ahead, Full{});
      else
        multiply_strip<1>(rows, strip, begin / P::step, sums, ahead, Tail{int(taken)});
      j += taken;
    }
  }
}

template <class P>
constexpr RowGemm kernel = {kMaxRows,          P::V::width,
                            P::step,           int(sizeof(typename P::Value)) / P::step,
                            pack<P, kMaxRows>, pack<Widened<typename P::Stored>, kMaxRows>,
                            multiply<P>};

}  // namespace

extern const RowGemmTable row_gemm_table;
const RowGemmTable row_gemm_table = {{&kernel<Widened<float>>, &kernel<OfBf16>, &kernel<Widened<f16>>,
#if defined(POLYMOE_LEVEL_PORTABLE)
                                      &kernel<Widened<double>>
#else
                                      nullptr
#endif
}};

}  // namespace polymoe::POLYMOE_LEVEL
