// The packed matmul microkernel: register tiles of rows by columns, activations broadcast, weights streamed. A lane of
// an accumulator is a column; it takes the steps of a block in ascending order.
#include "../formats/packed.h"
#include "amx_gemm.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

// A unit of columns is two vectors. Units of a tile by its rows; what they leave free holds a step's weights.
#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
constexpr int kMaxRows = 14;
constexpr int kUnits[kMaxRows] = {4, 4, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1};
#elif defined(POLYMOE_LEVEL_AVX2)
constexpr int kMaxRows = 6;
constexpr int kUnits[kMaxRows] = {4, 2, 2, 1, 1, 1};
#else
constexpr int kMaxRows = 4;
constexpr int kUnits[kMaxRows] = {1, 1, 1, 1};
#endif
constexpr int kMaxUnits = 4;

template <class F>
constexpr int64_t kUnit = 2 * F::V::width;

// Steps that one accumulator lane adds one after the other: few enough for accurate sums, and for a panel's block of
// weights to stay in the L1 or L2 cache while all rows pass over it.
template <class F>
constexpr int64_t kBlockSteps = sizeof(typename F::Stored) == 2 ? 256 : 128;
static_assert(kBlockSteps<PackedBf16> * PackedBf16::step <= kSlice);

// Steps between two bursts of prefetches.
constexpr int64_t kChunk = 8;

// Bytes from a step of a full panel to the next.
template <class F>
constexpr int64_t kStride = kPanel * F::step * int64_t(sizeof(typename F::Stored));

// Where the cache lines that are fetched ahead with the first chunk lie in the next block, and how far on with each
// more.
template <class F>
struct Lines {
  static constexpr int count = int(kChunk * kStride<F> / 64);
  int64_t at[count];
  int64_t advance;

  // `span` bytes of the block are fetched side by side with each other, an equal share of each with every chunk.
  constexpr explicit Lines(int64_t span) : at{}, advance(span / (kBlockSteps<F> / kChunk)) {
    for (int i = 0; i < count; ++i) at[i] = i * 64 / advance * span + i * 64 % advance;
  }
};

// The hardware's own prefetch follows a stream within its page: so it runs ahead in all pages of the block, and the
// fetches find their lines in the L2 cache instead of holding the few fill buffers of L1 until memory answers. That
// helps one row as much as many.
template <class F>
constexpr Lines<F> kByPage{4096};
// One after the other, which is better for f32 in half-panel tiles over several row groups.
template <class F>
constexpr Lines<F> kInOrder{kBlockSteps<F> * kStride<F>};

// Blocks to fetch ahead, and which cache lines of each chunk's share of them.
struct Fetch {
  const char* at[kMaxUnits];
  int streams;
  const int64_t* lines;
  int64_t advance;
  int first, last;
};
constexpr Fetch kNothing{{}, 0, nullptr, 0, 0, 0};

template <class F, int ROWS, int UNITS>
void tile(const typename F::Sum* a, const char* const* w, int64_t stride, int64_t steps, bool add, Fetch fetch,
          typename F::Sum* c, int64_t ldc) {
  using V = typename F::V;
  constexpr int kVectors = 2 * UNITS;
  constexpr int64_t vector_bytes = V::width * F::step * int64_t(sizeof(typename F::Stored));
  V acc[ROWS * kVectors];
#pragma GCC unroll 32
  for (V& v : acc) v = set<V>(0);

  const char* unit[UNITS];
#pragma GCC unroll 4
  for (int u = 0; u < UNITS; ++u) unit[u] = w[u];
  for (int64_t chunk = 0; chunk < steps; chunk += kChunk) {
    for (int i = 0; i < fetch.streams; ++i) {
#pragma GCC unroll 1
      for (int line = fetch.first; line < fetch.last; ++line) __builtin_prefetch(fetch.at[i] + fetch.lines[line], 0, 2);
      fetch.at[i] += fetch.advance;
    }
    const int64_t stop = chunk + kChunk < steps ? chunk + kChunk : steps;
    for (int64_t s = chunk; s < stop; ++s) {
#pragma GCC unroll 2
      for (int part = 0; part < F::parts; ++part) {
        // Whichever operand is fewer stays in registers, the other passes through one.
        const auto load_x = [&](int i) __attribute__((always_inline)) {
          return F::load_x(a + i * F::packed_lanes, part);
        };
        const auto load_w = [&](int j) __attribute__((always_inline)) {
          return F::load_w(unit[j / 2] + j % 2 * vector_bytes, part);
        };
        if constexpr (ROWS < kVectors) {
          typename F::X x[ROWS];
#pragma GCC unroll 16
          for (int i = 0; i < ROWS; ++i) x[i] = load_x(i);
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) {
            const typename F::W w_j = load_w(j);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; ++i) acc[i * kVectors + j] = F::multiply_add(acc[i * kVectors + j], x[i], w_j);
          }
        } else {
          typename F::W w_j[kVectors];
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) w_j[j] = load_w(j);
#pragma GCC unroll 16
          for (int i = 0; i < ROWS; ++i) {
            const typename F::X x = load_x(i);
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j)
              acc[i * kVectors + j] = F::multiply_add(acc[i * kVectors + j], x, w_j[j]);
          }
        }
      }
#pragma GCC unroll 4
      for (int u = 0; u < UNITS; ++u) unit[u] += stride;
      a += ROWS * F::packed_lanes;
    }
  }

#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      typename F::Sum* const out = c + i * ldc + j * V::width;
      store(out, add ? load<V>(out) + acc[i * kVectors + j] : acc[i * kVectors + j]);
    }
}

template <class F>
using Tile = void (*)(const typename F::Sum*, const char* const*, int64_t, int64_t, bool, Fetch, typename F::Sum*,
                      int64_t);

// Shapes past the level's tables are never asked for; they name a shape that exists anyway.
template <class F, int ROWS>
constexpr Tile<F> kTiles[kMaxUnits] = {tile<F, ROWS, 1>, tile<F, ROWS, (kUnits[ROWS - 1] >= 2 ? 2 : 1)>,
                                       tile<F, ROWS, (kUnits[ROWS - 1] >= 3 ? 3 : 1)>,
                                       tile<F, ROWS, (kUnits[ROWS - 1] >= 4 ? 4 : 1)>};

template <class F, int ROWS = 1>
Tile<F> tile_of(int rows, int units) {
  if constexpr (ROWS < kMaxRows)
    if (rows > ROWS) return tile_of<F, ROWS + 1>(rows, units);
  return kTiles<F, ROWS>[units - 1];
}

// One call's rows of A, and what they are multiplied into.
template <class F>
struct Rows {
  const typename F::Sum* a;
  RowGroups groups;
  int64_t d;
  typename F::Sum* c;
  int64_t ldc;

  int64_t steps() const { return (d + F::step - 1) / F::step; }
  const typename F::Sum* at(int64_t group, int64_t step) const {
    return a + (groups.first_row(group) * steps() + step * groups.rows(group)) * F::packed_lanes;
  }
};

// Multiplies one block of the reduction: `steps` steps from step `begin` on, of `units` units of columns of W, whose
// sums go to columns `column` of C on. Each tile fetches its share of the block that `next` points to.
template <class F>
void multiply_block(const Rows<F>& rows, const char* const* w, int units, int64_t stride, int64_t begin, int64_t steps,
                    int64_t column, const Fetch& next) {
  constexpr int lines = Lines<F>::count;
  for (int64_t group = 0; group < rows.groups.count; ++group) {
    const int count = rows.groups.rows(group), most = kUnits[count - 1];
    const int64_t tiles = (units + most - 1) / most, all = rows.groups.count * tiles;
    for (int u = 0; u < units; u += most) {
      const int64_t index = group * tiles + u / most;
      Fetch fetch = next;
      fetch.first = int(lines * index / all);
      fetch.last = int(lines * (index + 1) / all);
      const int taken = units - u < most ? units - u : most;
      tile_of<F>(count, taken)(rows.at(group, begin), w + u, stride, steps, begin != 0, fetch,
                               rows.c + rows.groups.first_row(group) * rows.ldc + column + u * kUnit<F>, rows.ldc);
    }
  }
}

// Where unit `u` of a packed matrix begins.
template <class F>
const char* unit_of(const char* panels, int64_t u, int64_t d) {
  constexpr int64_t size = sizeof(typename F::Stored);
  const int64_t column = u * kUnit<F>, within = column % kPanel;
  return panels + (column - within) * d * size + within * F::step * size;
}

// The last d % step elements of `columns` columns, widened to a step with zeros.
template <class F>
void expand_tail(const char* tail, int64_t columns, typename F::Stored* out) {
  __builtin_memset(out, 0, size_t(kStride<F>));
  const typename F::Stored* const from = reinterpret_cast<const typename F::Stored*>(tail);
  for (int64_t j = 0; j < columns; ++j) out[j * F::step] = from[j];
}

// The order in which blocks of W are taken, strips of units of columns by blocks of the reduction. A block along the
// reduction passes over all strips before the next one where the rows of A are many: their slice stays in the L2 cache.
struct Walk {
  int64_t strips, blocks;
  bool slices;

  int64_t count() const { return strips * blocks; }
  int64_t strip(int64_t i) const { return slices ? i % strips : i / blocks; }
  int64_t block(int64_t i) const { return slices ? i / strips : i % blocks; }
};

template <class F>
void multiply_panels(const Rows<F>& rows, const char* panels, int64_t units, int64_t column, const char* after) {
  constexpr int64_t per_panel = kPanel / kUnit<F>, block_bytes = kBlockSteps<F> * kStride<F>;
#if defined(POLYMOE_LEVEL_AVX2)
  const bool in_order = sizeof(typename F::Stored) == 4 && rows.groups.count > 1;
#else
  constexpr bool in_order = false;
#endif
  const Lines<F>& lines = in_order ? kInOrder<F> : kByPage<F>;
  const int64_t whole = rows.d / F::step;
  // No less than a panel, whose cache lines hold all of its units.
  const int64_t most = kUnits[rows.groups.rows(0) - 1] > per_panel ? kUnits[rows.groups.rows(0) - 1] : per_panel;
  const RowGroups strips(units, most);
  const Walk walk{strips.count, (whole + kBlockSteps<F> - 1) / kBlockSteps<F>, rows.groups.count > 1};
  const auto at = [&](int64_t i, int64_t u) {
    return unit_of<F>(panels, strips.first_row(walk.strip(i)) + u, rows.d) + walk.block(i) * block_bytes;
  };
  for (int64_t i = 0; i < walk.count(); ++i) {
    const int64_t u0 = strips.first_row(walk.strip(i)), begin = walk.block(i) * kBlockSteps<F>;
    const int count = strips.rows(walk.strip(i));
    const char* w[kMaxUnits];
    Fetch next{{}, 0, lines.at, lines.advance, 0, 0};
    for (int u = 0; u < count; ++u) {
      w[u] = at(i, u);
      if ((u0 + u) % per_panel != 0) continue;  // the panel's first unit fetches for all of them
      if (i + 1 < walk.count())
        next.at[next.streams++] = at(i + 1, u);
      else if (after)
        next.at[next.streams++] = unit_of<F>(after, u, rows.d);
    }
    const int64_t steps = begin + kBlockSteps<F> < whole ? kBlockSteps<F> : whole - begin;
    multiply_block(rows, w, count, kStride<F>, begin, steps, column + u0 * kUnit<F>, next);
  }
  if (rows.d % F::step == 0) return;
  for (int64_t strip = 0; strip < strips.count; ++strip) {
    const int64_t u0 = strips.first_row(strip);
    const int count = strips.rows(strip);
    alignas(64) typename F::Stored tails[kMaxUnits][kPanel * F::step];
    const char* w[kMaxUnits];
    for (int u = 0; u < count; ++u) {
      constexpr int64_t size = sizeof(typename F::Stored);
      const int64_t first = (u0 + u) * kUnit<F>, within = first % kPanel;
      expand_tail<F>(panels + (first - within) * rows.d * size + whole * kStride<F> + within * size, kUnit<F>,
                     tails[u]);
      w[u] = reinterpret_cast<const char*>(tails[u]);
    }
    multiply_block(rows, w, count, kStride<F>, whole, 1, column + u0 * kUnit<F>, kNothing);
  }
}

// The panel of fewer than kPanel columns: block by block copied to a full one.
template <class F>
void multiply_short_panel(const Rows<F>& rows, const char* panel, int64_t columns, int64_t column) {
  using Stored = typename F::Stored;
  alignas(64) Stored full[kBlockSteps<F> * kPanel * F::step];
  alignas(64) typename F::Sum sums[kMaxRows * kPanel];
  const int64_t whole = rows.d / F::step;
  const Stored* from = reinterpret_cast<const Stored*>(panel);
  for (int64_t begin = 0; begin < rows.steps(); begin += kBlockSteps<F>) {
    const int64_t steps = begin + kBlockSteps<F> < rows.steps() ? kBlockSteps<F> : rows.steps() - begin;
    for (int64_t s = 0; s < steps; ++s) {
      Stored* const out = full + s * kPanel * F::step;
      if (begin + s == whole) {
        expand_tail<F>(reinterpret_cast<const char*>(from), columns, out);
        continue;
      }
      __builtin_memset(out, 0, size_t(kStride<F>));
      __builtin_memcpy(out, from, size_t(columns) * F::step * sizeof(Stored));
      from += columns * F::step;
    }
    for (int64_t group = 0; group < rows.groups.count; ++group)
      for (int64_t u = 0; u * kUnit<F> < columns; ++u) {
        const int64_t n = columns - u * kUnit<F> < kUnit<F> ? columns - u * kUnit<F> : kUnit<F>;
        typename F::Sum* const c = rows.c + rows.groups.first_row(group) * rows.ldc + column + u * kUnit<F>;
        const char* const w = reinterpret_cast<const char*>(full + u * kUnit<F> * F::step);
        // The odd element at the end is a block of its own, as it is in a full panel.
        const int64_t body = begin + steps > whole ? steps - 1 : steps;
        const auto run = [&](int64_t at, int64_t count) {
          if (count == 0) return;
          const bool add = begin + at != 0;
          if (add)
            for (int i = 0; i < rows.groups.rows(group); ++i)
              __builtin_memcpy(sums + i * kUnit<F>, c + i * rows.ldc, size_t(n) * sizeof(*sums));
          const char* const block = w + at * kStride<F>;
          tile_of<F>(rows.groups.rows(group), 1)(rows.at(group, begin + at), &block, kStride<F>, count, add, kNothing,
                                                 sums, kUnit<F>);
          for (int i = 0; i < rows.groups.rows(group); ++i)
            __builtin_memcpy(c + i * rows.ldc, sums + i * kUnit<F>, size_t(n) * sizeof(*sums));
        };
        run(0, body);
        run(body, steps - body);
      }
  }
}

template <class F>
void multiply_run(const Rows<F>& rows, const char* w, int64_t n, int64_t left, int64_t column, const char* after) {
  const int64_t full = (n < left / kPanel * kPanel ? n : left / kPanel * kPanel);
  if (full > 0) multiply_panels(rows, w, full / kUnit<F>, column, n > full ? nullptr : after);
  if (n > full)
    multiply_short_panel(rows, w + full * rows.d * int64_t(sizeof(typename F::Stored)), n - full, column + full);
}

template <class F>
void multiply(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  using Sum = typename F::Sum;
  const Rows<F> rows{reinterpret_cast<const Sum*>(a), RowGroups(m, kMaxRows), d, static_cast<Sum*>(c), ldc};
  if (rows.groups.count == 0 || n == 0) return;
  if (d == 0) {
    for (int64_t i = 0; i < m; ++i) __builtin_memset(rows.c + i * ldc, 0, size_t(n) * sizeof(Sum));
    return;
  }
  const int64_t first = n < w.split ? n : w.split;
  multiply_run(rows, w.first, first, w.left, 0, first < n ? w.second : w.next);
  if (first < n) multiply_run(rows, w.second, n - first, w.left, first, w.next);
}

template <class F>
void pack_steps(const typename F::Stored* const* rows, int64_t count, int64_t steps, typename F::Sum* out) {
#if defined(POLYMOE_LEVEL_PORTABLE)
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t r = 0; r < count; ++r, out += F::packed_lanes) F::pack(rows[r] + s * F::step, out);
#else
  constexpr int64_t width = F::V::width;
  static_assert(kMaxRows < width);
  alignas(64) float lanes[(width + 1) * width];
  for (int64_t s = 0; s < steps; s += width) {
    typename F::V v[width];
    for (int64_t r = 0; r < width; ++r) v[r] = r < count ? F::gather(rows[r] + s * F::step) : set<typename F::V>(0);
    transpose(v);
    // Full vectors in ascending order: what one writes past its rows the next one overwrites.
    for (int64_t k = 0; k < width; ++k) store(lanes + k * count, v[k]);
    const int64_t n = (steps - s < width ? steps - s : width) * count;
    F::spread(lanes, n, out);
    out += n * F::packed_lanes;
  }
#endif
}

// The part of rows that makes whole vectors of steps, then the rest through a zero-padded copy.
template <class F>
void pack_rows(const char* const* rows, int64_t count, int64_t d, char* out) {
  using Stored = typename F::Stored;
  constexpr int64_t elements = F::V::width * F::step;
  const Stored* from[kMaxRows];
  for (int64_t r = 0; r < count; ++r) from[r] = reinterpret_cast<const Stored*>(rows[r]);
  typename F::Sum* const packed = reinterpret_cast<typename F::Sum*>(out);
  const int64_t body = d / elements * elements;
  pack_steps<F>(from, count, body / F::step, packed);
  if (d == body) return;
  alignas(64) Stored last[kMaxRows][elements] = {};
  const Stored* padded[kMaxRows];
  for (int64_t r = 0; r < count; ++r) {
    __builtin_memcpy(last[r], from[r] + body, size_t(d - body) * sizeof(Stored));
    padded[r] = last[r];
  }
  pack_steps<F>(padded, count, (d - body + F::step - 1) / F::step, packed + body / F::step * count * F::packed_lanes);
}

template <class F>
constexpr GemmKernel sliced() {
  constexpr int packed_size = int(F::packed_lanes * sizeof(typename F::Sum)) / F::step;
  GemmKernel kernel{F::step, packed_size, kMaxRows, int(kPanel), pack_rows<F>, multiply<F>};
  kernel.slice = kSlice;
  return kernel;
}

template <class F>
constexpr GemmKernel kernel = sliced<F>();

}  // namespace

#if defined(POLYMOE_LEVEL_AMX)
constexpr const GemmKernel* kBf16 = &packed_bf16;
#else
constexpr const GemmKernel* kBf16 = &kernel<PackedBf16>;
#endif

extern const GemmTable packed_gemm_table;
const GemmTable packed_gemm_table = {{&kernel<PackedF32>, kBf16, &kernel<PackedF16>,
#if defined(POLYMOE_LEVEL_PORTABLE)
                                      &kernel<PackedF64>
#else
                                      nullptr
#endif
}};

}  // namespace polymoe::POLYMOE_LEVEL
