// AMX tile registers: eight of up to 16 rows of 64 bytes, shaped by a configuration of the whole file.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace polymoe::POLYMOE_LEVEL {
namespace {

// Lengths of the tiles of a product C += A B of up to two by two different shapes: rows of A, columns of B.
struct TileShape {
  int rows[2], columns[2];

  bool operator==(const TileShape& other) const {
    return rows[0] == other.rows[0] && rows[1] == other.rows[1] && columns[0] == other.columns[0] &&
           columns[1] == other.columns[1];
  }
};

template <int I>
struct Index {
  static constexpr int value = I;
};

template <int N, int I = 0, class F>
[[gnu::always_inline]] inline void each(F&& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    each<N, I + 1>(f);
  }
}

// The numbers of tile registers must be constants of the instruction, and GCC's intrinsics take literals alone.
template <int TILE>
[[gnu::always_inline]] inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
template <int TILE>
[[gnu::always_inline]] inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
[[gnu::always_inline]] inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
}
// C += A B for pairs of bf16: within 32 elements of the reduction even and odd ones are summed apart.
template <int C, int A, int B>
[[gnu::always_inline]] inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
// The same for signed bytes, four at a time, in 32-bit integers.
template <int C, int A, int B>
[[gnu::always_inline]] inline void tile_dot_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// The registers of a product of NA by NB tiles. The longer side passes through three registers in turn, the shorter
// one stays.
template <int NA, int NB>
struct TileNumbers {
  static_assert(NA * NB <= 4 && (NA <= 2 || NB == 1) && (NB <= 2 || NA == 1));
  static constexpr bool keeps_a = NA <= NB;
  static constexpr int kept = keeps_a ? NA : NB;
  static constexpr int c(int i, int j) { return i * NB + j; }
  static constexpr int a(int i) { return keeps_a ? 4 + i : 4 + kept + i % (4 - kept); }
  static constexpr int b(int j) { return keeps_a ? 4 + kept + j % (4 - kept) : 4 + j; }
};

// Shapes the registers of a product of NA by NB tiles: of a side of three or four, all are of its first shape.
template <int NA, int NB>
inline void configure(const TileShape& shape) {
  using T = TileNumbers<NA, NB>;
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const auto rows = [&](int i) { return NA == 2 ? shape.rows[i] : shape.rows[0]; };
  const auto columns = [&](int j) { return NB == 2 ? shape.columns[j] : shape.columns[0]; };
  const auto set_tile = [&](int tile, int count, int bytes) {
    config.rows[tile] = uint8_t(count);
    config.row_bytes[tile] = uint16_t(bytes);
  };
  for (int i = 0; i < NA; ++i) set_tile(T::a(i), rows(i), 64);
  for (int j = 0; j < NB; ++j) set_tile(T::b(j), 16, 4 * columns(j));
  for (int i = 0; i < NA; ++i)
    for (int j = 0; j < NB; ++j) set_tile(T::c(i, j), rows(i), 4 * columns(j));
  asm volatile("ldtilecfg %0" : : "m"(config));  // the intrinsic reads eight bytes of it, as far as GCC can see
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
