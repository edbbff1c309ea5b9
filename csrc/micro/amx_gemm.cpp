// The matmul microkernels for bf16 on AMX tiles. A step is 32 elements of the reduction, one tile instruction.
//
// An element of C is one chain of additions over the steps in ascending order, in memory between two blocks, and within
// a step the instruction sums even and odd elements apart. Neither depends on how tiles lie, nor on which operand the
// weights are: packed weights are the right one, whose tiles hold pairs of elements side by side, and plain rows are
// the left one, which gives C transposed. So both formats give the same bits.
#include "amx_gemm.h"

#if defined(POLYMOE_LEVEL_AMX)

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

int64_t steps_of(int64_t d) { return (d + kStep - 1) / kStep; }

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

// Cache lines that later products will read: one of each of `count` streams, every step.
struct Ahead {
  const char* at[kMaxRows];
  int count = 0;

  void operator()(int64_t step) const {
    for (int i = 0; i < count; ++i) __builtin_prefetch(at[i] + step * kLine, 0, 2);
  }
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

template <int NA, int NB, class Ahead>
void multiply_tiles(const Side& a, const Side& b, int64_t steps, bool add, const Sums& c, const Ahead& ahead) {
  using T = TileNumbers<NA, NB>;
  each<NA>([&](auto i) {
    each<NB>([&](auto j) {
      constexpr int tile = T::c(i.value, j.value);
      if (add)
        tile_load<tile>(c.tile[tile], c.stride);
      else
        tile_zero<tile>();
    });
  });
  int64_t at_a = 0, at_b = 0;
  for (int64_t s = 0; s < steps; ++s, at_a += a.step, at_b += b.step) {
    const auto load_a = [&](auto i) { tile_load<T::a(i.value)>(a.tile[i.value] + at_a, a.stride[i.value]); };
    const auto load_b = [&](auto j) { tile_load<T::b(j.value)>(b.tile[j.value] + at_b, b.stride[j.value]); };
    const auto dot = [&](auto i, auto j) { tile_dot_bf16<T::c(i.value, j.value), T::a(i.value), T::b(j.value)>(); };
    if constexpr (T::keeps_a) {
      each<NA>(load_a);
      each<NB>([&](auto j) {
        load_b(j);
        each<NA>([&](auto i) { dot(i, j); });
      });
    } else {
      each<NB>(load_b);
      each<NA>([&](auto i) {
        load_a(i);
        each<NB>([&](auto j) { dot(i, j); });
      });
    }
    ahead(s);
  }
  each<NA * NB>([&](auto i) { tile_store<i.value>(c.tile[i.value], c.stride); });
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

// ---- Packed weights ----

constexpr int64_t kPanelStep = kPanel * kStep * int64_t(sizeof(bf16));  // bytes of a step of a full panel

// `steps` steps, from step `begin` of the rows of A on, of one or two panels; `c` points to the group's sums.
template <class Fetch>
[[gnu::nothrow]] void multiply_panels(const Rows& rows, int64_t group, const char* const* panel, int panels,
                                      int64_t begin, int64_t steps, float* c, int64_t ldc, Configured& configured,
                                      const Fetch& ahead) {
  const Halves halves(rows.groups.rows(group));
  const char* const a = rows.at(group, begin);
  const Side left{{a, a + halves.count[0] * kLine}, {kLine, kLine}, rows.groups.rows(group) * kLine};
  Side right{{}, {}, kPanelStep};
  for (int j = 0; j < 2 * panels; ++j) right.tile[j] = panel[j / 2] + j % 2 * kLine, right.stride[j] = 2 * kLine;
  const TileShape shape{{halves.count[0], halves.count[1]}, {kTileRows, kTileRows}};
  Sums sums{{}, ldc * int64_t(sizeof(float))};
  if (halves.tiles() == 2) {
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) sums.tile[2 * i + j] = c + i * halves.count[0] * ldc + j * kTileRows;
    configured.become<2, 2>(shape);
    multiply_tiles<2, 2>(left, right, steps, begin != 0, sums, ahead);
    return;
  }
  for (int j = 0; j < 2 * panels; ++j) sums.tile[j] = c + j * kTileRows;
  if (panels == 2) {
    configured.become<1, 4>(shape);
    multiply_tiles<1, 4>(left, right, steps, begin != 0, sums, ahead);
  } else {
    configured.become<1, 2>(shape);
    multiply_tiles<1, 2>(left, right, steps, begin != 0, sums, ahead);
  }
}

// The last d % kStep elements of `columns` columns, widened to a step of a full panel with zeros. `tail` points to
// whole pairs, then to the odd elements.
void expand_tail(const char* tail, int64_t columns, int64_t left, char* out) {
  __builtin_memset(out, 0, size_t(kPanelStep));
  for (int64_t pair = 0; pair < left / 2; ++pair)
    __builtin_memcpy(out + pair * 2 * kLine, tail + pair * columns * 4, size_t(columns) * 4);
  if (left % 2 == 0) return;
  const char* const odd = tail + left / 2 * columns * 4;
  for (int64_t j = 0; j < columns; ++j) __builtin_memcpy(out + left / 2 * 2 * kLine + j * 4, odd + j * 2, 2);
}

void multiply_full_panels(const Rows& rows, const char* weights, int64_t panels, int64_t column,
                          Configured& configured) {
  const int64_t panel_bytes = kPanel * rows.d * int64_t(sizeof(bf16));
  const int64_t whole = rows.d / kStep, per_strip = rows.small() ? 2 : 1;
  const int64_t block = rows.groups.count > 1 ? kBlockSteps : whole;
  const auto strips = [&](int64_t begin, int64_t steps, auto find) {
    for (int64_t p = 0; p < panels; p += per_strip) {
      const int count = int(panels - p < per_strip ? panels - p : per_strip);
      const char* panel[2];
      for (int i = 0; i < count; ++i) panel[i] = find(weights + (p + i) * panel_bytes, i);
      for (int64_t group = 0; group < rows.groups.count; ++group)
        multiply_panels(rows, group, panel, count, begin, steps, rows.sums(group) + column + p * kPanel, rows.ldc,
                        configured, Ahead{});
    }
  };
  // A block along the reduction passes over all strips before the next one: its slice of A stays in the L2 cache.
  for (int64_t begin = 0; begin < whole; begin += block)
    strips(begin, begin + block < whole ? block : whole - begin,
           [&](const char* panel, int) { return panel + begin * kPanelStep; });
  if (rows.d % kStep == 0) return;
  alignas(64) char tails[2][kPanelStep];
  strips(whole, 1, [&](const char* panel, int i) {
    expand_tail(panel + whole * kPanelStep, kPanel, rows.d % kStep, tails[i]);
    return tails[i];
  });
}

// The panel of fewer than kPanel columns: block by block copied to a full one, and multiplied into full sums.
[[gnu::nothrow]] void multiply_short_panel(const Rows& rows, const char* weights, int64_t columns, int64_t column,
                                           Configured& configured) {
  constexpr int64_t kCopied = 16;
  alignas(64) char full[kCopied * kPanelStep];
  alignas(64) float sums[kMaxRows * kPanel];
  const int64_t whole = rows.d / kStep;
  for (int64_t begin = 0; begin < rows.steps(); begin += kCopied) {
    const int64_t steps = begin + kCopied < rows.steps() ? kCopied : rows.steps() - begin;
    for (int64_t s = 0; s < steps; ++s)
      expand_tail(weights + (begin + s) * kStep * columns * int64_t(sizeof(bf16)), columns,
                  begin + s < whole ? kStep : rows.d % kStep, full + s * kPanelStep);
    for (int64_t group = 0; group < rows.groups.count; ++group) {
      const int64_t count = rows.groups.rows(group);
      float* const c = rows.sums(group) + column;
      if (begin != 0)
        for (int64_t i = 0; i < count; ++i)
          __builtin_memcpy(sums + i * kPanel, c + i * rows.ldc, size_t(columns) * sizeof(float));
      const char* const panel = full;
      multiply_panels(rows, group, &panel, 1, begin, steps, sums, kPanel, configured, Ahead{});
      for (int64_t i = 0; i < count; ++i)
        __builtin_memcpy(c + i * rows.ldc, sums + i * kPanel, size_t(columns) * sizeof(float));
    }
  }
}

void multiply_run(const Rows& rows, const char* weights, int64_t n, int64_t left, int64_t column,
                  Configured& configured) {
  const int64_t most = left / kPanel * kPanel, full = n < most ? n : most;
  if (full > 0) multiply_full_panels(rows, weights, full / kPanel, column, configured);
  if (n > full)
    multiply_short_panel(rows, weights + full * rows.d * int64_t(sizeof(bf16)), n - full, column + full, configured);
}

// True if there is nothing to multiply; then C is finished.
bool trivial(const Rows& rows, int64_t m, int64_t n) {
  if (m == 0 || n == 0) return true;
  if (rows.d > 0) return false;
  for (int64_t i = 0; i < m; ++i) __builtin_memset(rows.c + i * rows.ldc, 0, size_t(n) * sizeof(float));
  return true;
}

void multiply_packed(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const Rows rows{a, RowGroups(m, kMaxRows), d, static_cast<float*>(c), ldc};
  if (trivial(rows, m, n)) return;
  Configured configured;
  const int64_t first = n < w.split ? n : w.split;
  multiply_run(rows, w.first, first, w.left, 0, configured);
  if (first < n) multiply_run(rows, w.second, n - first, w.left, first, configured);
}

// A step of a row is a row of a tile.
void pack_left(const char* const* rows, int64_t count, int64_t d, char* out) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t s = 0; s < d / kStep; ++s)
      __builtin_memcpy(out + (s * count + r) * kLine, rows[r] + s * kLine, size_t(kLine));
    if (d % kStep == 0) continue;
    char* const last = out + (d / kStep * count + r) * kLine;
    __builtin_memset(last, 0, size_t(kLine));
    __builtin_memcpy(last, rows[r] + d / kStep * kLine, size_t(d % kStep) * sizeof(bf16));
  }
}

// The order of two rows' elements in pairs, as the intrinsic that joins them takes it.
struct PairOrder {
  __m512i low, high;
  PairOrder() {
    alignas(64) int16_t order[2][kPanel];
    for (int i = 0; i < kPanel; ++i)
      order[i / 16][i % 16 * 2] = int16_t(i), order[i / 16][i % 16 * 2 + 1] = int16_t(i + 32);
    low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  }
};

// Two elements of the reduction at a time become pairs. They are in rows of memory that are far from one another, so a
// few later ones are asked for.
[[gnu::nothrow]] void pack_columns(const char* w, int64_t stride, int64_t n, int64_t d, char* out) {
  constexpr int64_t kAhead = 16;
  const PairOrder order;
  for (int64_t k = 0; k < d; k += 2) {
    const char* const even = w + k * stride;
    for (int64_t column = 0; column < n; column += kPanel) {
      const int64_t columns = n - column < kPanel ? n - column : kPanel;
      const __mmask32 mask = __mmask32((uint64_t{1} << columns) - 1);
      char* const to = out + (column * d + k * columns) * int64_t(sizeof(bf16));
      const char* const from = even + column * int64_t(sizeof(bf16));
      for (int64_t row = 0; row < 2 && k + kAhead + row < d; ++row) __builtin_prefetch(from + (kAhead + row) * stride);
      const __m512i a = _mm512_maskz_loadu_epi16(mask, from);
      if (k + 1 == d) {
        _mm512_mask_storeu_epi16(to, mask, a);
        continue;
      }
      const __m512i b = _mm512_maskz_loadu_epi16(mask, from + stride);
      const __m512i first = _mm512_permutex2var_epi16(a, order.low, b);
      const __m512i second = _mm512_permutex2var_epi16(a, order.high, b);
      if (columns == kPanel) {
        _mm512_storeu_si512(to, first);
        _mm512_storeu_si512(to + kLine, second);
        continue;
      }
      const uint32_t pairs = (uint32_t{1} << columns) - 1;
      _mm512_mask_storeu_epi32(to, __mmask16(pairs), first);
      _mm512_mask_storeu_epi32(to + kLine, __mmask16(pairs >> 16), second);
    }
  }
}

// A block of weights on its way from columns of memory to products: panels by steps.
constexpr int64_t kBlockPanels = 4;
constexpr int64_t kFewRowsSteps = 4, kManyRowsSteps = 8;
constexpr int64_t kResident = int64_t(1) << 20;  // bytes of A that the L2 cache holds beside what passes through it

int64_t column_workspace(int64_t d) {
  const int64_t block = kBlockPanels * kManyRowsSteps * kPanelStep, panel = kPanel * d * int64_t(sizeof(bf16));
  return block > panel ? block : panel;
}

// Copies `panels` panels of elements [0, d) of the reduction, `panel_bytes` apart, with zeros up to whole steps, while
// as much is asked for from `ahead` on, unless that is null.
[[gnu::nothrow]] void pack_block(const char* w, int64_t stride, int64_t panels, int64_t d, const char* ahead, char* out,
                                 int64_t panel_bytes) {
  const PairOrder order;
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t k = 0; k < steps_of(d) * kStep; k += 2)
    for (int64_t p = 0; p < panels; ++p) {
      const char* const from = w + k * stride + p * kLine;
      if (ahead) {
        __builtin_prefetch(ahead + k * stride + p * kLine, 0, 2);
        __builtin_prefetch(ahead + (k + 1) * stride + p * kLine, 0, 2);
      }
      const __m512i a = k < d ? _mm512_loadu_si512(from) : zero,
                    b = k + 1 < d ? _mm512_loadu_si512(from + stride) : zero;
      char* const to = out + p * panel_bytes + k * kLine;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(a, order.low, b));
      _mm512_store_si512(to + kLine, _mm512_permutex2var_epi16(a, order.high, b));
    }
}

// Cache lines of the block of columns that follows, so many rows of it in each step: one line in each panel.
struct ColumnsAhead {
  static constexpr int kMost = 32;
  const char* at[kMost];
  int count = 0;
  int64_t stride;

  void operator()(int64_t step) const {
    for (int i = 0; i < count; ++i) __builtin_prefetch(at[i] + step * stride, 0, 2);
  }
};

// The elements [0, d) of `panels` panels that a block will copy, asked for by `products` products of `steps` steps
// each.
struct NextBlock {
  const char* w;  // or null
  int64_t stride, panels, d, products, steps;

  // What product number `product` asks for.
  ColumnsAhead share(int64_t product) const {
    ColumnsAhead ahead;
    ahead.stride = stride;
    if (!w) return ahead;
    const int64_t rows = (d + products * steps - 1) / (products * steps);  // in each step
    for (int64_t row = product * rows * steps, i = 0; i < rows && row < d; ++i, row += steps)
      for (int64_t p = 0; p < panels && ahead.count < ColumnsAhead::kMost; ++p)
        ahead.at[ahead.count++] = w + row * stride + p * kLine;
    return ahead;
  }
};

void multiply_columns(const char* a, int64_t m, const char* w, int64_t stride, int64_t n, int64_t d, char* workspace,
                      void* c, int64_t ldc) {
  const Rows rows{a, RowGroups(m, kMaxRows), d, static_cast<float*>(c), ldc};
  if (trivial(rows, m, n)) return;
  Configured configured;
  // Few rows wait for memory, whoever asks; with many, the next block arrives during the products.
  const bool many = rows.groups.count > 2;
  const int64_t panels = n / kPanel, steps = many ? kManyRowsSteps : kFewRowsSteps, panel_bytes = steps * kPanelStep;
  const int64_t strips = (panels + kBlockPanels - 1) / kBlockPanels, blocks = (rows.steps() + steps - 1) / steps;
  const int64_t per_strip = rows.small() ? 2 : 1;
  // Where the rows of A are too many for the L2 cache, all strips take one slice of them after the other.
  const bool slices = m * rows.steps() * kLine > kResident;
  const auto block_at = [&](int64_t i) { return slices ? i / strips : i % blocks; };
  const auto panel_at = [&](int64_t i) { return (slices ? i % strips : i / blocks) * kBlockPanels; };
  const auto from = [&](int64_t i) { return w + block_at(i) * steps * kStep * stride + panel_at(i) * kLine; };
  for (int64_t i = 0; i < strips * blocks; ++i) {
    const int64_t first = panel_at(i), taken = panels - first < kBlockPanels ? panels - first : kBlockPanels;
    const int64_t begin = block_at(i) * steps, left = d - begin * kStep;
    const int64_t elements = left < steps * kStep ? left : steps * kStep, count = steps_of(elements);
    const char* const after = i + 1 < strips * blocks ? from(i + 1) : nullptr;
    pack_block(from(i), stride, taken, elements, many ? nullptr : after, workspace, panel_bytes);
    const int64_t products = (taken + per_strip - 1) / per_strip * rows.groups.count;
    const NextBlock next{many ? after : nullptr, stride, taken, elements, products, count};
    int64_t product = 0;
    for (int64_t p = 0; p < taken; p += per_strip) {
      const int together = int(taken - p < per_strip ? taken - p : per_strip);
      const char* const panel[2] = {workspace + p * panel_bytes, workspace + (p + 1) * panel_bytes};
      for (int64_t group = 0; group < rows.groups.count; ++group)
        multiply_panels(rows, group, panel, together, begin, count, rows.sums(group) + (first + p) * kPanel, ldc,
                        configured, next.share(product++));
    }
  }
  if (n % kPanel == 0) return;
  pack_columns(w + panels * kLine, stride, n % kPanel, d, workspace);
  multiply_short_panel(rows, workspace, n % kPanel, panels * kPanel, configured);
}

// ---- Plain weights ----

// Row groups whose sums wait in memory while a block of weights passes over them all.
constexpr int64_t kGroups = 8;
constexpr int kMaxTiles = 2;  // of weights in a strip: with more rows side by side, too many streams come from memory

// Consecutive rows of W in tiles.
struct Strip {
  const char* row;
  int64_t stride;
  int tiles, rows;  // of each tile; fewer than kTileRows only in a strip of one tile

  int count() const { return tiles * rows; }
};

// The sums of a row group, transposed: tiles of rows of W by one or two tiles of rows of A.
struct Transposed {
  alignas(64) float tile[4][kTileRows * kTileRows];
};

template <int NA, int NB>
void multiply_strip(const Side& left, const Side& right, const TileShape& shape, int64_t steps, bool add,
                    Transposed& sums, const Ahead& ahead, Configured& configured) {
  Sums c{{}, kTileRows * int64_t(sizeof(float))};
  for (int i = 0; i < NA * NB; ++i) c.tile[i] = sums.tile[i];
  configured.become<NA, NB>(shape);
  multiply_tiles<NA, NB>(left, right, steps, add, c, ahead);
}

// `weights` points to the strip's elements of step `begin`.
void multiply_strip(const Rows& rows, int64_t group, const Strip& strip, const char* weights, int64_t stride,
                    int64_t begin, int64_t steps, Transposed& sums, const Ahead& ahead, Configured& configured) {
  const Halves halves(rows.groups.rows(group));
  Side left{{}, {}, kLine};
  for (int i = 0; i < strip.tiles; ++i) left.tile[i] = weights + i * kTileRows * stride, left.stride[i] = stride;
  const char* const a = rows.at(group, begin);
  const Side right{
      {a, a + halves.count[0] * kLine}, {halves.count[0] * 4, halves.count[1] * 4}, rows.groups.rows(group) * kLine};
  const TileShape shape{{strip.rows, strip.rows}, {halves.count[0], halves.count[1]}};
  const auto run = [&](auto na, auto nb) {
    multiply_strip<na.value, nb.value>(left, right, shape, steps, begin != 0, sums, ahead, configured);
  };
  if (halves.tiles() == 2)
    strip.tiles == 2 ? run(Index<2>{}, Index<2>{}) : run(Index<1>{}, Index<2>{});
  else
    strip.tiles == 2 ? run(Index<2>{}, Index<1>{}) : run(Index<1>{}, Index<1>{});
}

// Writes a group's sums to columns `column` of C on.
void store_transposed(const Rows& rows, int64_t group, const Strip& strip, const Transposed& sums, int64_t column) {
  const Halves halves(rows.groups.rows(group));
  for (int i = 0; i < strip.tiles; ++i)
    for (int j = 0; j < halves.tiles(); ++j) {
      VF v[kTileRows];
      for (int r = 0; r < kTileRows; ++r) v[r] = load<VF>(sums.tile[i * halves.tiles() + j] + r * kTileRows);
      transpose(v);
      float* const c = rows.sums(group) + j * halves.count[0] * rows.ldc + column + i * kTileRows;
      for (int r = 0; r < halves.count[j]; ++r) store_n(c + r * rows.ldc, v[r], strip.rows);
    }
}

// Multiplies a strip into columns `column` of C on, while `next` rows from `next_row` on are asked for.
void multiply_strip(const Rows& rows, const Strip& strip, const char* next_row, int next, int64_t column,
                    Configured& configured) {
  const int64_t whole = rows.d / kStep;
  alignas(64) char tail[kMaxTiles * kTileRows * kLine];
  if (rows.d % kStep != 0)
    for (int r = 0; r < strip.count(); ++r) {
      __builtin_memset(tail + r * kLine, 0, size_t(kLine));
      __builtin_memcpy(tail + r * kLine, strip.row + r * strip.stride + whole * kLine,
                       size_t(rows.d % kStep) * sizeof(bf16));
    }
  Transposed sums[kGroups];
  for (int64_t from = 0; from < rows.groups.count; from += kGroups) {
    const int64_t to = from + kGroups < rows.groups.count ? from + kGroups : rows.groups.count;
    const int64_t block = to - from > 1 ? kBlockSteps : rows.steps();
    for (int64_t begin = 0; begin < whole; begin += block) {
      const int64_t steps = begin + block < whole ? block : whole - begin;
      for (int64_t group = from; group < to; ++group) {
        Ahead ahead;
        if (from == 0)
          for (int64_t r = group * next / to; r < (group + 1) * next / to; ++r)
            ahead.at[ahead.count++] = next_row + r * strip.stride + begin * kLine;
        multiply_strip(rows, group, strip, strip.row + begin * kLine, strip.stride, begin, steps, sums[group - from],
                       ahead, configured);
      }
    }
    for (int64_t group = from; group < to; ++group) {
      if (rows.d % kStep != 0)
        multiply_strip(rows, group, strip, tail, kLine, whole, 1, sums[group - from], {}, configured);
      store_transposed(rows, group, strip, sums[group - from], column);
    }
  }
}

// Rows [0, n) of a run of W; `after`: the row that will be read next, or null.
void multiply_rows(const Rows& rows, const char* w, int64_t stride, int64_t n, int64_t column, const char* after,
                   Configured& configured) {
  const auto strip_at = [&](int64_t row) {
    const int64_t tiles = (n - row) / kTileRows;
    if (tiles == 0) return Strip{w + row * stride, stride, 1, int(n - row)};
    return Strip{w + row * stride, stride, int(tiles < kMaxTiles ? tiles : kMaxTiles), kTileRows};
  };
  for (int64_t row = 0; row < n;) {
    const Strip strip = strip_at(row);
    const int64_t next = row + strip.count();
    if (next < n)
      multiply_strip(rows, strip, w + next * stride, strip_at(next).count(), column + row, configured);
    else
      multiply_strip(rows, strip, after, after ? strip.count() : 0, column + row, configured);
    row = next;
  }
}

void multiply_plain(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const Rows rows{a, RowGroups(m, kMaxRows), d, static_cast<float*>(c), ldc};
  if (trivial(rows, m, n)) return;
  Configured configured;
  const int64_t first = n < w.split ? n : w.split;
  multiply_rows(rows, w.first, w.stride, first, 0, first < n ? w.second : w.next, configured);
  if (first < n) multiply_rows(rows, w.second, w.stride, n - first, first, w.next, configured);
}

// A row of a tile has the same pair of every row of A.
void pack_right(const char* const* rows, int64_t count, int64_t d, char* out) {
  const Halves halves{int(count)};
  for (int64_t s = 0; s < steps_of(d); ++s)
    for (int half = 0, first = 0; half < halves.tiles(); first += halves.count[half++]) {
      const int64_t left = d - s * kStep;
      VF v[kTileRows];
      for (int r = 0; r < kTileRows; ++r) {
        alignas(64) char line[kLine] = {};
        if (r < halves.count[half])
          __builtin_memcpy(line, rows[first + r] + s * kLine, size_t(left < kStep ? left : kStep) * sizeof(bf16));
        v[r] = load<VF>(reinterpret_cast<const float*>(line));
      }
      transpose(v);
      float* const tile = reinterpret_cast<float*>(out + (s * count + first) * kLine);
      for (int pair = 0; pair < kTileRows; ++pair)
        store_n(tile + pair * halves.count[half], v[pair], halves.count[half]);
    }
}

}  // namespace

const GemmKernel plain_bf16 = {kStep, sizeof(bf16), kMaxRows, 1, pack_right, multiply_plain, nullptr};
const GemmKernel packed_bf16 = {kStep,           sizeof(bf16), kMaxRows,     int(kPanel),      pack_left,
                                multiply_packed, nullptr,      pack_columns, multiply_columns, column_workspace};

}  // namespace polymoe::POLYMOE_LEVEL
#endif
