// The matmul microkernel for quantised weights, read as they are stored. Register tiles along the reduction as for
// plain weights: a lane of an accumulator takes every so many elements, and the lanes are added at the end, in a fixed
// tree. Codes are multiplied exactly; what a block of them sums to is then multiplied by the scale that the block
// shares and added to the total, which is one fused multiply-add:
//
//   total += scale[block] * sum over the block of x * code
//
// For few rows of A a step of weights is decoded in registers where it is used. For more it is decoded into a panel
// first, once for all rows. Both add the same numbers in the same order.
#include "../formats/scales.h"
#include "amx_gemm.h"
#include "gemm_kernel.h"
#if defined(POLYMOE_LEVEL_AVX512_BF16)
#include "../formats/pairs.h"
#endif

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kMaxColumns = 8;

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

// A row of weights, ready for a tile.
struct Row {
  const char* data;         // codes, or decoded elements
  const uint8_t* adjust;    // by group or block, as the codec wants it
  const float* multiplier;  // by block
};

// Rows that the next tile will read; asked for while this one computes.
struct Prefetch {
  const char* row[kMaxColumns];
  int count;
};

// Weights decoded where they are used.
template <class C>
struct Decoded {
  static constexpr int64_t bytes = C::step * C::bits / 8;
  static constexpr int columns(int rows) { return kDecoded[rows - 1]; }

  static typename C::X load(const Row& row, int64_t s, int64_t block) {
    return C::decode(row.data + s * bytes, adjust(row, s, block));
  }
  static typename C::X load_tail(const Row& row, int64_t s, int64_t block, int tail) {
    char last[bytes] = {};
    __builtin_memcpy(last, row.data + s * bytes, size_t(tail * C::bits + 7) / 8);
    return C::decode(last, adjust(row, s, block));
  }

 private:
  static uint8_t adjust(const Row& row, int64_t s, int64_t block) {
    if (C::adjust == Adjust::groups) return row.adjust[s * C::step / kGroup];
    return C::adjust == Adjust::blocks ? row.adjust[block] : 0;
  }
};

// Weights in a panel, the tail as a whole step.
template <class A>
struct Paneled {
  static constexpr int64_t bytes = A::step * sizeof(typename A::Packed);
  static constexpr int columns(int) { return kPanelColumns; }

  static typename A::X load(const Row& row, int64_t s, int64_t) { return A::load(row.data + s * bytes); }
  static typename A::X load_tail(const Row& row, int64_t s, int64_t block, int) { return load(row, s, block); }
};

template <class A, class Source, int ROWS, int COLUMNS>
void tile(const char* a, const Row* w, const Reduction& r, float* c, int64_t ldc, const Prefetch& next) {
  constexpr int64_t x_bytes = A::step * sizeof(typename A::Packed);
  constexpr int kSums = (ROWS * COLUMNS + 3) / 4 * 4;
  VF total[kSums];
#pragma GCC unroll 32
  for (VF& v : total) v = set<VF>(0);

  for (int64_t b = 0; b < r.blocks; ++b) {
    const int64_t begin = b * r.block, end = begin + r.block < r.whole ? begin + r.block : r.whole;
    for (int i = 0; i < next.count; ++i)
      for (int64_t line = (begin * Source::bytes + 63) & ~int64_t(63); line < end * Source::bytes; line += 64)
        __builtin_prefetch(next.row[i] + line, 0, 2);
    VF acc[ROWS * COLUMNS];
#pragma GCC unroll 32
    for (VF& v : acc) v = set<VF>(0);
    for (int64_t s = begin; s < end; ++s) {
      typename A::X x[ROWS];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) x[i] = A::load(a + (s * ROWS + i) * x_bytes);
#pragma GCC unroll 8
      for (int j = 0; j < COLUMNS; ++j) {
        const typename A::X wj = Source::load(w[j], s, b);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) acc[i * COLUMNS + j] = A::multiply_add(acc[i * COLUMNS + j], x[i], wj);
      }
    }
    if (r.tail && b + 1 == r.blocks) {
#pragma GCC unroll 8
      for (int j = 0; j < COLUMNS; ++j) {
        const typename A::X wj = Source::load_tail(w[j], r.whole, b, r.tail);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i)
          acc[i * COLUMNS + j] = A::multiply_add(acc[i * COLUMNS + j], A::load(a + (r.whole * ROWS + i) * x_bytes), wj);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) {
      const VF factor = set<VF>(w[j].multiplier[b]);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) total[i * COLUMNS + j] = fma(acc[i * COLUMNS + j], factor, total[i * COLUMNS + j]);
    }
  }

  float sums[kSums];
#pragma GCC unroll 8
  for (int q = 0; q < ROWS * COLUMNS; q += 4) sum4(sums + q, total[q], total[q + 1], total[q + 2], total[q + 3]);
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j) c[i * ldc + j] = sums[i * COLUMNS + j];
}

using Tile = void (*)(const char*, const Row*, const Reduction&, float*, int64_t, const Prefetch&);

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

template <class A, class C>
void decode_row(const Row& row, const Reduction& r, char* out) {
  using Source = Decoded<C>;
  for (int64_t b = 0; b < r.blocks; ++b) {
    const int64_t begin = b * r.block, end = begin + r.block < r.whole ? begin + r.block : r.whole;
    for (int64_t s = begin; s < end; ++s) A::store(out + s * Paneled<A>::bytes, Source::load(row, s, b));
  }
  if (r.tail) A::store(out + r.whole * Paneled<A>::bytes, Source::load_tail(row, r.whole, r.blocks - 1, r.tail));
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

  for (int64_t j0 = 0; j0 < n;) {
    const bool is_full = n - j0 >= full;
    const int columns = is_full ? full : 1;
    const int64_t left = n - j0 - columns, ahead = left >= full ? full : left > 0 ? 1 : 0;
    Row rows[kMaxColumns];
    for (int j = 0; j < columns; ++j) {
      const int64_t row = matrix_row(w, j0 + j);
      rows[j].data = matrix.data + row * matrix.data_stride;
      prepare_row<C>(matrix, row, d, r.blocks, space.multiplier(w.workspace, j), space.adjust(w.workspace, j),
                     rows[j].multiplier, rows[j].adjust);
      if (!once) continue;
      char* const panel = space.panel(w.workspace, j);
      decode_row<A, C>(rows[j], r, panel);
      rows[j].data = panel;
    }
    Prefetch next{{}, 0};
    if (!once)
      for (int j = 0; j < ahead; ++j)
        next.row[next.count++] = matrix.data + matrix_row(w, j0 + columns + j) * matrix.data_stride;
    for (int64_t group = 0; group < groups.count; ++group) {
      const int count = groups.rows(group);
      const int64_t first = groups.first_row(group);
      const Tile run = once ? tile_of<A, Paneled<A>>(count, is_full) : tile_of<A, Decoded<C>>(count, is_full);
      run(a + first * row_bytes, rows, r, static_cast<float*>(c) + first * ldc + j0, ldc, next);
    }
    j0 += columns;
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
#if defined(POLYMOE_LEVEL_AMX)
template <>
constexpr const GemmKernel* kBf16<Mxfp4> = &mxfp4_bf16;
template <>
constexpr const GemmKernel* kBf16<Int8> = &int8_bf16;
template <>
constexpr const GemmKernel* kBf16<Int4> = &int4_bf16;
template <>
constexpr const GemmKernel* kBf16<Fp8> = &fp8_bf16;
template <>
constexpr const GemmKernel* kBf16<Mxfp8> = &mxfp8_bf16;
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
