// The matmul microkernel for quantised weights and bf16 with columns as lanes. Codes are multiplied exactly; what a
// step of 32 of them sums to, or four steps that share a scale, is then multiplied by it and added to the total, which
// is one fused multiply-add:
//
//   total += scale[block] * sum over the steps of the block of (sum over the step of x * code)
//
// So steps do not wait for each other. For a row group of A codes are decoded in registers where they are used. For
// more they are decoded into a panel first, once for all rows. Both add the same numbers in the same order.
#include "lane_gemm.h"

#if defined(POLYMOE_LEVEL_AVX512_BF16) && !defined(POLYMOE_LEVEL_AMX)

#include <algorithm>

#include "lane_few_rows.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kMaxRows = 14;
// From the strip that is multiplied in registers to the one whose lines are asked for meanwhile. That is in order, but
// a strip needs lines of all its rows at once: those of the last rows would come too late from one strip to the next.
constexpr int kStripsAhead = 2;
constexpr int kFewRows = 8;   // decode in registers: beside the sums of more a line of codes has no room there
constexpr int kTileRows = 7;  // of a panel's tile, whose totals lie in registers beside the sums of a step
constexpr int kVectors = 2, kColumns = kVectors * kLanes;  // of a panel

[[gnu::always_inline]] inline VF add_pairs(VF acc, const char* x, Bytes w) {
  int pair;
  __builtin_memcpy(&pair, x, sizeof pair);
  return {_mm512_dpbf16_ps(acc.v, __m512bh(w), __m512bh(_mm512_set1_epi32(pair)))};
}

// The same for a pair that is used once, an operand in memory, which GCC 12 has no pattern for: half of the
// instructions.
[[gnu::always_inline]] inline VF add_pairs_once(VF acc, const char* x, Bytes w) {
  asm("vdpbf16ps %1%{1to16%}, %2, %0" : "+v"(acc.v) : "m"(*reinterpret_cast<const char(*)[4]>(x)), "v"(w));
  return acc;
}

// --- codes decoded where they are used -------------------------------------------------------------------------------

// What is asked for while a few steps are multiplied, a line of each at a time.
struct Asks {
  const char* strip;  // lines of one to come
  int row;            // rows of this one from here on
  int64_t at;         // Strip::past_end_in_next
};

// The products of a row group of A with a strip, line by line. ROWS <= kFewRows.
template <class C, int ROWS>
class Group {
 public:
  Group(const char* a, const Strip<C>& strip) : a_(a), strip_(strip) {}
  Group(const Group&) = delete;

  void multiply(Streams& ahead, VF (&total)[ROWS]) {
    Sums sums;  // in registers, where `total` has to be memory
#pragma GCC unroll 16
    for (VF& v : sums.total) v = set<VF>(0);
    constexpr int kRun = C::scaled_steps > kLineSteps ? C::scaled_steps : kLineSteps;
    const int64_t steps = strip_.steps(), whole = steps / kRun * kRun;
    for (int64_t first = 0; first < whole; first += kRun) {
      if (first % kPanelSteps == 0) strip_.prepare(first, scales_);
#pragma GCC unroll 2
      for (int step = 0; step < kRun; step += kLineSteps) add_line(Run{first, kRun}, step, ahead, sums);
    }
    if (whole < steps) {
      if (whole % kPanelSteps == 0) strip_.prepare(whole, scales_);
      const Run run{whole, int(steps - whole)};
      const Asks nothing{a_, 0, 0};  // that the caches do not hold
      Bytes line[kLanes];
      for (int step = 0; step < run.count; ++step) {
        const int of_line = step % kLineSteps;
        if (of_line == 0) strip_.load_line((whole + step) * Strip<C>::step_bytes, line);
        add<1>(line + of_line * kParts * 4, run, step, nothing, sums);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) total[i] = sums.total[i];
  }

 private:
  static constexpr int kParts = Strip<C>::parts, kPartPairs = Strip<C>::part_pairs, kLineSteps = kLineParts / kParts;

  struct Sums {
    VF block[ROWS];  // of its steps so far
    VF total[ROWS];
  };
  // Whole blocks, but for the end of the reduction.
  struct Run {
    int64_t first;
    int count;  // of steps
  };

  [[gnu::always_inline]] void add_line(const Run& run, int step, Streams& ahead, Sums& sums) const {
    // Steps at a time: an addition to a sum waits six cycles for the one before.
    constexpr int kChains = ROWS == 1 ? kLineSteps : ROWS <= 5 ? 2 : 1;
    const int64_t at = (run.first + step) * Strip<C>::step_bytes;
    Bytes line[kLanes];
    strip_.load_line(at, line);
    const int64_t near = strip_.past_end_in_next(at + 2 * kLine);
#pragma GCC unroll 4
    for (int i = 0; i < kLineSteps; i += kChains) {
      const Asks asks{ahead.take<kChains * kParts>(), i * kParts * 4, near};
      add<kChains>(line + i * kParts * 4, run, step + i, asks, sums);
    }
  }

  // Steps [step, step + CHAINS) of a run, each a sum of its own.
  template <int CHAINS>
  [[gnu::always_inline]] void add(const Bytes* line, const Run& run, int step, const Asks& asks, Sums& sums) const {
    const int64_t first = run.first + step;
    VF acc[CHAINS][ROWS];
    Bytes adjust[CHAINS];
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      adjust[c] = adjust_of<C>(scales_, strip_.block(first + c));
#pragma GCC unroll 16
      for (VF& v : acc[c]) v = set<VF>(0);
    }
    const char* const x = a_ + first * (kPairs * ROWS * 4);
    const auto ask = [&](int i) __attribute__((always_inline)) {
      __builtin_prefetch(asks.strip + i * kLine, 0, 2);
      strip_.ask_row(asks.row + i, asks.at);
    };
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      Bytes v[CHAINS][4];
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) v[c][i] = line[(c * kParts + part) * 4 + i];
      each_pair<C, CHAINS>(
          v, adjust, [&](int c, int p, Bytes w) __attribute__((always_inline)) {
            if (p % C::pairs == 0) ask((part * 4 + p / C::pairs) * CHAINS + c);
            const char* const pair = x + (c * kPairs + part * kPartPairs + p) * (ROWS * 4);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; ++i) acc[c][i] = add_pairs_once(acc[c][i], pair + i * 4, w);
          });
    }
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      const bool begins = (step + c) % C::scaled_steps == 0;
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) sums.block[i] = begins ? acc[c][i] : sums.block[i] + acc[c][i];
      const int next = step + c + 1;
      if (next % C::scaled_steps != 0 && next != run.count) continue;
      const VF factor = load<VF>(scales_.factor[strip_.block(first + c)]);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) sums.total[i] = fma(sums.block[i], factor, sums.total[i]);
    }
  }

  const char* a_;
  const Strip<C>& strip_;
  Scales scales_;
};

// `a`: the rows packed, or spread, see spreads.
template <class C, int ROWS>
void multiply_group(const Strip<C>& strip, const char* a, Streams ahead, float* c, int64_t ldc, int64_t columns) {
  using Product = std::conditional_t<spreads<C>(ROWS), FewRows<C, ROWS>, Group<C, ROWS>>;
  VF total[ROWS];
  Product(a, strip).multiply(ahead, total);
  for (int i = 0; i < ROWS; ++i)
    if (columns == kLanes)
      store(c + i * ldc, total[i]);
    else
      store_n(c + i * ldc, total[i], int(columns));
}

// --- codes decoded into a panel --------------------------------------------------------------------------------------

// Where factors are powers of two, `vscalefps` and an addition do what a multiply-add does, off the ports of the dot
// products, and with the same bits if products are exact: if no bit of a sum by its factor is less than 2^-149, and
// none is infinite. So both are bounded, by the exponents of A, biased, and those of the factors.
struct Exponents {
  int least, most;  // of A's numbers but zeros

  // Of `bytes` of A, whole lines.
  static Exponents of(const char* a, int64_t bytes) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1);
    __m512i low = _mm512_set1_epi16(-1), high = _mm512_setzero_si512();
    for (int64_t i = 0; i < bytes; i += kLine) {
      const __m512i x = _mm512_and_si512(load_bytes(a + i), magnitude);
      low = _mm512_min_epu16(low, _mm512_sub_epi16(x, one));  // where zero is the largest
      high = _mm512_max_epu16(high, x);
    }
    alignas(64) uint16_t lows[32], highs[32];
    _mm512_store_si512(lows, low), _mm512_store_si512(highs, high);
    return {*std::min_element(lows, lows + 32) >> 7, *std::max_element(highs, highs + 32) >> 7};
  }

  // The factors of a panel's steps become logarithms, if products by them are exact; returns whether they did. `power`:
  // that of the codes.
  bool take_logarithms(int power, Scales (&scales)[kVectors], int64_t steps) const {
    const int code_bits = 9, sum_bits = 9 + 6 + power;  // of a fraction, and of the largest, times 32
    VF log[kVectors][kPanelSteps];
    __m512 low = _mm512_set1_ps(128), high = _mm512_set1_ps(-128);
    for (int v = 0; v < kVectors; ++v)
      for (int64_t step = 0; step < steps; ++step) {
        const __m512 x = _mm512_getexp_ps(_mm512_load_ps(scales[v].factor[step]));
        low = _mm512_min_ps(x, low), high = _mm512_max_ps(x, high);  // NaN counts as nothing
        log[v][step] = {x};
      }
    if (least - 127 - 7 - code_bits + _mm512_reduce_min_ps(low) < -149) return false;
    if (most - 126 + sum_bits + _mm512_reduce_max_ps(high) > 127) return false;
    for (int v = 0; v < kVectors; ++v)
      for (int64_t step = 0; step < steps; ++step) store(scales[v].factor[step], log[v][step]);
    return true;
  }
};

// Columns of a panel, a part of the reduction at a time: what they are multiplied by, and where the sums go.
struct Task {
  const char* panel;
  const Scales* scales;  // by vector
  int64_t steps;
  int shift;  // block_shift
  bool add;
  Streams* ahead;
  int asks;  // for what is needed next, in a step
  float* c;
  int64_t ldc;
  __mmask16 columns[kVectors];
};

// `stride`: rows of the group. POWERS: factors are logarithms, see Exponents. SCALED: see Scaled.
template <int ROWS, bool POWERS, int SCALED>
void tile(const char* a, int64_t stride, const Task& task) {
  VF total[ROWS][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      total[i][v] = {task.add ? _mm512_maskz_loadu_ps(task.columns[v], task.c + i * task.ldc + v * kLanes)
                              : _mm512_setzero_ps()};
  const char* w = task.panel;
  for (int64_t step = 0; step < task.steps;) {
    VF block[ROWS][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) block[i][v] = set<VF>(0);
    const int64_t first = step, end = SCALED == 1 ? step + 1 : std::min(step + SCALED, task.steps);
    do {
      for (int i = 0; i < task.asks; ++i) task.ahead->ask();
      VF acc[ROWS][kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[i][v] = set<VF>(0);
#pragma GCC unroll 2
      for (int p = 0; p < kPairs; ++p, a += stride * 4, w += kVectors * kLine) {
        const Bytes w0 = load_bytes(w), w1 = load_bytes(w + kLine);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
          acc[i][0] = add_pairs(acc[i][0], a + i * 4, w0);
          acc[i][1] = add_pairs(acc[i][1], a + i * 4, w1);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) block[i][v] = SCALED == 1 ? acc[i][v] : block[i][v] + acc[i][v];
      ++step;
    } while (step < end);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const VF factor = load<VF>(task.scales[v].factor[SCALED > 1 ? first / SCALED : first >> task.shift]);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i)
        total[i][v] = POWERS ? total[i][v] + VF{_mm512_scalef_ps(block[i][v].v, factor.v)}
                             : fma(block[i][v], factor, total[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      _mm512_mask_storeu_ps(task.c + i * task.ldc + v * kLanes, task.columns[v], total[i][v].v);
}

// Steps [first, first + steps) of a strip, of a panel whose scales are prepared.
template <class C>
void decode_panel(const Strip<C>& strip, int64_t first, int64_t steps, const Scales& scales, char* out) {
  const int64_t parts = steps * Strip<C>::parts;
  for (int64_t part = 0; part < parts; part += kLineParts) {
    Bytes line[kLanes];
    strip.load_line(first * Strip<C>::step_bytes + part * kPart, line);
    for (int64_t i = 0; i < kLineParts && part + i < parts; ++i) {
      const Bytes adjust[1] = {adjust_of<C>(scales, strip.block((part + i) / Strip<C>::parts))};
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

constexpr int64_t kPanelBytes = kPanelSteps * kPairs * kVectors * kLine;

// Of the workspace: room for a panel or for rows of A that are spread, and after it for the copy of strip `i`.
inline int64_t first_bytes(int64_t d) { return std::max(kPanelBytes, spread_bytes(kSpreadRows, d)); }
template <class C>
char* copy_of(const Weights& w, int64_t d, int i) {
  return w.workspace + first_bytes(d) + i * Strip<C>::copy_bytes(d);
}

template <class C>
void multiply_in_registers(const char* a, int rows, const Weights& w, int64_t n, int64_t d, float* c, int64_t ldc) {
  const auto product = by_rows<kFewRows>(rows, [](auto count) { return &multiply_group<C, count.value>; });
  if (spreads<C>(rows)) {
    spread(a, rows, d, w.workspace);
    a = w.workspace;
  }
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t columns = n - j < kLanes ? n - j : kLanes;
    Strip<C> strip(w, j, columns, d, copy_of<C>(w, d, 0));
    strip.look_ahead(w, j + kLanes, n);
    const Streams ahead = streams_ahead(w, j + kStripsAhead * kLanes, n, kLanes, d, C::bits);
    product(strip, a, ahead, c + j, ldc, columns);
  }
}

template <class C>
void multiply_panels(const char* a, const RowGroups& groups, const Weights& w, int64_t n, int64_t d, float* c,
                     int64_t ldc) {
  constexpr bool kPowers = C::adjust == Adjust::groups;
  const int64_t all = steps_of(d);
  const bool repays = kPowers && groups.count > 2;  // reading A for it
  const Exponents exponents = repays ? Exponents::of(a, groups.first_row(groups.count) * all * kLine) : Exponents{};
  for (int64_t j = 0; j < n; j += kColumns) {
    const int64_t columns = n - j < kColumns ? n - j : kColumns, second = columns > kLanes ? columns - kLanes : 0;
    const Strip<C> strip[kVectors] = {
        {w, j, columns - second, d, copy_of<C>(w, d, 0)},
        {w, j + (second ? kLanes : 0), second ? second : columns, d, copy_of<C>(w, d, 1)}};
    Streams ahead = streams_ahead(w, j + kColumns, n, kColumns, d, C::bits);
    // Two strips ask for as much as they take, which is twice Strip<C>::parts in a step, in two tiles of each row
    // group.
    const int asks = int((Strip<C>::parts + groups.count - 1) / groups.count);
    Scales scales[kVectors];
    for (int64_t first = 0; first < all; first += kPanelSteps) {
      const int64_t steps = all - first < kPanelSteps ? all - first : kPanelSteps;
      for (int v = 0; v < kVectors; ++v) {
        strip[v].prepare(first, scales[v]);
        decode_panel(strip[v], first, steps, scales[v], w.workspace + v * kLine);
      }
      const bool logarithms = repays && exponents.take_logarithms(C::power, scales, steps);
      Task task{w.workspace, scales, steps, block_shift(*w.matrix), first > 0, &ahead, asks, nullptr, ldc, {}};
      task.columns[0] = lanes_below(int(columns - second)), task.columns[1] = lanes_below(int(second));
      for (int64_t group = 0; group < groups.count; ++group) {
        const int rows = groups.rows(group);
        const char* const x = a + (groups.first_row(group) * all + first * rows) * (kPairs * 4);
        const RowGroups tiles(rows, kTileRows);
        for (int64_t i = 0; i < tiles.count; ++i) {
          task.c = c + (groups.first_row(group) + tiles.first_row(i)) * ldc + j;
          const auto product = by_rows<kTileRows>(tiles.rows(i), [&](auto count) {
            return logarithms ? &tile<count.value, kPowers, C::scaled_steps>
                              : &tile<count.value, false, C::scaled_steps>;
          });
          product(x + tiles.first_row(i) * 4, rows, task);
        }
      }
    }
  }
}

template <class C>
void multiply_scaled(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const RowGroups groups(m, kMaxRows);
  if (groups.count == 0 || n == 0) return;
  float* const sums = static_cast<float*>(c);
  if (decodes_once(m, kFewRows))
    multiply_panels<C>(a, groups, w, n, d, sums, ldc);
  else
    multiply_in_registers<C>(a, int(m), w, n, d, sums, ldc);
}

template <class C>
void multiply(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  if constexpr (C::adjust != Adjust::groups)
    if (w.matrix->scale_columns == kSpan * kStep) return multiply_scaled<Scaled<C, kSpan>>(a, m, w, n, d, c, ldc);
  multiply_scaled<Scaled<C, 1>>(a, m, w, n, d, c, ldc);
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

template <class C>
int64_t workspace(int64_t d) {
  return first_bytes(d) + kVectors * Strip<C>::copy_bytes(d);
}

template <class C>
constexpr GemmKernel kernel = {kStep,       sizeof(bf16), kMaxRows, 1, pack_rows<typename C::Order>,
                               multiply<C>, workspace<C>};
template <>
constexpr GemmKernel kernel<Int4Lanes> = {kStep,         sizeof(bf16),        kMaxRows, 1, pack_rows<Int4Lanes::Order>,
                                          multiply_int4, workspace<Int4Lanes>};

}  // namespace

const GemmKernel fp8_bf16 = kernel<Fp8Lanes>;
const GemmKernel mxfp8_bf16 = kernel<Mxfp8Lanes>;
const GemmKernel mxfp4_bf16 = kernel<Mxfp4Lanes>;
const GemmKernel int4_bf16 = kernel<Int4Lanes>;

}  // namespace polymoe::POLYMOE_LEVEL
#endif
