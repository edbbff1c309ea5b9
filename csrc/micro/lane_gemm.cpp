// The matmul microkernel for quantised weights and bf16 with columns as lanes. Codes are multiplied exactly; what a
// block of them sums to is then multiplied by its scale and added to the total, which is one fused multiply-add:
//
//   total += scale[block] * sum over the block of x * code
//
// For a row group of A codes are decoded in registers where they are used. For more they are decoded into a panel
// first, once for all rows. Both add the same numbers in the same order.
#include "lane_gemm.h"

#if defined(POLYMOE_LEVEL_AVX512_BF16) && !defined(POLYMOE_LEVEL_AMX)

#include "../formats/packed.h"
#include "lane_strip.h"
#include "quantized_ahead.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kMaxRows = 14;
constexpr int kFewRows = 8;   // decode in registers: beside the sums of more a line of codes has no room there
constexpr int kTileRows = 7;  // of a panel's tile, whose totals lie in registers beside the sums of blocks
constexpr int kVectors = 2, kColumns = kVectors * kLanes;  // of a panel

[[gnu::always_inline]] inline VF add_pairs(VF acc, const char* x, Bytes w) {
  int pair;
  __builtin_memcpy(&pair, x, sizeof pair);
  return {_mm512_dpbf16_ps(acc.v, __m512bh(w), __m512bh(_mm512_set1_epi32(pair)))};
}

// --- codes decoded where they are used -------------------------------------------------------------------------------

// The products of a row group of A with a strip, line by line.
template <class C, int ROWS>
struct Group {
  static constexpr int pairs = Strip<C>::part_pairs;

  const char* a;
  const Strip<C>& strip;
  Scales scales;
  VF total[ROWS];

  // Adds CHAINS parts of a line, from part `first` of the row on, to a sum each.
  template <int CHAINS>
  [[gnu::always_inline]] void add(const Bytes* line, int64_t first, const Bytes (&adjust)[CHAINS],
                                  VF (&acc)[CHAINS][ROWS]) const {
    Bytes v[CHAINS][4];
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) v[c][i] = line[4 * c + i];
    const char* const x = a + first * (pairs * ROWS * 4);
    each_pair<C, CHAINS>(
        v, adjust, [&](int c, int p, Bytes w) __attribute__((always_inline)) {
#pragma GCC unroll 16
          for (int i = 0; i < ROWS; ++i) acc[c][i] = add_pairs(acc[c][i], x + ((c * pairs + p) * ROWS + i) * 4, w);
        });
  }
  [[gnu::always_inline]] void add_block(const VF (&acc)[ROWS], int64_t block) {
    const VF factor = load<VF>(scales.factor[block]);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) total[i] = fma(acc[i], factor, total[i]);
  }
  template <int CHAINS>
  static void clear(VF (&acc)[CHAINS][ROWS]) {
#pragma GCC unroll 4
    for (auto& of_chain : acc)
#pragma GCC unroll 16
      for (VF& v : of_chain) v = set<VF>(0);
  }

  // CHAINS blocks of one part each.
  template <int CHAINS>
  [[gnu::always_inline]] void add_parts(const Bytes* line, int64_t part) {
    const int64_t block = part % kPanelParts<C>;
    VF acc[CHAINS][ROWS];
    Bytes adjust[CHAINS];
    clear(acc);
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) adjust[c] = adjust_of<C>(scales, block + c);
    add<CHAINS>(line, part, adjust, acc);
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) add_block(acc[c], block + c);
  }

  void multiply_short_blocks(Streams& ahead) {
    constexpr int kChains = ROWS == 1 ? 4 : ROWS <= 5 ? 2 : 1;
    const int64_t parts = strip.all_parts();
    for (int64_t part = 0; part < parts; part += kLineParts) {
      if (part % kPanelParts<C> == 0) strip.prepare(part / Strip<C>::parts, scales);
      Bytes line[kLanes];
      strip.load_line(part * kPart, line);
      const int64_t count = parts - part < kLineParts ? parts - part : kLineParts;
      if (__builtin_expect(count == kLineParts, 1)) {
#pragma GCC unroll 4
        for (int i = 0; i < kLineParts; i += kChains) {
          ahead.ask<kChains>();
          add_parts<kChains>(line + 4 * i, part + i);
        }
      } else {
        for (int64_t i = 0; i < count; ++i) add_parts<1>(line + 4 * i, part + i);
      }
    }
  }

  void multiply_long_blocks(Streams& ahead) {
    const int64_t parts = strip.all_parts(), of_block = strip.block() * Strip<C>::parts;
    VF acc[2][ROWS];
    clear(acc);
    for (int64_t part = 0; part < parts; part += kLineParts) {
      if (part % kPanelParts<C> == 0) strip.prepare(part / Strip<C>::parts, scales);
      Bytes line[kLanes];
      strip.load_line(part * kPart, line);
      ahead.ask<kLineParts>();  // as many lines as are read
#pragma GCC unroll 2
      for (int i = 0; i < kLineParts; i += 2) {
        const int64_t at = part + i, block = at % kPanelParts<C> / of_block;
        if (at >= parts) break;
        const Bytes adjust = adjust_of<C>(scales, block);
        if (__builtin_expect(at + 1 < parts, 1))
          add<2>(line + 4 * i, at, {adjust, adjust}, acc);
        else
          add<1>(line + 4 * i, at, {adjust}, reinterpret_cast<VF(&)[1][ROWS]>(acc));
        if ((at + 2) % of_block != 0 && at + 2 < parts) continue;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) acc[0][r] = acc[0][r] + acc[1][r];
        add_block(acc[0], block);
        clear(acc);
      }
    }
  }
};

template <class C, int ROWS>
void multiply_group(const Strip<C>& strip, const char* a, Streams ahead, float* c, int64_t ldc, int64_t columns) {
  Group<C, ROWS> group{a, strip, {}, {}};
  if (in_chains(strip))
    group.multiply_long_blocks(ahead);
  else
    group.multiply_short_blocks(ahead);
  for (int i = 0; i < ROWS; ++i)
    if (columns == kLanes)
      store(c + i * ldc, group.total[i]);
    else
      store_n(c + i * ldc, group.total[i], int(columns));
}

// --- codes decoded into a panel --------------------------------------------------------------------------------------

// Columns of a panel, a part of the reduction at a time: what they are multiplied by, and where the sums go.
struct Task {
  const char* panel;
  const Scales* scales;  // by vector
  int64_t parts, block;  // parts of a step, of the panel and of a block
  bool add;
  Streams* ahead;
  int asks;  // for what is needed next, in a block
  float* c;
  int64_t ldc;
  __mmask16 columns[kVectors];
};

// A part has PAIRS pairs; `stride`: rows of the group.
template <int ROWS, int PAIRS, int CHAINS>
void tile(const char* a, int64_t stride, const Task& task) {
  constexpr int64_t w_bytes = kVectors * kLine;
  const int64_t a_bytes = stride * 4;
  VF total[ROWS][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      total[i][v] = {task.add ? _mm512_maskz_loadu_ps(task.columns[v], task.c + i * task.ldc + v * kLanes)
                              : _mm512_setzero_ps()};
  const char* w = task.panel;
  for (int64_t first = 0, b = 0; first < task.parts; first += task.block, ++b) {
    const int64_t parts = task.parts - first < task.block ? task.parts - first : task.block;
    for (int i = 0; i < task.asks; ++i) task.ahead->ask();
    VF acc[CHAINS][ROWS][kVectors];
#pragma GCC unroll 2
    for (int c = 0; c < CHAINS; ++c)
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[c][i][v] = set<VF>(0);
    const auto add = [&](int c) __attribute__((always_inline)) {
      const char* const pairs = w + c * (PAIRS * w_bytes);
      const char* const x = a + c * (PAIRS * a_bytes);
      const Bytes w0 = load_bytes(pairs), w1 = load_bytes(pairs + kLine);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        acc[c][i][0] = add_pairs(acc[c][i][0], x + i * 4, w0);
        acc[c][i][1] = add_pairs(acc[c][i][1], x + i * 4, w1);
      }
    };
    int64_t part = 0;
    for (; part + CHAINS <= parts; part += CHAINS) {
#pragma GCC unroll 2
      for (int p = 0; p < PAIRS; ++p, a += a_bytes, w += w_bytes)
#pragma GCC unroll 2
        for (int c = 0; c < CHAINS; ++c) add(c);
      a += (CHAINS - 1) * PAIRS * a_bytes, w += (CHAINS - 1) * PAIRS * w_bytes;
    }
    if (CHAINS > 1 && part < parts)
      for (int p = 0; p < PAIRS; ++p, a += a_bytes, w += w_bytes) add(0);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const VF factor = load<VF>(task.scales[v].factor[b]);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const VF sum = CHAINS == 2 ? acc[0][i][v] + acc[CHAINS - 1][i][v] : acc[0][i][v];
        total[i][v] = fma(sum, factor, total[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      _mm512_mask_storeu_ps(task.c + i * task.ldc + v * kLanes, task.columns[v], total[i][v].v);
}

// Parts [first, first + parts) of a strip.
template <class C>
void decode_panel(const Strip<C>& strip, int64_t first, int64_t parts, const Scales& scales, char* out) {
  const int64_t of_block = strip.block() * Strip<C>::parts;
  for (int64_t part = 0; part < parts; part += kLineParts) {
    Bytes line[kLanes];
    strip.load_line((first + part) * kPart, line);
    for (int64_t i = 0; i < kLineParts && part + i < parts; ++i) {
      const Bytes adjust[1] = {adjust_of<C>(scales, (part + i) / of_block)};
      Bytes v[1][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) v[0][j] = line[4 * i + j];
      each_pair<C, 1>(
          v, adjust, [&](int, int p, Bytes w) __attribute__((always_inline)) {
            store_bytes(out + p * kVectors * kLine, w);
          });
      out += Strip<C>::part_pairs * kVectors * kLine;
    }
  }
}

// --- rows of A -------------------------------------------------------------------------------------------------------

template <int MOST, int ROWS = 1, class F>
auto by_rows(int rows, const F& f) {
  if constexpr (ROWS < MOST)
    if (rows > ROWS) return by_rows<MOST, ROWS + 1>(rows, f);
  return f(std::integral_constant<int, ROWS>());
}

template <class C>
void multiply_in_registers(const char* a, int rows, const Weights& w, int64_t n, int64_t d, float* c, int64_t ldc) {
  const auto product = by_rows<kFewRows>(rows, [](auto count) { return &multiply_group<C, count.value>; });
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t columns = n - j < kLanes ? n - j : kLanes;
    Strip<C> strip(w, j, columns, d);
    if (j + kLanes < n) strip.look_ahead(kLanes * w.row_step);
    product(strip, a, streams_ahead(w, j + kLanes, n, kLanes, d, C::bits), c + j, ldc, columns);
  }
}

template <class C>
void multiply_panels(const char* a, const RowGroups& groups, const Weights& w, int64_t n, int64_t d, float* c,
                     int64_t ldc) {
  const int64_t all = steps_of(d);
  for (int64_t j = 0; j < n; j += kColumns) {
    const int64_t columns = n - j < kColumns ? n - j : kColumns, second = columns > kLanes ? columns - kLanes : 0;
    const Strip<C> strip[kVectors] = {{w, j, columns - second, d},
                                      {w, j + (second ? kLanes : 0), second ? second : columns, d}};
    Streams ahead = streams_ahead(w, j + kColumns, n, kColumns, d, C::bits);
    const int64_t block = strip[0].block() * Strip<C>::parts;
    Scales scales[kVectors];
    for (int64_t first = 0; first < all; first += kPanelSteps) {
      const int64_t parts = (all - first < kPanelSteps ? all - first : kPanelSteps) * Strip<C>::parts;
      for (int v = 0; v < kVectors; ++v) {
        strip[v].prepare(first, scales[v]);
        decode_panel(strip[v], first * Strip<C>::parts, parts, scales[v], w.workspace + v * kLine);
      }
      // A strip asks for as much as it takes.
      const int64_t asks = kVectors * parts, tiles = 2 * groups.count * ((parts + block - 1) / block);
      Task task{w.workspace, scales, parts, block, first > 0, &ahead, int((asks + tiles - 1) / tiles),
                nullptr,     ldc,    {}};
      task.columns[0] = lanes_below(int(columns - second)), task.columns[1] = lanes_below(int(second));
      for (int64_t group = 0; group < groups.count; ++group) {
        const int rows = groups.rows(group);
        const char* const x = a + (groups.first_row(group) * all + first * rows) * (kPairs * 4);
        const RowGroups tiles(rows, kTileRows);
        for (int64_t i = 0; i < tiles.count; ++i) {
          task.c = c + (groups.first_row(group) + tiles.first_row(i)) * ldc + j;
          const auto product = by_rows<kTileRows>(tiles.rows(i), [&](auto count) {
            constexpr int pairs = Strip<C>::part_pairs;
            return in_chains(strip[0]) ? &tile<count.value, pairs, 2> : &tile<count.value, pairs, 1>;
          });
          product(x + tiles.first_row(i) * 4, rows, task);
        }
      }
    }
  }
}

template <class C>
void multiply(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const RowGroups groups(m, kMaxRows);
  if (groups.count == 0 || n == 0) return;
  float* const sums = static_cast<float*>(c);
  if (decodes_once(m, kFewRows))
    multiply_panels<C>(a, groups, w, n, d, sums, ldc);
  else
    multiply_in_registers<C>(a, int(m), w, n, d, sums, ldc);
}

// int4 with zero points or without.
void multiply_int4(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  return (w.matrix->zero ? multiply<Int4ZeroLanes> : multiply<Int4Lanes>)(a, m, w, n, d, c, ldc);
}

template <class Order>
void pack_rows(const char* const* rows, int64_t count, int64_t d, char* out) {
  const int64_t steps = steps_of(d);
  for (int64_t s = 0; s < steps; ++s, out += count * (kPairs * 4)) {
    const int64_t left = d - s * kStep;
    const __mmask32 mask = left < kStep ? (1u << left) - 1 : ~0u;
    const auto load_step = [&](int64_t r) {
      return in_order<Order>(_mm512_maskz_loadu_epi16(mask, rows[r] + s * (kStep * 2)));
    };
    if (count == 1) {
      _mm512_storeu_si512(out, load_step(0));
      continue;
    }
    VF v[kPairs];
    for (int64_t r = 0; r < kPairs; ++r) v[r] = r < count ? VF{_mm512_castsi512_ps(load_step(r))} : set<VF>(0);
    transpose(v);
    // Full vectors in ascending order: what one writes past its rows the next one overwrites.
    alignas(64) float pairs[(kPairs + 1) * kPairs];
    float* const to = s + 1 < steps ? reinterpret_cast<float*>(out) : pairs;
    for (int64_t p = 0; p < kPairs; ++p) store(to + p * count, v[p]);
    if (to == pairs) __builtin_memcpy(out, pairs, size_t(count) * (kPairs * 4));
  }
}

int64_t workspace(int64_t) { return kPanelSteps * kPairs * kVectors * kLine; }

template <class C>
constexpr GemmKernel kernel = {kStep, sizeof(bf16), kMaxRows, 1, pack_rows<typename C::Order>, multiply<C>, workspace};
template <>
constexpr GemmKernel kernel<Int4Lanes> = {kStep,         sizeof(bf16), kMaxRows, 1, pack_rows<Int4Lanes::Order>,
                                          multiply_int4, workspace};

}  // namespace

const GemmKernel fp8_lanes = kernel<Fp8Lanes>;
const GemmKernel mxfp8_lanes = kernel<Mxfp8Lanes>;
const GemmKernel mxfp4_lanes = kernel<Mxfp4Lanes>;
const GemmKernel int4_lanes = kernel<Int4Lanes>;

}  // namespace polymoe::POLYMOE_LEVEL
#endif
