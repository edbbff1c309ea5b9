// The matmul microkernel for the modes "int8" and "int8_g128": rows of A are rounded to 8-bit integers, every group of
// 32 or 128 with a scale, and multiplied with weights that are small integers times a scale: 2 * e2m1, int8, int4.
//
// Weights are decoded into a panel first, where the lanes of a vector are columns and four elements of the reduction
// lie side by side, as the dot product of bytes takes them. One factor of it is unsigned, so a panel holds the code
// plus `offset`, and the offset times the sum of A's integers is taken away again. Sums over a piece, 32 elements or
// 128 where all of them share a scale on both sides, are integers and therefore exact, in whatever order; then, in
// order,
//
//   part  += (sum - offset * sum of a) * scale of the weights     the pieces of a group
//   total += part * scale of a                                    the groups
#include "../formats/quantized.h"
#include "gemm_kernel.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int64_t kPiece = 32;
constexpr int kVectors = 2;  // of columns in a tile
constexpr int kLanes = VF::width, kColumns = kVectors * kLanes;
constexpr int64_t kDeep = 4 * kLanes;  // elements of the reduction that are decoded at a time

#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
constexpr int kMaxRows = 6;
#else
constexpr int kMaxRows = 2;
#endif

// A piece of a row of A.
struct Piece {
  int8_t code[kPiece];
  float scale;
  // Of the codes, and what the integer sum begins with, that is -offset times it: of this piece, and of its group.
  float sum, group_sum;
  int32_t begin, group_begin;
  char unused[12];  // a cache line in all
};
static_assert(sizeof(Piece) == 64);

// --- bytes -----------------------------------------------------------------------------------------------------------

#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)

using Bytes = __m512i;
inline Bytes set_ints(int32_t x) { return _mm512_set1_epi32(x); }
inline Bytes load_bytes(const char* p) { return _mm512_loadu_si512(p); }
inline VF to_float(Bytes x) { return {_mm512_cvtepi32_ps(x)}; }
inline VF as_floats(Bytes x) { return {_mm512_castsi512_ps(x)}; }
inline Bytes nibbles(const char* p) {  // 4-bit codes in order
  const __m512i v = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi16(v, 4)), _mm512_set1_epi8(15));
}
inline Bytes look_up(__m128i table, Bytes index) { return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), index); }
inline Bytes flip_sign(Bytes x) { return _mm512_xor_si512(x, _mm512_set1_epi8(char(0x80))); }
#if defined(POLYMOE_LEVEL_AVX512_BF16)
inline Bytes dot(Bytes acc, Bytes w, int32_t a) { return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(a)); }
#else
inline Bytes dot(Bytes acc, Bytes w, int32_t a) {
  const __m512i x = _mm512_set1_epi32(a), low = _mm512_set1_epi16(0xff);
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, low), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
  return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
}
#endif

#elif defined(POLYMOE_LEVEL_AVX2)

using Bytes = __m256i;
inline Bytes set_ints(int32_t x) { return _mm256_set1_epi32(x); }
inline Bytes load_bytes(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline VF to_float(Bytes x) { return {_mm256_cvtepi32_ps(x)}; }
inline VF as_floats(Bytes x) { return {_mm256_castsi256_ps(x)}; }
inline Bytes nibbles(const char* p) {
  const __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi16(v, 4)), _mm256_set1_epi8(15));
}
inline Bytes look_up(__m128i table, Bytes index) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), index);
}
inline Bytes flip_sign(Bytes x) { return _mm256_xor_si256(x, _mm256_set1_epi8(char(0x80))); }
inline Bytes dot(Bytes acc, Bytes w, int32_t a) {
  const __m256i x = _mm256_set1_epi32(a), low = _mm256_set1_epi16(0xff);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, low), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}

#else

struct Bytes {
  uint32_t v[kLanes];  // four bytes each
};
inline Bytes set_ints(int32_t x) {
  Bytes r;
  for (uint32_t& v : r.v) v = uint32_t(x);
  return r;
}
inline Bytes load_bytes(const char* p) {
  Bytes r;
  __builtin_memcpy(r.v, p, sizeof r.v);
  return r;
}
inline VF to_float(Bytes x) {
  return map<float, kLanes>([&](int i) { return float(int32_t(x.v[i])); });
}
inline VF as_floats(Bytes x) {
  return map<float, kLanes>([&](int i) { return bits_float(x.v[i]); });
}
template <class F>
inline Bytes of_bytes(F f) {
  uint8_t b[4 * kLanes];
  for (int i = 0; i < 4 * kLanes; ++i) b[i] = uint8_t(f(i));
  return load_bytes(reinterpret_cast<const char*>(b));
}
inline Bytes nibbles(const char* p) {
  return of_bytes([&](int i) { return i % 2 ? uint8_t(p[i / 2]) >> 4 : uint8_t(p[i / 2]) & 15; });
}
inline Bytes flip_sign(Bytes x) {
  for (uint32_t& v : x.v) v ^= 0x80808080u;
  return x;
}
inline Bytes dot(Bytes acc, Bytes w, int32_t a) {
  for (int i = 0; i < kLanes; ++i)
    for (int k = 0; k < 32; k += 8)
      acc.v[i] += uint32_t(int32_t(w.v[i] >> k & 255) * int32_t(int8_t(uint8_t(uint32_t(a) >> k))));
  return acc;
}

#endif

// A vector of columns, lane by lane, of each of kLanes runs of four elements of the reduction: transposes 32-bit lanes.
inline void store_transposed(Bytes (&rows)[kLanes], char* out) {
  VF v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = as_floats(rows[i]);
#if defined(POLYMOE_LEVEL_PORTABLE)
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) __builtin_memcpy(out + (i * kColumns + j) * 4, &v[j].v[i], 4);
#else
  transpose(v);
  for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(out + i * kColumns * 4), v[i]);
#endif
}

// --- weights: kDeep elements as unsigned bytes, each the code plus `offset` ------------------------------------------

struct E2m1Codes {                        // twice the value
  static constexpr bool by_piece = true;  // scales
  static constexpr int bits = 4, offset = 12;
  static constexpr float unit = 0.5f;
  static Bytes load(const char* p) {
#if defined(POLYMOE_LEVEL_PORTABLE)
    constexpr uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    return of_bytes([&](int i) { return table[i % 2 ? uint8_t(p[i / 2]) >> 4 : uint8_t(p[i / 2]) & 15]; });
#else
    return look_up(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0), nibbles(p));
#endif
  }
};
struct Int8Codes {
  static constexpr bool by_piece = false;
  static constexpr int bits = 8, offset = 128;
  static constexpr float unit = 1;
  static Bytes load(const char* p) { return flip_sign(load_bytes(p)); }
};
struct Int4Codes {
  static constexpr bool by_piece = false;     // but in groups of 32 and 64
  static constexpr int bits = 4, offset = 8;  // which is the zero point where no other is given
  static constexpr float unit = 1;
  static Bytes load(const char* p) { return nibbles(p); }
};

// Rows of a tile: fewer where pieces have scales of their own, for the sums of a group take registers, too.
template <class C, int GROUP>
constexpr int kRows = kMaxRows > 5 && GROUP > 1 && C::by_piece ? 5 : kMaxRows;

// Places in the workspace for kColumns columns of d elements, padded to whole groups of A.
struct Space {
  int64_t deep, pieces;
  Space(int64_t d, int64_t group)
      : deep((d + kDeep - 1) / kDeep * kDeep), pieces((d + group - 1) / group * group / kPiece) {
    if (deep < pieces * kPiece) deep = pieces * kPiece;
  }
  int64_t bytes() const { return deep * kColumns + 2 * pieces * kColumns * 4; }
  char* panel(char* base) const { return base; }
  float* scale(char* base) const { return reinterpret_cast<float*>(base + deep * kColumns); }
  float* offset(char* base) const { return scale(base) + pieces * kColumns; }
};

// Decodes one vector of columns; columns past `count` repeat the last one.
template <class C>
void decode_columns(const Weights& w, int64_t j0, int count, int64_t d, char* panel) {
  const QuantizedMatrix& m = *w.matrix;
  const char* rows[kLanes];
  for (int j = 0; j < kLanes; ++j) rows[j] = m.data + matrix_row(w, j0 + (j < count ? j : count - 1)) * m.data_stride;
  for (int64_t k = 0; k < d; k += kDeep) {
    Bytes codes[kLanes];
    if (k + kDeep <= d) {
      for (int j = 0; j < kLanes; ++j) {
        __builtin_prefetch(rows[j] + (k + 8 * kDeep) * C::bits / 8, 0, 3);
        codes[j] = C::load(rows[j] + k * C::bits / 8);
      }
    } else {
      for (int j = 0; j < kLanes; ++j) {
        char last[kDeep] = {};
        __builtin_memcpy(last, rows[j] + k * C::bits / 8, size_t((d - k) * C::bits + 7) / 8);
        codes[j] = C::load(last);
      }
    }
    store_transposed(codes, panel + k * kColumns);
  }
}

// Scales of a column by piece, zero where it is all padding; and, where there are zero points, what they are above
// C::offset.
template <class C>
void prepare_column(const QuantizedMatrix& m, int64_t n, int64_t d, int64_t pieces, float* scale, float* offset) {
  const char* const scales = m.scale + n / m.scale_rows * m.scale_stride;
  for (int64_t i = 0; i < pieces; ++i) {
    const bool padding = i * kPiece >= d;
    const int64_t at = m.scale_columns == 0 || padding ? 0 : i * kPiece / m.scale_columns;
    float value;
    if (m.exponents)
      value = from_e8m0(uint8_t(scales[at]));
    else
      __builtin_memcpy(&value, scales + at * 4, 4);
    scale[i * kColumns] = padding ? 0 : value * C::unit;
    if (m.zero) offset[i * kColumns] = float(int(uint8_t(m.zero[n * m.zero_stride + at])) - C::offset);
  }
}

// --- the product -----------------------------------------------------------------------------------------------------

// GROUP pieces of A share a scale, and SUMMED of them are summed in integers.
template <int ROWS, int GROUP, int SUMMED>
void tile(const Piece* a, const char* panel, const float* scale, const float* offset, int64_t pieces, float* c,
          int64_t ldc, int64_t columns) {
  VF total[ROWS * kVectors];
#pragma GCC unroll 16
  for (VF& v : total) v = set<VF>(0);
  for (int64_t g = 0; g < pieces; g += GROUP, a += ROWS * GROUP) {
    VF part[ROWS * kVectors];
#pragma GCC unroll 16
    for (VF& v : part) v = set<VF>(0);
    for (int p = 0; p < GROUP; p += SUMMED) {
      Bytes acc[ROWS * kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          acc[i * kVectors + v] = set_ints(SUMMED == 1 ? a[i * GROUP + p].begin : a[i * GROUP].group_begin);
      for (int q = p; q < p + SUMMED; ++q)
#pragma GCC unroll 2
        for (int k = 0; k < int(kPiece); k += 4, panel += 4 * kColumns) {
          Bytes w[kVectors];
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) w[v] = load_bytes(panel + v * 4 * kLanes);
#pragma GCC unroll 8
          for (int i = 0; i < ROWS; ++i) {
            int32_t four;
            __builtin_memcpy(&four, a[i * GROUP + q].code + k, 4);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) acc[i * kVectors + v] = dot(acc[i * kVectors + v], w[v], four);
          }
        }
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = (g + p) * kColumns + v * kLanes;
        const VF scales = load<VF>(scale + at);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
          VF exact = to_float(acc[i * kVectors + v]);  // integers below 2^24, also with zero points
          if (offset) {
            const float sum = SUMMED == 1 ? a[i * GROUP + p].sum : a[i * GROUP].group_sum;
            exact = fma(load<VF>(offset + at), set<VF>(-sum), exact);
          }
          VF& sum = part[i * kVectors + v];
          sum = fma(exact, scales, sum);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        VF& sum = total[i * kVectors + v];
        sum = fma(part[i * kVectors + v], set<VF>(a[i * GROUP].scale), sum);
      }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = columns - v * kLanes;
      float* const out = c + i * ldc + v * kLanes;
      if (left >= kLanes)
        store(out, total[i * kVectors + v]);
      else if (left > 0)
        store_n(out, total[i * kVectors + v], int(left));
    }
}

using Tile = void (*)(const Piece*, const char*, const float*, const float*, int64_t, float*, int64_t, int64_t);

template <int GROUP, int SUMMED>
Tile tile_of(int rows) {
  static constexpr Tile tiles[] = {tile<1, GROUP, SUMMED>, tile<2, GROUP, SUMMED>,
#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
                                   tile<3, GROUP, SUMMED>, tile<4, GROUP, SUMMED>, tile<5, GROUP, SUMMED>,
                                   tile<6, GROUP, SUMMED>
#endif
  };
  return tiles[rows - 1];
}

template <class C, int GROUP>
void multiply(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const RowGroups groups(m, kRows<C, GROUP>);
  const Space space(d, GROUP * kPiece);
  const int64_t shared = w.matrix->scale_columns;  // elements that share a scale of the weights
  const bool whole = shared == 0 || shared % (GROUP * kPiece) == 0;
  char* const panel = space.panel(w.workspace);
  float* const scale = space.scale(w.workspace);
  float* const offset = w.matrix->zero ? space.offset(w.workspace) : nullptr;
  const Piece* const rows = reinterpret_cast<const Piece*>(a);
  for (int64_t j0 = 0; j0 < n && m > 0; j0 += kColumns) {
    const int64_t columns = n - j0 < kColumns ? n - j0 : kColumns;
    for (int v = 0; v < kVectors && v * kLanes < columns; ++v) {
      const int64_t left = columns - v * kLanes;
      decode_columns<C>(w, j0 + v * kLanes, int(left < kLanes ? left : kLanes), d, panel + v * 4 * kLanes);
    }
    for (int j = 0; j < kColumns; ++j)
      prepare_column<C>(*w.matrix, matrix_row(w, j0 + (j < columns ? j : columns - 1)), d, space.pieces, scale + j,
                        offset ? offset + j : nullptr);
    for (int64_t group = 0; group < groups.count; ++group) {
      const int64_t first = groups.first_row(group);
      const int count = groups.rows(group);
      const Tile run = whole ? tile_of<GROUP, GROUP>(count) : tile_of<GROUP, 1>(count);
      run(rows + first * space.pieces, panel, scale, offset, space.pieces, static_cast<float*>(c) + first * ldc + j0,
          ldc, columns);
    }
  }
}

// Scale and codes of a group: see polymoe/reference/_quantized.py.
template <int GROUP, int OFFSET>
void round_group(const float* x, Piece* out) {
  constexpr int count = GROUP * int(kPiece);
  uint32_t largest_bits = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t bits = float_bits(x[i]) & 0x7fffffffu;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  const bool finite = largest_bits < 0x7f800000u;
  const float largest = bits_float(largest_bits), usable = !finite ? 1 : largest > 0x1p-119f ? largest : 0x1p-119f;
  const float factor = finite ? 127 / usable : 0;
  int32_t group_sum = 0;
  for (int p = 0; p < GROUP; ++p, x += kPiece) {
    int32_t codes[kPiece], sum = 0;
    for (int i = 0; i < kPiece; ++i) {
      // Adding 1.5 * 2^23 rounds to an integer, ties to even, which are then the low bits.
      codes[i] = int32_t(float_bits((finite ? x[i] * factor : 0) + 0x1.8p23f) - float_bits(0x1.8p23f));
      sum += codes[i];
    }
    for (int i = 0; i < kPiece; ++i) out[p].code[i] = int8_t(codes[i]);
    out[p].scale = finite ? usable / 127 : bits_float(0x7fc00000u);
    out[p].sum = float(sum);
    out[p].begin = -OFFSET * sum;
    group_sum += sum;
  }
  for (int p = 0; p < GROUP; ++p) {
    out[p].group_sum = float(group_sum);
    out[p].group_begin = -OFFSET * group_sum;
  }
}

template <class C, int GROUP, class T>
void pack_rows(const char* const* rows, int64_t count, int64_t d, char* out) {
  constexpr int64_t group = GROUP * kPiece;
  Piece* const pieces = reinterpret_cast<Piece*>(out);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t begin = 0; begin < d; begin += group) {
      const T* const from = reinterpret_cast<const T*>(rows[r]) + begin;
      float x[group] = {};
      if (begin + group <= d)
        for (int i = 0; i < group; i += kLanes) store(x + i, load<VF>(from + i));
      else
        for (int i = 0; i < d - begin; ++i) x[i] = widen(from[i]);
      round_group<GROUP, C::offset>(x, pieces + (begin / group * count + r) * GROUP);
    }
}

template <int GROUP>
int64_t workspace(int64_t d) {
  return Space(d, GROUP * kPiece).bytes();
}

template <class C, int GROUP, class T>
constexpr GemmKernel kernel = {GROUP * kPiece,         sizeof(Piece) / kPiece, kRows<C, GROUP>, 1,
                               pack_rows<C, GROUP, T>, multiply<C, GROUP>,     workspace<GROUP>};

template <class C, int GROUP>
constexpr GemmTable table = {{&kernel<C, GROUP, float>, &kernel<C, GROUP, bf16>, &kernel<C, GROUP, f16>, nullptr}};

}  // namespace

extern const GemmTable mxfp4_by_int8_gemm_table, int8_by_int8_gemm_table, int4_by_int8_gemm_table;
const GemmTable mxfp4_by_int8_gemm_table = table<E2m1Codes, 1>;
const GemmTable int8_by_int8_gemm_table = table<Int8Codes, 1>;
const GemmTable int4_by_int8_gemm_table = table<Int4Codes, 1>;

extern const GemmTable mxfp4_by_int8_g128_gemm_table, int8_by_int8_g128_gemm_table, int4_by_int8_g128_gemm_table;
const GemmTable mxfp4_by_int8_g128_gemm_table = table<E2m1Codes, 4>;
const GemmTable int8_by_int8_g128_gemm_table = table<Int8Codes, 4>;
const GemmTable int4_by_int8_g128_gemm_table = table<Int4Codes, 4>;

}  // namespace polymoe::POLYMOE_LEVEL
