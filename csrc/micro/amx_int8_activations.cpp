// The product of the modes "int8" and "int8_g128" with int8 weights, for many rows, on AMX tiles, which multiply signed
// bytes. 16 rows of W, where they lie, are the left operand of a product and 16 rows of A the right one, with four
// elements of the reduction side by side.
//
// The sums of a group are integers and therefore exact, in whatever order. They leave the tiles, and vectors do
//
//   part   = sum * scale of the weights
//   total += part * scale of a
//
// with rows of A in the lanes: the steps of int8_gemm.cpp, and its bits.
#include "amx_gemm.h"

#if defined(POLYMOE_LEVEL_AMX)

#include "bytes.h"
#include "int8_piece.h"
#include "tiles.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kTileRows = 16;
constexpr int64_t kLine = 64;
constexpr int kSums = 4, kW = 4, kA = 6;  // registers: four of sums, two of each operand

// Places in the workspace: 16 rows of A as tiles of a piece each, their scales by group, and 16 rows of W with zeros up
// to whole groups.
struct TileSpace {
  static constexpr int64_t piece_bytes = kTileRows * kPiece;
  int64_t pieces;
  char* base;

  char* rows(int64_t piece) const { return base + piece * piece_bytes; }
  float* scale(int64_t group) const { return reinterpret_cast<float*>(rows(pieces)) + group * kTileRows; }
  char* weights() const { return rows(pieces) + pieces * kLine; }
};

// Rows of A from `first` on, as the right operand; those past the end repeat the last one.
template <int GROUP>
void write_right(const Piece* a, const RowGroups& groups, int64_t first, int64_t m, const TileSpace& space) {
  const char* row[kTileRows];
  int64_t step[kTileRows];  // bytes from a group of a row to the next
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t i = first + r < m ? first + r : m - 1;
    const int64_t larger = groups.larger * (groups.size + 1);
    const int64_t group = i < larger ? i / (groups.size + 1) : groups.larger + (i - larger) / groups.size;
    const int64_t begin = groups.first_row(group);
    row[r] = reinterpret_cast<const char*>(a + begin * space.pieces + (i - begin) * GROUP);
    step[r] = groups.rows(group) * int64_t(GROUP * sizeof(Piece));
  }
  for (int64_t p = 0; p < space.pieces; p += GROUP) {
    for (int q = 0; q < GROUP; ++q)
      for (int64_t half = 0; half < 2; ++half) {
        Bytes v[4];
        load_lanes(row, q * int64_t(sizeof(Piece)) + half * 16, v);
        for (int i = 0; i < 4; ++i) store_bytes(space.rows(p + q) + half * 4 * kLine + i * kLine, v[i]);
      }
    for (int r = 0; r < kTileRows; ++r) {
      space.scale(p / GROUP)[r] = reinterpret_cast<const Piece*>(row[r])->scale;
      row[r] += step[r];
    }
  }
}

// 16 rows of W.
struct Left {
  const char* data;
  int64_t stride;  // bytes
};

// From a column on; those past `count` repeat the last one. Rows stay where they are if they are all there, evenly
// apart, and whole groups.
template <int GROUP>
Left left_operand(const Weights& w, int64_t column, int64_t count, int64_t d, const TileSpace& space) {
  const QuantizedMatrix& m = *w.matrix;
  const bool one_run = column + kTileRows <= w.split || column >= w.split;
  if (count == kTileRows && one_run && d % (GROUP * kPiece) == 0)
    return {m.data + matrix_row(w, column) * m.data_stride, w.row_step * m.data_stride};
  const int64_t stride = space.pieces * kPiece;
  for (int r = 0; r < kTileRows; ++r) {
    char* const to = space.weights() + r * stride;
    __builtin_memcpy(to, m.data + matrix_row(w, column + (r < count ? r : count - 1)) * m.data_stride, size_t(d));
    __builtin_memset(to + d, 0, size_t(stride - d));
  }
  return {space.weights(), stride};
}

void read_scales(const Weights& w, int64_t column, int64_t count, float* scale) {
  const QuantizedMatrix& m = *w.matrix;
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t n = matrix_row(w, column + (r < count ? r : count - 1));
    __builtin_memcpy(scale + r, m.scale + (m.scale_rows == 1 ? n : n / m.scale_rows) * m.scale_stride, 4);
  }
}

// Rows of W that will be read next.
struct Ahead {
  const char* row[kTileRows];
  int count = 0;

  Ahead() = default;
  Ahead(const Weights& w, int64_t next, int64_t n) {
    const QuantizedMatrix& m = *w.matrix;
    for (; count < kTileRows; ++count) {
      if (next < n ? next + count >= n : !w.next) return;
      row[count] =
          next < n ? m.data + matrix_row(w, next + count) * m.data_stride : w.next + count * w.row_step * m.data_stride;
    }
  }

  // Of two pieces, which are a line, one asks for the even rows and the other for the odd ones.
  void ask(int64_t p) const {
    for (int r = int(p % 2); r < count; r += 2) __builtin_prefetch(row[r] + p * kPiece, 0, 2);
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
[[gnu::always_inline]] inline void multiply_group(const Left& w, const TileSpace& space, int64_t group, int32_t* sums) {
  constexpr int kTogether = GROUP == 1 ? 1 : 2;  // pieces of a product
  constexpr int c = SLOT % kSums;
  tile_zero<c>();
  each<GROUP / kTogether>([&](auto i) {
    constexpr int parity = (i.value + SLOT) % 2;
    const int64_t piece = group * GROUP + i.value * kTogether;
    tile_load<kW + parity>(w.data + piece * kPiece, w.stride);
    tile_load<kA + parity>(space.rows(piece), kLine);
    tile_dot_int8<c, kW + parity, kA + parity>();
  });
  tile_store<c>(sums, kLine);
}

template <int GROUP>
void multiply_tile(const Left& w, const TileSpace& space, const float* scale, const Ahead& ahead, float* c, int64_t ldc,
                   int64_t rows, int64_t columns) {
  constexpr int kWaiting = 2;  // groups whose sums are in memory
  alignas(64) int32_t sums[kWaiting][kTileRows * kTileRows];
  VF total[kTileRows];
#pragma GCC unroll 16
  for (VF& v : total) v = set<VF>(0);
  const int64_t groups = space.pieces / GROUP;
  // Vectors add a group while tiles multiply the next one.
  multiply_group<GROUP, 0>(w, space, 0, sums[0]);
  for (int64_t begin = 0; begin < groups; begin += kSums)
    each<kSums>([&](auto slot) {
      const int64_t group = begin + slot.value;
      if (group >= groups) return;
      constexpr int next = slot.value + 1;
      for (int p = 0; p < GROUP; ++p) ahead.ask(group * GROUP + p);
      if (group + 1 < groups) multiply_group<GROUP, next>(w, space, group + 1, sums[next % kWaiting]);
      const VF scale_a = load<VF>(space.scale(group));
      const int32_t* const sum = sums[slot.value % kWaiting];
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const VF exact = to_float(_mm512_load_si512(sum + r * kTileRows));
        total[r] = fma(exact * set<VF>(scale[r]), scale_a, total[r]);
      }
    });
  transpose(total);
  for (int t = 0; t < rows; ++t) store_n(c + t * ldc, total[t], int(columns));
}

template <int GROUP>
void multiply(const Piece* a, const RowGroups& groups, int64_t m, const Weights& w, int64_t n, int64_t d, float* c,
              int64_t ldc) {
  if (d == 0) {
    for (int64_t i = 0; i < m; ++i) __builtin_memset(c + i * ldc, 0, size_t(n) * sizeof(float));
    return;
  }
  const TileSpace space{(d + GROUP * kPiece - 1) / (GROUP * kPiece) * GROUP, w.workspace};
  configure_for(int(GROUP == 1 ? kPiece : kLine));
  for (int64_t first = 0; first < m; first += kTileRows) {
    write_right<GROUP>(a, groups, first, m, space);
    const int64_t rows = m - first < kTileRows ? m - first : kTileRows;
    for (int64_t column = 0; column < n; column += kTileRows) {
      const int64_t columns = n - column < kTileRows ? n - column : kTileRows;
      float scale[kTileRows];
      read_scales(w, column, columns, scale);
      // The first rows of A have all weights fetched, which the L2 cache then holds for the others.
      const Ahead ahead = first == 0 ? Ahead(w, column + kTileRows, n) : Ahead();
      multiply_tile<GROUP>(left_operand<GROUP>(w, column, columns, d, space), space, scale, ahead,
                           c + first * ldc + column, ldc, rows, columns);
    }
  }
  _tile_release();
}

}  // namespace

const MultiplyInt8 int8_tiles = multiply<1>, int8_g128_tiles = multiply<4>;

}  // namespace polymoe::POLYMOE_LEVEL
#endif
