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
#include "lane_panels.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kMaxRows = 14;
// From the strip that is multiplied in registers to the one whose lines are asked for meanwhile. That is in order, but
// a strip needs lines of all its rows at once: those of the last rows would come too late from one strip to the next.
constexpr int kStripsAhead = 2;
constexpr int kColumnsAhead = 2 * kColumns;  // of panels, which are decoded one before they are multiplied
constexpr int kFewRows = 8;  // decode in registers: beside the sums of more a line of codes has no room there

// A pair of A that is used once is an operand in memory, which GCC 12 has no pattern for: half of the instructions.
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

// --- rows of A -------------------------------------------------------------------------------------------------------

template <int MOST, int ROWS = 1, class F>
auto by_rows(int rows, const F& f) {
  if constexpr (ROWS < MOST)
    if (rows > ROWS) return by_rows<MOST, ROWS + 1>(rows, f);
  return f(std::integral_constant<int, ROWS>());
}

// Of the workspace: room for panels or for rows of A that are spread, and after it for copies of rows of W.
inline int64_t first_bytes(int64_t d) { return std::max(kPanelsBytes, spread_bytes(kSpreadRows, d)); }

template <class C>
void multiply_in_registers(const char* a, int rows, const Weights& w, int64_t n, int64_t d, float* c, int64_t ldc) {
  const auto product = by_rows<kFewRows>(rows, [](auto count) { return &multiply_group<C, count.value>; });
  if (spreads<C>(rows)) {
    spread(a, rows, d, w.workspace);
    a = w.workspace;
  }
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t columns = n - j < kLanes ? n - j : kLanes;
    Strip<C> strip(w, j, columns, d, w.workspace + first_bytes(d));
    strip.look_ahead(w, j + kLanes, n);
    const Streams ahead = streams_ahead(w, j + kStripsAhead * kLanes, n, kLanes, d, C::bits);
    product(strip, a, ahead, c + j, ldc, columns);
  }
}

// One row group by a panel; `x` and task.c are those of its first row.
template <class C>
void multiply_tiles(const char* x, int rows, Task task, bool logarithms, PanelDecoder<C>& decoder) {
  constexpr bool kPowers = C::adjust == Adjust::groups;
  const RowGroups tiles(rows, kTileRows);
  for (int64_t i = 0; i < tiles.count; ++i) {
    const auto multiply_by = [&](auto& meanwhile) {
      using Meanwhile = std::remove_reference_t<decltype(meanwhile)>;
      const auto product = by_rows<kTileRows>(tiles.rows(i), [&](auto count) {
        return logarithms ? &tile<count.value, kPowers, C::scaled_steps, Meanwhile>
                          : &tile<count.value, false, C::scaled_steps, Meanwhile>;
      });
      product(x + tiles.first_row(i) * 4, rows, task, meanwhile);
    };
    const Idle idle;
    if (decoder.busy())
      multiply_by(decoder);
    else
      multiply_by(idle);
    task.c += tiles.rows(i) * task.ldc;
  }
}

template <class C>
void multiply_panels(const char* a, const RowGroups& groups, const Weights& w, int64_t n, int64_t d, float* c,
                     int64_t ldc) {
  const int64_t steps = steps_of(d);
  const bool repays = C::adjust == Adjust::groups && groups.count > 2;  // reading A for it
  const Exponents exponents = repays ? Exponents::of(a, groups.first_row(groups.count) * steps * kLine) : Exponents{};
  // Two strips ask for as much as they take, which is twice Strip<C>::parts in a step, in two tiles of each row group.
  const int asks = int((Strip<C>::parts + groups.count - 1) / groups.count);
  Panels<C> panels(w, n, d, w.workspace + first_bytes(d));
  Streams ahead;
  for (int64_t panel = 0; panel < panels.count(); ++panel) {
    const Place at = panels.place(panel);
    if (at.first == 0) ahead = streams_ahead(w, at.column + kColumnsAhead, n, kColumns, d, C::bits);
    panels.begin(panel + 1);
    auto& scales = panels.scales(panel);
    const bool logarithms = repays && exponents.take_logarithms(C::power, scales, at.steps);
    Task task{
        panels.data(panel), scales, at.steps, block_shift(*w.matrix), at.first > 0, &ahead, asks, nullptr, ldc, {}};
    for (int v = 0; v < kVectors; ++v) task.columns[v] = lanes_below(int(at.width(v)));
    for (int64_t group = 0; group < groups.count; ++group) {
      const int rows = groups.rows(group);
      task.c = c + groups.first_row(group) * ldc + at.column;
      multiply_tiles(a + (groups.first_row(group) * steps + at.first * rows) * (kPairs * 4), rows, task, logarithms,
                     panels.decoder());
    }
    panels.decoder().finish();
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
  return first_bytes(d) + Panels<C>::copies_bytes(d);
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
