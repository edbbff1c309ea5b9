// The matmul microkernel for quantised weights, read as they are stored. Register tiles along the reduction as for
// plain weights: a lane of an accumulator takes every so many elements, and the lanes are added at the end, in a fixed
// tree. Codes are multiplied exactly; what a block of them sums to is then multiplied by the scale that the block
// shares and added to the total, which is one fused multiply-add:
//
//   total += scale[block] * sum over the block of x * code
//
// For few rows of A a step of weights is decoded in registers where it is used. For more it is decoded into a panel
// first, once for all rows. Both add the same numbers in the same order.
#include <type_traits>

#include "../formats/scales.h"
#include "amx_gemm.h"
#include "gemm_kernel.h"
#include "lane_gemm.h"
#if defined(POLYMOE_LEVEL_AVX512_BF16)
#include "../formats/pairs.h"
#endif

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kMaxColumns = 8;
constexpr int64_t kLine = 64;

// Tile shapes: columns for a group of 1, 2, 3, 4 rows, where weights are decoded in registers, and for any group, where
// they lie in a panel. What is left over of a run of columns goes one by one.
#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
constexpr int kMaxRows = 4;
constexpr int kDecoded[kMaxRows] = {8, 6, 4, 4};
constexpr int kPanelColumns = 6;
#elif defined(POLYMOE_LEVEL_AVX2)
constexpr int kMaxRows = 4;
constexpr int kDecoded[kMaxRows] = {4, 3, 2, 2};
constexpr int kPanelColumns = 3;
#else
constexpr int kMaxRows = 2;
constexpr int kDecoded[kMaxRows] = {2, 2};
constexpr int kPanelColumns = 2;
#endif

// The reduction: `blocks` blocks of `block` steps, `whole` whole steps in all, and `tail` elements more.
struct Reduction {
  int64_t blocks, block, whole;
  int tail;
};

// Rows as far apart as one another: three addresses and the distance reach eight of them.
template <class T>
struct Rows {
  const T *row0, *row3, *row6;
  int64_t stride;

  Rows() = default;
  Rows(const T* first, int64_t stride) : Rows(first, first + 3 * stride, first + 6 * stride, stride) {}
  Rows(const T* row0, const T* row3, const T* row6, int64_t stride)
      : row0(row0), row3(row3), row6(row6), stride(stride) {}

  Rows from(int64_t n) const { return {row0 + n, row3 + n, row6 + n, stride}; }
  const T* operator[](int j) const {
    switch (j) {
      case 0:
        return row0;
      case 1:
        return row0 + stride;
      case 2:
        return row0 + 2 * stride;
      case 3:
        return row3;
      case 4:
        return row0 + 4 * stride;
      case 5:
        return row3 + 2 * stride;
      case 6:
        return row6;
      default:
        return row3 + 4 * stride;
    }
  }
};

// Rows of weights, ready for a tile.
struct Columns {
  Rows<char> data;                       // codes, or decoded elements
  Rows<uint8_t> adjust;                  // by group or block, as the codec wants it
  const float* multiplier[kMaxColumns];  // by block

  const char *next, *next_end;  // what the next panel is decoded from, asked for meanwhile
};

// Weights decoded where they are used.
template <class C>
struct Decoded {
  static constexpr int64_t bytes = C::step * C::bits / 8;
  static constexpr int asks_for = 0;  // lines of what is decoded next, at each step
  static constexpr int columns(int rows) { return kDecoded[rows - 1]; }

  // Which `adjust` of a row step s has.
  static int64_t adjust_at(int64_t s, int64_t block) {
    return C::adjust == Adjust::groups ? s * C::step / kGroup : C::adjust == Adjust::blocks ? block : 0;
  }
  // COUNT steps of a row.
  template <int COUNT>
  static void load(const char* p, const uint8_t* adjust, typename C::X (&x)[COUNT]) {
    static_assert(COUNT == 1 || C::adjust != Adjust::groups);
#pragma GCC unroll 2
    for (int i = 0; i < COUNT; ++i) x[i] = C::decode(p + i * bytes, adjust_of(adjust));
  }
  static typename C::X load_tail(const char* p, const uint8_t* adjust, int tail) {
    char last[bytes] = {};
    __builtin_memcpy(last, p, size_t(tail * C::bits + 7) / 8);
    return C::decode(last, adjust_of(adjust));
  }

 private:
  static uint8_t adjust_of(const uint8_t* adjust) { return C::adjust == Adjust::none ? 0 : *adjust; }
};

// Weights in a panel, the tail as a whole step.
template <class A>
struct Paneled {
  static constexpr int64_t bytes = A::step * sizeof(typename A::Packed);
  static constexpr int asks_for = 2;
  static constexpr int columns(int) { return kPanelColumns; }

  static int64_t adjust_at(int64_t, int64_t) { return 0; }
  template <int COUNT>
  static void load(const char* p, const uint8_t*, typename A::X (&x)[COUNT]) {
#pragma GCC unroll 2
    for (int t = 0; t < COUNT; ++t) x[t] = A::load(p + t * bytes);
  }
  static typename A::X load_tail(const char* p, const uint8_t*, int) { return A::load(p); }
};

// Adds the products of COUNT steps from s on, which block b has.
template <class A, class Source, int ROWS, int COLUMNS, int COUNT>
[[gnu::always_inline]] inline void multiply_steps(const char* a, const Columns& w, int64_t s, int64_t b,
                                                  VF (&acc)[ROWS * COLUMNS]) {
  constexpr int64_t x_bytes = A::step * sizeof(typename A::Packed);
  const Rows<char> data = w.data.from(s * Source::bytes);
  const Rows<uint8_t> adjust = w.adjust.from(Source::adjust_at(s, b));
  if constexpr (Source::asks_for > 0) {
    const char* const next = w.next + s * Source::asks_for * kLine;
    if (next < w.next_end)
#pragma GCC unroll 4
      for (int i = 0; i < COUNT * Source::asks_for; ++i) __builtin_prefetch(next + i * kLine, 0, 2);
  }
  typename A::X x[COUNT][ROWS];
#pragma GCC unroll 2
  for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) x[t][i] = A::load(a + ((s + t) * ROWS + i) * x_bytes);
#pragma GCC unroll 8
  for (int j = 0; j < COLUMNS; ++j) {
    typename A::X wj[COUNT];
    Source::template load<COUNT>(data[j], adjust[j], wj);
#pragma GCC unroll 2
    for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) acc[i * COLUMNS + j] = A::multiply_add(acc[i * COLUMNS + j], x[t][i], wj[t]);
  }
}

// f(s, count) for steps [begin, end): as many at once as the arithmetic A takes, then one by one.
template <class A, class F>
[[gnu::always_inline]] inline void each_steps(int64_t begin, int64_t end, F&& f) {
  int64_t s = begin;
  if constexpr (A::at_once > 1)
    for (; s + A::at_once <= end; s += A::at_once) f(s, std::integral_constant<int, A::at_once>());
  for (; s < end; ++s) f(s, std::integral_constant<int, 1>());
}

// The columns of C are `apart` elements from one another.
template <class A, class Source, int ROWS, int COLUMNS>
void tile(const char* a, const Columns& columns, const Reduction& r, float* c, int64_t ldc, int64_t apart) {
  constexpr int64_t x_bytes = A::step * sizeof(typename A::Packed);
  constexpr int kSums = (ROWS * COLUMNS + 3) / 4 * 4;
  const Columns w = columns;  // a copy, which stores to C cannot change
  VF total[kSums];
#pragma GCC unroll 32
  for (VF& v : total) v = set<VF>(0);

  for (int64_t b = 0; b < r.blocks; ++b) {
    const int64_t begin = b * r.block, end = begin + r.block < r.whole ? begin + r.block : r.whole;
    VF acc[ROWS * COLUMNS];
#pragma GCC unroll 32
    for (VF& v : acc) v = set<VF>(0);
    each_steps<A>(
        begin, end, [&](int64_t s, auto count) __attribute__((always_inline)) {
          multiply_steps<A, Source, ROWS, COLUMNS, count.value>(a, w, s, b, acc);
        });
    if (r.tail && b + 1 == r.blocks) {
      const Rows<char> data = w.data.from(r.whole * Source::bytes);
      const Rows<uint8_t> adjust = w.adjust.from(Source::adjust_at(r.whole, b));
#pragma GCC unroll 8
      for (int j = 0; j < COLUMNS; ++j) {
        const typename A::X wj = Source::load_tail(data[j], adjust[j], r.tail);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i)
          acc[i * COLUMNS + j] = A::multiply_add(acc[i * COLUMNS + j], A::load(a + (r.whole * ROWS + i) * x_bytes), wj);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      const VF factor = set<VF>(w.multiplier[j][b]);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) total[i * COLUMNS + j] = fma(acc[i * COLUMNS + j], factor, total[i * COLUMNS + j]);
    }
  }

  float sums[kSums];
#pragma GCC unroll 8
  for (int q = 0; q < ROWS * COLUMNS; q += 4) sum4(sums + q, total[q], total[q + 1], total[q + 2], total[q + 3]);
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j) c[i * ldc + j * apart] = sums[i * COLUMNS + j];
}

using Tile = void (*)(const char*, const Columns&, const Reduction&, float*, int64_t, int64_t);

// The tile of `rows` rows by the full columns of its shape, or by one column.
template <class A, class Source>
Tile tile_of(int rows, bool full) {
  constexpr int three = kMaxRows >= 3 ? 3 : 1, four = kMaxRows >= 4 ? 4 : 1;
  static constexpr Tile tiles[2][4] = {
      {tile<A, Source, 1, 1>, tile<A, Source, 2, 1>, tile<A, Source, three, 1>, tile<A, Source, four, 1>},
      {tile<A, Source, 1, Source::columns(1)>, tile<A, Source, 2, Source::columns(2)>,
       tile<A, Source, three, Source::columns(three)>, tile<A, Source, four, Source::columns(four)>}};
  return tiles[full][rows - 1];
}

// Places in the workspace, for kMaxColumns rows of d elements.
template <class A>
struct Workspace {
  int64_t factors;  // at most so many blocks, or groups, rounded up to whole blocks of them
  int64_t panel_row;

  explicit Workspace(int64_t d)
      : factors((d + kBlock - 1) / kBlock * kGroups), panel_row((d + A::step - 1) / A::step * Paneled<A>::bytes) {}

  int64_t bytes() const { return kMaxColumns * (factors * 5 + panel_row); }
  char* panel(char* base, int j) const { return base + j * panel_row; }
  float* multiplier(char* base, int j) const {
    return reinterpret_cast<float*>(base + kMaxColumns * panel_row) + j * factors;
  }
  uint8_t* adjust(char* base, int j) const {
    return reinterpret_cast<uint8_t*>(base + kMaxColumns * (panel_row + factors * 4)) + j * factors;
  }
};

// Row j of the columns into its panel.
template <class A, class C>
void decode_row(const Columns& w, int j, const Reduction& r, char* out) {
  using Source = Decoded<C>;
  const char* const data = w.data[j];
  const uint8_t* const adjust = w.adjust[j];
  for (int64_t b = 0; b < r.blocks; ++b) {
    const int64_t begin = b * r.block, end = begin + r.block < r.whole ? begin + r.block : r.whole;
    each_steps<A>(begin, end, [&](int64_t s, auto count) {
      typename A::X x[count.value];
      Source::template load<count.value>(data + s * Source::bytes, adjust + Source::adjust_at(s, b), x);
#pragma GCC unroll 2
      for (int t = 0; t < count.value; ++t) A::store(out + (s + t) * Paneled<A>::bytes, x[t]);
    });
  }
  if (r.tail)
    A::store(
        out + r.whole * Paneled<A>::bytes,
        Source::load_tail(data + r.whole * Source::bytes, adjust + Source::adjust_at(r.whole, r.blocks - 1), r.tail));
}

// Columns of C that a tile takes.
struct Taken {
  int64_t first, apart;
  int count;
};

// The columns of a run, [begin, end), for tiles of `full` columns: side by side, or as far apart as can be. What is
// left over goes one by one.
struct Run {
  int64_t begin, end, full, tiles, apart;

  Run(int64_t begin, int64_t end, int full, bool side_by_side)
      : begin(begin), end(end), full(full), tiles((end - begin) / full), apart(side_by_side ? 1 : tiles) {}

  int64_t count() const { return tiles + (end - begin) % full; }
  Taken operator[](int64_t i) const {
    if (i < tiles) return {begin + (apart == 1 ? i * full : i), apart, int(full)};
    return {begin + tiles * full + i - tiles, 1, 1};
  }
};

// The rows of weights that these columns are, and their scales.
template <class A, class C>
Columns columns_of(const Weights& w, const Taken& taken, int64_t d, int64_t blocks, const Workspace<A>& space) {
  const QuantizedMatrix& m = *w.matrix;
  const int64_t apart = taken.apart * w.row_step;
  Columns columns;
  columns.data = {m.data + matrix_row(w, taken.first) * m.data_stride, apart * m.data_stride};
  columns.next = columns.next_end = columns.data.row0;
  const uint8_t* adjusts[kMaxColumns];
  for (int j = 0; j < taken.count; ++j)
    prepare_row<C>(m, matrix_row(w, taken.first + j * taken.apart), d, blocks, space.multiplier(w.workspace, j),
                   space.adjust(w.workspace, j), columns.multiplier[j], adjusts[j]);
  // Zero points are read where they are stored; what is worked out is in the workspace.
  columns.adjust = {adjusts[0], C::adjust == Adjust::blocks && m.zero ? apart * m.zero_stride : space.factors};
  return columns;
}

template <class A, class C>
void multiply(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const RowGroups groups(m, kMaxRows);
  if (groups.count == 0 || n == 0) return;
  const QuantizedMatrix& matrix = *w.matrix;
  const int64_t block = block_of<C>(matrix);
  const Reduction r{(d + block - 1) / block, block / A::step, d / A::step, int(d % A::step)};
  const bool once = decodes_once(m, kMaxRows);
  const int full = once ? kPanelColumns : kDecoded[groups.rows(0) - 1];
  const Workspace<A> space(d);
  const int64_t row_bytes = ((d + A::step - 1) / A::step) * Paneled<A>::bytes;
  // Rows that are decoded where they are used wait for memory, which is read the fastest as a few long streams; those
  // of a panel are decoded one after the other.
  const auto run_from = [&](int64_t begin) {
    return Run(begin, begin < w.split && w.split < n ? w.split : n, full, once);
  };
  const auto row_at = [&](int64_t column) { return matrix.data + matrix_row(w, column) * matrix.data_stride; };

  for (Run run = run_from(0); run.begin < n; run = run_from(run.end))
    for (int64_t i = 0; i < run.count(); ++i) {
      const Taken taken = run[i];
      const bool is_full = taken.count == full;
      Columns columns = columns_of<A, C>(w, taken, d, r.blocks, space);
      if (once) {
        for (int j = 0; j < taken.count; ++j) decode_row<A, C>(columns, j, r, space.panel(w.workspace, j));
        columns.data = {space.panel(w.workspace, 0), space.panel_row};
        const char* const next = i + 1 < run.count() ? row_at(run[i + 1].first)
                                 : run.end < n       ? row_at(run.end)
                                                     : w.next;
        if (next) {
          columns.next = next;
          columns.next_end = next + taken.count * w.row_step * matrix.data_stride;
        }
      }
      for (int64_t group = 0; group < groups.count; ++group) {
        const int count = groups.rows(group);
        const int64_t first = groups.first_row(group);
        const Tile product = once ? tile_of<A, Paneled<A>>(count, is_full) : tile_of<A, Decoded<C>>(count, is_full);
        product(a + first * row_bytes, columns, r, static_cast<float*>(c) + first * ldc + taken.first, ldc,
                taken.apart);
        if (once) columns.next += r.whole * Paneled<A>::asks_for * kLine;
      }
    }
}

// Elements [begin, begin + count) of row n, code times scale; `begin` is the first of a step.
template <template <class> class Codec>
void decode_elements(const QuantizedMatrix& m, int64_t n, int64_t begin, int64_t count, float* out) {
  using C = Codec<Wide>;
  constexpr int64_t step = Wide::step;
  const MatrixRow row(m, n);
  const char *const data = row.data, *const scales = row.scale;
  const int64_t end = begin + count, share = m.scale_columns ? m.scale_columns : end;
  for (int64_t at = begin; at < end;) {
    const int64_t block = at / share, until = (block + 1) * share < end ? (block + 1) * share : end;
    float scale;
    if (m.exponents)
      scale = from_e8m0(uint8_t(scales[block]));
    else
      __builtin_memcpy(&scale, scales + block * 4, 4);
    const uint8_t adjust = C::adjust != Adjust::blocks ? 0 : row.zero ? uint8_t(row.zero[block]) : 8;
    const VF factor = set<VF>(scale);
    for (; at + step <= until; at += step, out += step) {
      const Wide::X x = C::decode(data + at * C::bits / 8, adjust);
      store_in_order(out, {x.even * factor, x.odd * factor});
    }
    if (at == until) continue;
    char last[step * C::bits / 8] = {};
    float elements[step];
    __builtin_memcpy(last, data + at * C::bits / 8, size_t((until - at) * C::bits + 7) / 8);
    const Wide::X x = C::decode(last, adjust);
    store_in_order(elements, {x.even * factor, x.odd * factor});
    __builtin_memcpy(out, elements, size_t(until - at) * 4);
    at = until;
  }
}

template <class C, class T>
void pack_rows(const char* const* rows, int64_t count, int64_t d, char* out) {
  constexpr int64_t stored = C::step * sizeof(T), packed = Paneled<C>::bytes;
  const int64_t whole = d / C::step;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t s = 0; s < whole; ++s)
      C::pack(reinterpret_cast<const T*>(rows[r] + s * stored), out + (s * count + r) * packed);
  if (d % C::step == 0) return;
  for (int64_t r = 0; r < count; ++r) {
    T last[C::step] = {};
    __builtin_memcpy(last, rows[r] + whole * stored, size_t(d % C::step) * sizeof(T));
    C::pack(last, out + (whole * count + r) * packed);
  }
}

template <class A>
int64_t workspace(int64_t d) {
  return Workspace<A>(d).bytes();
}

template <class A, template <class> class Codec, class T>
constexpr GemmKernel kernel = {A::step,
                               sizeof(typename A::Packed),
                               kMaxRows,
                               1,
                               pack_rows<Codec<A>, T>,
                               multiply<A, Codec<A>>,
                               workspace<A>,
                               nullptr,
                               nullptr,
                               nullptr,
                               decode_elements<Codec>};

#if defined(POLYMOE_LEVEL_AVX512_BF16)
using ForBf16 = Pairs;
#else
using ForBf16 = Wide;
#endif

template <template <class> class Codec>
constexpr const GemmKernel* kBf16 = &kernel<ForBf16, Codec, bf16>;
#if defined(POLYMOE_LEVEL_AVX512_BF16)
template <>
constexpr const GemmKernel* kBf16<Mxfp4> = &mxfp4_bf16;
template <>
constexpr const GemmKernel* kBf16<Int4> = &int4_bf16;
template <>
constexpr const GemmKernel* kBf16<Fp8> = &fp8_bf16;
template <>
constexpr const GemmKernel* kBf16<Mxfp8> = &mxfp8_bf16;
#endif
#if defined(POLYMOE_LEVEL_AMX)
template <>
constexpr const GemmKernel* kBf16<Int8> = &int8_bf16;
#endif

template <template <class> class Codec>
constexpr GemmTable table = {{&kernel<Wide, Codec, float>, kBf16<Codec>, &kernel<Wide, Codec, f16>, nullptr}};

}  // namespace

extern const GemmTable fp8_gemm_table, mxfp8_gemm_table, mxfp4_gemm_table, int8_gemm_table, int4_gemm_table;
const GemmTable fp8_gemm_table = table<Fp8>;
const GemmTable mxfp8_gemm_table = table<Mxfp8>;
const GemmTable mxfp4_gemm_table = table<Mxfp4>;
const GemmTable int8_gemm_table = table<Int8>;
const GemmTable int4_gemm_table = table<Int4>;

}  // namespace polymoe::POLYMOE_LEVEL
