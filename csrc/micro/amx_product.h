// Products of bf16 on AMX tiles: what every format of the weights shares. A step is 32 elements of the reduction, one
// tile instruction.
//
// An element of C is one chain of additions over the steps in ascending order, in memory between two blocks, and within
// a step the instruction sums even and odd elements apart. Neither depends on how tiles lie, nor on which operand the
// weights are: packed weights are the right one, whose tiles hold pairs of elements side by side, and rows of weights
// are the left one, which gives C transposed. So both give the same bits.
#pragma once

#include "../formats/orders.h"
#include "gemm_kernel.h"
#include "simd.h"
#include "tiles.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kStep = 32, kTileRows = 16;
constexpr int kMaxRows = 2 * kTileRows;
constexpr int64_t kLine = 64;

// Steps after which the next row group takes its turn with the same weights, which the L2 cache holds until then. In
// shorter blocks the sums would go to memory and back too often.
constexpr int64_t kBlockSteps = 64;

inline int64_t steps_of(int64_t d) { return (d + kStep - 1) / kStep; }

// The rows of a group in tiles: as one, or as two even ones.
struct Halves {
  int count[2];
  explicit Halves(int rows) : count{rows <= kTileRows ? rows : (rows + 1) / 2, rows <= kTileRows ? 0 : rows / 2} {}
  int tiles() const { return count[1] ? 2 : 1; }
};

// An operand of a product of tiles: where the first ones lie, bytes from a tile's row to the next, and bytes from a
// step to the next.
struct Side {
  const char* tile[4];
  int64_t stride[4], step;
};
struct Sums {
  float* tile[4];
  int64_t stride;  // bytes
};

// The shape of the tile registers as they are.
struct Configured {
  TileShape shape{};
  int na = 0, nb = 0;

  ~Configured() { _tile_release(); }

  template <int NA, int NB>
  void become(const TileShape& wanted) {
    if (na == NA && nb == NB && shape == wanted) return;
    configure<NA, NB>(wanted);
    shape = wanted, na = NA, nb = NB;
  }
};

// `meanwhile(s, part, parts)`: what there is to do after product number `part` of the `parts` products of step s.
// Fetches that come between products, not all at once, leave fill buffers to the tiles.
struct Nothing {
  void operator()(int64_t, int, int) const {}
};
// The same for work that is done once in a step.
template <class F>
struct EachStep {
  F work;

  [[gnu::always_inline]] void operator()(int64_t step, int part, int parts) const {
    if (part + 1 == parts) work(step);
  }
};
template <class F>
EachStep(F) -> EachStep<F>;

// Where a chain of sums goes on: from zero, from where it was stored, or in the registers, which still hold it.
enum class From { zero, memory, registers };

template <int NA, int NB>
[[gnu::always_inline]] inline void open_tiles(From from, const Sums& c) {
  each<NA * NB>([&](auto i) {
    if (from == From::memory)
      tile_load<i.value>(c.tile[i.value], c.stride);
    else if (from == From::zero)
      tile_zero<i.value>();
  });
}

template <int NA, int NB, class Meanwhile>
[[gnu::always_inline]] inline void add_steps(const Side& a, const Side& b, int64_t steps, Meanwhile&& meanwhile) {
  using T = TileNumbers<NA, NB>;
  int64_t at_a = 0, at_b = 0;
  for (int64_t s = 0; s < steps; ++s, at_a += a.step, at_b += b.step) {
    const auto load_a = [&](auto i) { tile_load<T::a(i.value)>(a.tile[i.value] + at_a, a.stride[i.value]); };
    const auto load_b = [&](auto j) { tile_load<T::b(j.value)>(b.tile[j.value] + at_b, b.stride[j.value]); };
    const auto dot = [&](auto i, auto j) { tile_dot_bf16<T::c(i.value, j.value), T::a(i.value), T::b(j.value)>(); };
    if constexpr (T::keeps_a) {
      each<NA>(load_a);
      each<NB>([&](auto j) {
        load_b(j);
        each<NA>([&](auto i) { dot(i, j), meanwhile(s, j.value * NA + i.value, NA * NB); });
      });
    } else {
      each<NB>(load_b);
      each<NA>([&](auto i) {
        load_a(i);
        each<NB>([&](auto j) { dot(i, j), meanwhile(s, i.value * NB + j.value, NA * NB); });
      });
    }
  }
}

template <int NA, int NB>
[[gnu::always_inline]] inline void close_tiles(const Sums& c) {
  each<NA * NB>([&](auto i) { tile_store<i.value>(c.tile[i.value], c.stride); });
}

template <int NA, int NB, class Meanwhile>
[[gnu::always_inline]] inline void multiply_tiles(const Side& a, const Side& b, int64_t steps, bool add, const Sums& c,
                                                  Meanwhile&& meanwhile) {
  open_tiles<NA, NB>(add ? From::memory : From::zero, c);
  add_steps<NA, NB>(a, b, steps, meanwhile);
  close_tiles<NA, NB>(c);
}

// Packed rows of A, and what they are multiplied into.
struct Rows {
  const char* a;
  RowGroups groups;
  int64_t d;
  float* c;
  int64_t ldc;

  int64_t steps() const { return steps_of(d); }
  const char* at(int64_t group, int64_t step) const {
    return a + (groups.first_row(group) * steps() + step * groups.rows(group)) * kLine;
  }
  float* sums(int64_t group) const { return c + groups.first_row(group) * ldc; }
  bool small() const { return groups.rows(0) <= kTileRows; }  // every group is one tile
};

// True if there is nothing to multiply; then C is finished.
inline bool trivial(const Rows& rows, int64_t m, int64_t n) {
  if (m == 0 || n == 0) return true;
  if (rows.d > 0) return false;
  for (int64_t i = 0; i < m; ++i) __builtin_memset(rows.c + i * rows.ldc, 0, size_t(n) * sizeof(float));
  return true;
}

// ---- Weights as the left operand ----

// The sums of a row group, transposed: up to two tiles of rows of W by one or two tiles of rows of A. Rows of a tile
// lie as far apart as the first tile of A has columns.
struct Transposed {
  alignas(64) float tile[4][kTileRows * kTileRows];
};

// A product of one or two tiles of rows of W with a row group: from where its sums go on, and whether they are stored.
struct Chain {
  From from;
  bool store;
};

// Multiplies one or two tiles of `left`, rows of W, with a row group from step `begin` on.
template <class Meanwhile>
[[gnu::always_inline]] inline void multiply_left(const Rows& rows, int64_t group, const Side& left, int tiles,
                                                 int tile_rows, int64_t begin, int64_t steps, Chain chain,
                                                 Transposed& sums, Configured& configured, Meanwhile&& meanwhile) {
  const Halves halves(rows.groups.rows(group));
  const char* const a = rows.at(group, begin);
  const Side right{
      {a, a + halves.count[0] * kLine}, {halves.count[0] * 4, halves.count[1] * 4}, rows.groups.rows(group) * kLine};
  const TileShape shape{{tile_rows, tile_rows}, {halves.count[0], halves.count[1]}};
  Sums c{{}, halves.count[0] * int64_t(sizeof(float))};
  for (int i = 0; i < 4; ++i) c.tile[i] = sums.tile[i];
  const auto run = [&](auto na, auto nb) {
    configured.become<na.value, nb.value>(shape);
    open_tiles<na.value, nb.value>(chain.from, c);
    add_steps<na.value, nb.value>(left, right, steps, meanwhile);
    if (chain.store) close_tiles<na.value, nb.value>(c);
  };
  if (halves.tiles() == 2)
    tiles == 2 ? run(Index<2>{}, Index<2>{}) : run(Index<1>{}, Index<2>{});
  else
    tiles == 2 ? run(Index<2>{}, Index<1>{}) : run(Index<1>{}, Index<1>{});
}

// Writes a group's sums with `count` rows of W to columns `column` of C on.
inline void store_transposed(const Rows& rows, int64_t group, int64_t count, const Transposed& sums, int64_t column) {
  const Halves halves(rows.groups.rows(group));
  for (int64_t i = 0; i * kTileRows < count; ++i)
    for (int j = 0; j < halves.tiles(); ++j) {
      VF v[kTileRows];
      const float* const tile = sums.tile[i * halves.tiles() + j];
      for (int r = 0; r < kTileRows; ++r) v[r] = load_n(tile + r * halves.count[0], halves.count[j]);
      transpose(v);
      float* const c = rows.sums(group) + j * halves.count[0] * rows.ldc + column + i * kTileRows;
      const int64_t left = count - i * kTileRows;
      for (int r = 0; r < halves.count[j]; ++r)
        store_n(c + r * rows.ldc, v[r], left < kTileRows ? int(left) : kTileRows);
    }
}

// Steps of A whose elements may change places with one another.
constexpr int64_t kTogether = 4;

// An order of kTogether whole steps at once: `together` if step s of them is every fourth element from s on.
template <class Order>
constexpr bool together = false;

// Step s of a row of d elements, in their order, zeros after the last one.
template <class Order>
[[gnu::always_inline]] inline __m512i load_step(const char* row, int64_t s, int64_t d) {
  const int64_t first = s / kTogether * kTogether;
  if (together<Order> && (first + kTogether) * kStep <= d) {
    // Word 4w + j of four lines: those of each 64 bits that are not j go.
    const char* const from = row + first * kLine;
    const __m128i shift = _mm_cvtsi64_si128((s - first) * 16);
    const auto words = [&](int line) {
      return _mm512_cvtepi64_epi16(_mm512_srl_epi64(_mm512_loadu_si512(from + line * kLine), shift));
    };
    const auto halves = [&](int line) { return _mm256_set_m128i(words(line + 1), words(line)); };
    return _mm512_inserti64x4(_mm512_castsi256_si512(halves(0)), halves(2), 1);
  }
  const int64_t left = d - s * kStep;
  const __m512i line = _mm512_maskz_loadu_epi16(left < kStep ? (1u << left) - 1 : ~0u, row + s * kLine);
  return in_order<Order>(line);
}

// Packs A as the right operand: a row of a tile has the same pair of every row of A.
template <class Order>
void pack_right(const char* const* rows, int64_t count, int64_t d, char* out) {
  if (count == 1) {
    for (int64_t s = 0; s < steps_of(d); ++s) _mm512_storeu_si512(out + s * kLine, load_step<Order>(rows[0], s, d));
    return;
  }
  const Halves halves{int(count)};
  for (int64_t s = 0; s < steps_of(d); ++s)
    for (int half = 0, first = 0; half < halves.tiles(); first += halves.count[half++]) {
      VF v[kTileRows];
      for (int r = 0; r < kTileRows; ++r)
        v[r] = r < halves.count[half] ? VF{_mm512_castsi512_ps(load_step<Order>(rows[first + r], s, d))} : set<VF>(0);
      transpose(v);
      float* const tile = reinterpret_cast<float*>(out + (s * count + first) * kLine);
      for (int pair = 0; pair < kTileRows; ++pair)
        store_n(tile + pair * halves.count[half], v[pair], halves.count[half]);
    }
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
