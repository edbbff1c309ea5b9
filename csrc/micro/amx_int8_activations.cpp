// The products of the modes "int8" and "int8_g128" for many rows, on AMX tiles, which multiply signed bytes. 16 rows of
// W are the left operand of a product and 16 rows of A the right one, with four elements of the reduction side by side.
// int8 weights stay where they lie; codes of four bits become bytes first.
//
// The sums of a group are integers and therefore exact, in whatever order. They leave the tiles, and vectors do
//
//   part   = sum * scale of the weights
//   total += part * scale of a
//
// or, where a scale serves whole rows of W, multiply by it at the end, with rows of A in the lanes: the steps of
// int8_gemm.cpp, and its bits. The groups of mxfp4 in a group of A differ in their scales: where these are at most a
// factor of 8 apart their codes are multiplied by it, which leaves bytes, and float32 would sum them exactly, too.
// Columns of other weights are left to int8_gemm.cpp.
#include "amx_gemm.h"

#if defined(POLYMOE_LEVEL_AMX)

#include "bytes.h"
#include "int8_piece.h"
#include "int8_scales.h"
#include "quantized_ahead.h"
#include "tiles.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kTileRows = 16;
constexpr int64_t kLine = 64;
constexpr int kSums = 4, kW = 4, kA = 6;  // registers: four of sums, two of each operand

constexpr int64_t kTilesTogether = 8;  // of A, which wait while 16 rows of W pass over them all

// Places in the workspace: tiles of 16 rows of A, a piece each, and their scales by group; and 16 rows of W as bytes,
// with zeros up to whole groups, and their scales.
struct TileSpace {
  static constexpr int64_t piece_bytes = kTileRows * kPiece;
  int64_t pieces;
  char* base;

  int64_t tile_bytes() const { return pieces * (piece_bytes + kLine); }
  int64_t bytes() const { return (kTilesTogether + 1) * tile_bytes(); }
  char* rows(int64_t tile, int64_t piece) const { return base + tile * tile_bytes() + piece * piece_bytes; }
  float* scale(int64_t tile, int64_t group) const {
    return reinterpret_cast<float*>(rows(tile, pieces)) + group * kTileRows;
  }
  char* weights() const { return rows(kTilesTogether, 0); }
  float* weight_scale(int64_t group) const { return scale(kTilesTogether, group); }
};

// Rows of A from `first` on, as the right operand; those past the end repeat the last one. Of 4-bit weights the even
// elements of four pieces are a tile, and the odd ones the next, as nibbles lie.
template <class C, int GROUP>
void write_right(const Piece* a, const RowGroups& groups, int64_t first, int64_t m, const TileSpace& space,
                 int64_t tile) {
  const Piece* row[kTileRows];
  int64_t step[kTileRows];  // from a group of a row to the next
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t i = first + r < m ? first + r : m - 1;
    const int64_t larger = groups.larger * (groups.size + 1);
    const int64_t group = i < larger ? i / (groups.size + 1) : groups.larger + (i - larger) / groups.size;
    const int64_t begin = groups.first_row(group);
    row[r] = a + begin * space.pieces + (i - begin) * GROUP;
    step[r] = groups.rows(group) * int64_t(GROUP);
  }
  for (int64_t p = 0; p < space.pieces; p += GROUP) {
    char* const out = space.rows(tile, p);
    for (int q = 0; q < GROUP; ++q)
      for (int half = 0; half < 2; ++half) {
        Bytes v[4];
        load_lanes([&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[r][q].code) + half); }, v);
        for (int i = 0; i < 4; ++i) {
          const int four = half * 4 + i;
          store_bytes(out + (C::bits == 8 ? q * 8 + four : four % 2 * kTileRows + q * 4 + four / 2) * kLine, v[i]);
        }
      }
    for (int r = 0; r < kTileRows; ++r) {
      space.scale(tile, p / GROUP)[r] = row[r]->scale;
      row[r] += step[r];
    }
  }
}

// 16 rows of W from a column on; those past `count` repeat the last one.
struct Sixteen {
  const char *data[kTileRows], *scale[kTileRows], *zero[kTileRows];

  Sixteen(const Weights& w, int64_t column, int64_t count) {
    for (int r = 0; r < kTileRows; ++r) {
      const MatrixRow row(*w.matrix, matrix_row(w, column + (r < count ? r : count - 1)));
      data[r] = row.data, scale[r] = row.scale, zero[r] = row.zero;
    }
  }
};

// The same as the left operand: bytes, and scales, from a group to the next `scale_step` apart.
struct Left {
  const char* data;
  int64_t stride;  // bytes
  const float* scale;
  int64_t scale_step;
};

// 8-bit rows stay where they are if they are all there, evenly apart, and whole groups.
struct Int8Rows {
  static constexpr int bits = 8;

  template <int GROUP>
  static bool left(const Weights& w, int64_t column, int64_t count, int64_t d, const TileSpace& space, Left& out) {
    const QuantizedMatrix& m = *w.matrix;
    const Sixteen rows(w, column, count);
    for (int r = 0; r < kTileRows; ++r) __builtin_memcpy(space.weight_scale(0) + r, rows.scale[r], sizeof(float));
    const bool one_run = column + kTileRows <= w.split || column >= w.split;
    if (count == kTileRows && one_run && d % (GROUP * kPiece) == 0) {
      out = {rows.data[0], w.row_step * m.data_stride, space.weight_scale(0), 0};
      return true;
    }
    const int64_t stride = space.pieces * kPiece;
    for (int r = 0; r < kTileRows; ++r) {
      char* const to = space.weights() + r * stride;
      __builtin_memcpy(to, rows.data[r], size_t(d));
      __builtin_memset(to + d, 0, size_t(stride - d));
    }
    out = {space.weights(), stride, space.weight_scale(0), 0};
    return true;
  }
};

// 128 codes of four bits as bytes: f of the low nibbles, and of the high ones.
template <class F>
[[gnu::always_inline]] inline void decode_nibbles(const char* from, char* to, F&& f) {
  const Bytes codes = load_bytes(from);
  store_bytes(to, f(low_nibbles(codes)));
  store_bytes(to + kLine, f(high_nibbles(codes)));
}

// Twice the values, times what their group's scale is over the least of four groups.
struct Mxfp4Rows {
  static constexpr int bits = 4;

  template <int GROUP>
  static bool left(const Weights& w, int64_t column, int64_t count, int64_t, const TileSpace& space, Left& out) {
    static_assert(GROUP == 4);
    alignas(16) static constexpr int8_t values[kFar + 1][16] = {
        {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12},
        {0, 2, 4, 6, 8, 12, 16, 24, 0, -2, -4, -6, -8, -12, -16, -24},
        {0, 4, 8, 12, 16, 24, 32, 48, 0, -4, -8, -12, -16, -24, -32, -48},
        {0, 8, 16, 24, 32, 48, 64, 96, 0, -8, -16, -24, -32, -48, -64, -96}};
    const Sixteen rows(w, column, count);
    const int64_t groups = space.pieces / GROUP, stride = space.pieces * kPiece;
    for (int64_t g = 0; g < groups; g += 4) {
      const int64_t here = groups - g < 4 ? groups - g : 4;
      Bytes codes[4];
      const __mmask16 mask = lanes_below(int(here * GROUP));
      load_lanes([&](int r) { return _mm_maskz_loadu_epi8(mask, rows.scale[r] + g * GROUP); }, codes);
      for (int64_t i = 0; i < here; ++i) {
        Bytes least, above_least;
        if (!near_powers(codes[i], least, above_least)) return false;
        store(space.weight_scale(g + i), e8m0_of_byte(least, 0) * set<VF>(0.5f));
        alignas(64) uint8_t above[kTileRows][GROUP];
        store_bytes(reinterpret_cast<char*>(above), above_least);
        for (int r = 0; r < kTileRows; ++r) {
          const auto table = [&](int p) {
            return _mm_load_si128(reinterpret_cast<const __m128i*>(values[above[r][p]]));
          };
          __m512i tables = _mm512_castsi128_si512(table(0));
          tables = _mm512_inserti32x4(tables, table(1), 1);
          tables = _mm512_inserti32x4(tables, table(2), 2);
          tables = _mm512_inserti32x4(tables, table(3), 3);
          decode_nibbles(rows.data[r] + (g + i) * kLine, space.weights() + r * stride + (g + i) * 2 * kLine,
                         [&](Bytes x) { return _mm512_shuffle_epi8(tables, x); });
        }
      }
    }
    out = {space.weights(), stride, space.weight_scale(0), kTileRows};
    return true;
  }
};

// Codes less their zero points.
struct Int4Rows {
  static constexpr int bits = 4;

  template <int GROUP>
  static bool left(const Weights& w, int64_t column, int64_t count, int64_t, const TileSpace& space, Left& out) {
    constexpr int last_zero = 127;  // with which a difference is a byte
    const Sixteen rows(w, column, count);
    const int64_t groups = space.pieces / GROUP, stride = space.pieces * kPiece;
    const int64_t shared = w.matrix->scale_columns / (GROUP * kPiece);  // groups with the same scale
    for (int64_t g = 0; g < groups; ++g)
      for (int r = 0; r < kTileRows; ++r) {
        const int64_t at = g / shared;
        const int zero = rows.zero[r] ? uint8_t(rows.zero[r][at]) : 8;
        if (zero > last_zero) return false;
        __builtin_memcpy(space.weight_scale(g) + r, rows.scale[r] + at * 4, sizeof(float));
        decode_nibbles(rows.data[r] + g * kLine, space.weights() + r * stride + g * 2 * kLine,
                       [&](Bytes x) { return _mm512_sub_epi8(x, _mm512_set1_epi8(char(zero))); });
      }
    out = {space.weights(), stride, space.weight_scale(0), kTileRows};
    return true;
  }
};

void configure_for(int bytes) {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < kA + 2; ++tile) {
    config.row_bytes[tile] = uint16_t(tile >= kW && tile < kA ? bytes : kLine);
    config.rows[tile] = uint8_t(tile < kA ? kTileRows : bytes / 4);
  }
  asm volatile("ldtilecfg %0" : : "m"(config));
}

// Integer sums of a group, row by row of W. SLOT, the group's number, says which registers it takes: neighbours take
// others, so that none waits for the one before.
template <int GROUP, int SLOT>
[[gnu::always_inline]] inline void multiply_group(const Left& w, const TileSpace& space, int64_t tile, int64_t group,
                                                  int32_t* sums) {
  constexpr int kTogether = GROUP == 1 ? 1 : 2;  // pieces of a product
  constexpr int c = SLOT % kSums;
  tile_zero<c>();
  each<GROUP / kTogether>([&](auto i) {
    constexpr int parity = (i.value + SLOT) % 2;
    const int64_t piece = group * GROUP + i.value * kTogether;
    tile_load<kW + parity>(w.data + piece * kPiece, w.stride);
    tile_load<kA + parity>(space.rows(tile, piece), kLine);
    tile_dot_int8<c, kW + parity, kA + parity>();
  });
  tile_store<c>(sums, kLine);
}

// Where the sums of a tile go.
struct Place {
  float* c;
  int64_t ldc, rows, columns;
};

template <int BITS, int GROUP>
void multiply_tile(const Left& w, const TileSpace& space, int64_t tile, Streams ahead, const Place& out) {
  constexpr int kWaiting = 2;  // groups whose sums are in memory
  alignas(64) int32_t sums[kWaiting][kTileRows * kTileRows];
  VF total[kTileRows];
#pragma GCC unroll 16
  for (VF& v : total) v = set<VF>(0);
  const int64_t groups = space.pieces / GROUP;
  // Vectors add a group while tiles multiply the next one.
  multiply_group<GROUP, 0>(w, space, tile, 0, sums[0]);
  for (int64_t begin = 0; begin < groups; begin += kSums)
    each<kSums>([&](auto slot) {
      const int64_t group = begin + slot.value;
      if (group >= groups) return;
      constexpr int next = slot.value + 1;
      for (int i = 0; i < GROUP * BITS / 4; ++i) ahead.ask();  // for as much as a group of 16 rows takes
      if (group + 1 < groups) multiply_group<GROUP, next>(w, space, tile, group + 1, sums[next % kWaiting]);
      const VF scale_a = load<VF>(space.scale(tile, group));
      const float* const scale = w.scale + group * w.scale_step;
      const int32_t* const sum = sums[slot.value % kWaiting];
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const VF exact = to_float(_mm512_load_si512(sum + r * kTileRows));
        total[r] = fma(BITS == 8 ? exact : exact * set<VF>(scale[r]), scale_a, total[r]);
      }
    });
  transpose(total);
  const VF row_scales = load<VF>(w.scale);
  for (int t = 0; t < out.rows; ++t)
    store_n(out.c + t * out.ldc, BITS == 8 ? total[t] * row_scales : total[t], int(out.columns));
}

template <class C, int GROUP>
void multiply(const Piece* a, const RowGroups& groups, int64_t m, const Weights& w, int64_t n, int64_t d, float* c,
              int64_t ldc, MultiplyColumns otherwise) {
  if (d == 0) {
    for (int64_t i = 0; i < m; ++i) __builtin_memset(c + i * ldc, 0, size_t(n) * sizeof(float));
    return;
  }
  const TileSpace space{(d + GROUP * kPiece - 1) / (GROUP * kPiece) * GROUP, w.workspace};
  Weights left_over = w;
  left_over.workspace += space.bytes();
  configure_for(int(GROUP == 1 ? kPiece : kLine));
  for (int64_t first = 0; first < m; first += kTilesTogether * kTileRows) {
    const int64_t rows = m - first < kTilesTogether * kTileRows ? m - first : kTilesTogether * kTileRows;
    for (int64_t i = 0; i < rows; i += kTileRows) write_right<C, GROUP>(a, groups, first + i, m, space, i / kTileRows);
    for (int64_t column = 0; column < n; column += kTileRows) {
      const int64_t columns = n - column < kTileRows ? n - column : kTileRows;
      Left left;
      if (!C::template left<GROUP>(w, column, columns, d, space, left)) {
        if (first == 0) otherwise(a, groups, left_over, column, columns, n, d, c, ldc);
        continue;
      }
      for (int64_t i = 0; i < rows; i += kTileRows) {
        // The first rows of A have all weights fetched, which the L2 cache then holds for the others.
        const Streams ahead =
            first + i == 0 ? streams_ahead(w, column + kTileRows, n, kTileRows, d, C::bits) : Streams();
        const Place place{c + (first + i) * ldc + column, ldc, rows - i < kTileRows ? rows - i : kTileRows, columns};
        multiply_tile<C::bits, GROUP>(left, space, i / kTileRows, ahead, place);
      }
    }
  }
  _tile_release();
}

int64_t workspace(int64_t pieces) { return TileSpace{pieces, nullptr}.bytes(); }

}  // namespace

const Int8Tiles int8_tiles = {multiply<Int8Rows, 1>, workspace}, int8_g128_tiles = {multiply<Int8Rows, 4>, workspace};
const Int8Tiles mxfp4_g128_tiles = {multiply<Mxfp4Rows, 4>, workspace};
const Int8Tiles int4_g128_tiles = {multiply<Int4Rows, 4>, workspace};

}  // namespace polymoe::POLYMOE_LEVEL
#endif
