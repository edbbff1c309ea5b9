// The matmul kernel for bf16 weights in panels, the right operand of tile products, and for weights that lie along the
// columns of the result, which are copied into panels.
#include "amx_gemm.h"

#if defined(POLYMOE_LEVEL_AMX)

#include "amx_product.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

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

// What a row group asks for, evenly over its products: its sums, which it will write, and its share of the stretch of
// weights that is multiplied next.
struct Ahead {
  const char* weights = nullptr;
  int64_t lines = 0;  // of weights, in each step
  const char* sums = nullptr;
  int64_t stride = 0, sum_lines = 0;  // bytes from a row of sums to the next; half a panel of a row is a line

  [[gnu::always_inline]] void operator()(int64_t step, int part, int parts) const {
    const int64_t line = step * parts + part;
    if (line < sum_lines) __builtin_prefetch(sums + line / 2 * stride + line % 2 * kLine, 1);
    for (int64_t i = lines * part / parts; i < lines * (part + 1) / parts; ++i)
      __builtin_prefetch(weights + (step * lines + i) * kLine, 0, 2);
  }
};

// For group number `group`, whose products take `steps` steps, as do those of the weights from `next` on, unless that
// is null.
Ahead ahead_of_group(const Rows& rows, int64_t group, int64_t steps, const float* c, const char* next) {
  const int64_t bytes = steps * kPanelStep, all = steps * rows.groups.count, lines = (bytes / kLine + all - 1) / all;
  const int64_t first = group * steps * lines * kLine;
  Ahead ahead;
  if (next && first < bytes) ahead.weights = next + first, ahead.lines = lines;
  ahead.sums = reinterpret_cast<const char*>(c);
  ahead.stride = rows.ldc * int64_t(sizeof(float)), ahead.sum_lines = 2 * rows.groups.rows(group);
  return ahead;
}

// What few rows ask for: of each panel what comes kFewAhead steps later, in the end of the panels that follow.
struct PanelsAhead {
  static constexpr int64_t kFewAhead = 32;
  const char *panel[2], *next[2];  // null where there is none
  int64_t steps;

  [[gnu::always_inline]] void operator()(int64_t step, int part, int) const {
    constexpr int64_t half = kPanelStep / 2;  // two products use a step of a panel
    const int64_t at = step + kFewAhead;
    const char* const from = at < steps ? panel[part / 2] : next[part / 2];
    if (!from) return;
    const char* const lines = from + (at < steps ? at : at - steps) * kPanelStep + part % 2 * half;
#pragma GCC unroll 16
    for (int64_t i = 0; i < half; i += kLine) __builtin_prefetch(lines + i, 0, 2);
  }
};

// `after`: the weights that follow these, or null.
void multiply_full_panels(const Rows& rows, const char* weights, int64_t panels, int64_t column, const char* after,
                          Configured& configured) {
  const int64_t panel_bytes = kPanel * rows.d * int64_t(sizeof(bf16));
  const int64_t whole = rows.d / kStep, per_strip = rows.small() ? 2 : 1;
  const int64_t block = rows.groups.count > 1 ? kBlockSteps : whole;
  const auto together = [&](int64_t p) { return panels - p < per_strip ? panels - p : per_strip; };
  // Multiplies panels [p, p + together(p)), found by `find`, with all row groups, while `next` is asked for.
  const auto strip = [&](int64_t p, int64_t begin, int64_t steps, const char* next, auto find) {
    const int count = int(together(p));
    const char* panel[2] = {};
    for (int i = 0; i < count; ++i) panel[i] = find(weights + (p + i) * panel_bytes, i);
    for (int64_t group = 0; group < rows.groups.count; ++group) {
      float* const c = rows.sums(group) + column + p * kPanel;
      if (rows.small()) {
        const PanelsAhead ahead{{panel[0], panel[1]}, {next, next ? next + panel_bytes : nullptr}, steps};
        multiply_panels(rows, group, panel, count, begin, steps, c, rows.ldc, configured, ahead);
      } else {
        multiply_panels(rows, group, panel, count, begin, steps, c, rows.ldc, configured,
                        ahead_of_group(rows, group, steps, c, next));
      }
    }
  };
  // A block along the reduction passes over all strips before the next one: its slice of A stays in the L2 cache.
  for (int64_t begin = 0; begin < whole; begin += block) {
    const int64_t steps = begin + block < whole ? block : whole - begin;
    const char* const next_block = begin + block < whole ? weights + (begin + block) * kPanelStep : after;
    for (int64_t p = 0; p < panels; p += per_strip) {
      const int64_t next = p + together(p);
      strip(p, begin, steps, next < panels ? weights + next * panel_bytes + begin * kPanelStep : next_block,
            [&](const char* panel, int) { return panel + begin * kPanelStep; });
    }
  }
  if (rows.d % kStep == 0) return;
  alignas(64) char tails[2][kPanelStep];
  for (int64_t p = 0; p < panels; p += per_strip)
    strip(p, whole, 1, nullptr, [&](const char* panel, int i) {
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
      multiply_panels(rows, group, &panel, 1, begin, steps, sums, kPanel, configured, Nothing{});
      for (int64_t i = 0; i < count; ++i)
        __builtin_memcpy(c + i * rows.ldc, sums + i * kPanel, size_t(columns) * sizeof(float));
    }
  }
}

void multiply_run(const Rows& rows, const char* weights, int64_t n, int64_t left, int64_t column, const char* after,
                  Configured& configured) {
  const int64_t most = left / kPanel * kPanel, full = n < most ? n : most;
  if (full > 0) multiply_full_panels(rows, weights, full / kPanel, column, after, configured);
  if (n > full)
    multiply_short_panel(rows, weights + full * rows.d * int64_t(sizeof(bf16)), n - full, column + full, configured);
}

void multiply_packed(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const Rows rows{a, RowGroups(m, kMaxRows), d, static_cast<float*>(c), ldc};
  if (trivial(rows, m, n)) return;
  Configured configured;
  const int64_t first = n < w.split ? n : w.split;
  multiply_run(rows, w.first, first, w.left, 0, first < n ? w.second : w.next, configured);
  if (first < n) multiply_run(rows, w.second, n - first, w.left, first, w.next, configured);
}

// No exception table may stand in an object of a level; one that passes here leaves the tile registers configured.
[[gnu::noinline, gnu::nothrow]] void hand_over(const GroupSink& sink, int64_t first, int64_t rows) {
  sink.take(sink.context, first, rows);
}

// Sums stay in the L1 cache and the tile registers keep their shape: after a short reduction both count.
void multiply_groups(const char* a, int64_t m, const char* w, int64_t n, int64_t d, float* sums, int64_t lds,
                     const GroupSink& sink) {
  const RowGroups groups(m, kMaxRows);
  Configured configured;
  const int64_t panels = n / kPanel, panel_bytes = kPanel * d * int64_t(sizeof(bf16));
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t first = groups.first_row(group), count = groups.rows(group);
    const Rows rows{a + first * steps_of(d) * kLine, RowGroups(count, kMaxRows), d, sums, lds};
    if (!trivial(rows, count, n)) {
      const int64_t per_strip = rows.small() ? 2 : 1;
      for (int64_t p = 0; p < panels; p += per_strip) {
        const char* const panel[2] = {w + p * panel_bytes, w + (p + 1) * panel_bytes};
        multiply_panels(rows, 0, panel, int(panels - p < per_strip ? panels - p : per_strip), 0, rows.steps(),
                        sums + p * kPanel, lds, configured, Nothing{});
      }
      if (n % kPanel != 0)
        multiply_short_panel(rows, w + panels * panel_bytes, n % kPanel, panels * kPanel, configured);
    }
    hand_over(sink, first, count);
  }
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

// Two elements of the reduction at a time become pairs. They are in rows of memory that are far from one another, so a
// few later ones are asked for.
[[gnu::nothrow]] void pack_columns(const char* w, int64_t stride, int64_t n, int64_t d, char* out) {
  constexpr int64_t kAhead = 16;
  const RowPairs pairs;
  const int64_t padded = steps_of(d) * kStep;
  for (int64_t k = 0; k < padded; k += 2) {
    const char* const even = w + k * stride;
    for (int64_t column = 0; column < n; column += kPanel) {
      const int64_t columns = n - column < kPanel ? n - column : kPanel;
      const __mmask32 mask = __mmask32((uint64_t{1} << columns) - 1);
      char* const to = out + (column * padded + k * columns) * int64_t(sizeof(bf16));
      const char* const from = even + column * int64_t(sizeof(bf16));
      for (int64_t row = 0; row < 2 && k + kAhead + row < d; ++row) __builtin_prefetch(from + (kAhead + row) * stride);
      const __m512i a = _mm512_maskz_loadu_epi16(k < d ? mask : 0, from);
      const __m512i b = _mm512_maskz_loadu_epi16(k + 1 < d ? mask : 0, from + stride);
      const __m512i first = pairs.first(a, b), second = pairs.second(a, b);
      if (columns == kPanel) {
        _mm512_storeu_si512(to, first);
        _mm512_storeu_si512(to + kLine, second);
        continue;
      }
      _mm512_mask_storeu_epi32(to, __mmask16(mask), first);
      _mm512_mask_storeu_epi32(to + kLine, __mmask16(mask >> 16), second);
    }
  }
}

// A block of weights on its way from columns of memory to products: panels by steps.
constexpr int64_t kBlockPanels = 4;
constexpr int64_t kFewRowsSteps = 4, kManyRowsSteps = 8;

int64_t column_workspace(int64_t d) {
  const int64_t block = kBlockPanels * kManyRowsSteps * kPanelStep, panel = steps_of(d) * kPanelStep;
  return block > panel ? block : panel;
}

// Copies `panels` panels of elements [0, d) of the reduction, `panel_bytes` apart, with zeros up to whole steps, while
// as much is asked for from `ahead` on, unless that is null.
[[gnu::nothrow]] void pack_block(const char* w, int64_t stride, int64_t panels, int64_t d, const char* ahead, char* out,
                                 int64_t panel_bytes) {
  const RowPairs pairs;
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
      _mm512_store_si512(to, pairs.first(a, b));
      _mm512_store_si512(to + kLine, pairs.second(a, b));
    }
}

void multiply_columns(const char* a, int64_t m, const char* w, int64_t stride, int64_t n, int64_t d, char* workspace,
                      void* c, int64_t ldc) {
  const Rows rows{a, RowGroups(m, kMaxRows), d, static_cast<float*>(c), ldc};
  if (trivial(rows, m, n)) return;
  Configured configured;
  const int64_t panels = n / kPanel, steps = rows.groups.count > 2 ? kManyRowsSteps : kFewRowsSteps;
  const int64_t strips = (panels + kBlockPanels - 1) / kBlockPanels, blocks = (rows.steps() + steps - 1) / steps;
  const int64_t panel_bytes = steps * kPanelStep, per_strip = rows.small() ? 2 : 1;
  // All strips take one slice of A after the other: it stays in the caches, and rows of W are read as runs through
  // their pages.
  const auto from = [&](int64_t i) {
    return w + i / strips * steps * kStep * stride + i % strips * kBlockPanels * kLine;
  };
  for (int64_t i = 0; i < strips * blocks; ++i) {
    const int64_t first = i % strips * kBlockPanels,
                  taken = panels - first < kBlockPanels ? panels - first : kBlockPanels;
    const int64_t begin = i / strips * steps, left = d - begin * kStep;
    const int64_t elements = left < steps * kStep ? left : steps * kStep, count = steps_of(elements);
    // Asked for during the products, the next block would take the fill buffers that tiles need.
    const char* const after = i + 1 < strips * blocks ? from(i + 1) : nullptr;
    pack_block(from(i), stride, taken, elements, after, workspace, panel_bytes);
    for (int64_t p = 0; p < taken; p += per_strip) {
      const int together = int(taken - p < per_strip ? taken - p : per_strip);
      const char* const panel[2] = {workspace + p * panel_bytes, workspace + (p + 1) * panel_bytes};
      for (int64_t group = 0; group < rows.groups.count; ++group)
        multiply_panels(rows, group, panel, together, begin, count, rows.sums(group) + (first + p) * kPanel, ldc,
                        configured, Nothing{});
    }
  }
  if (n % kPanel == 0) return;
  pack_columns(w + panels * kLine, stride, n % kPanel, d, workspace);
  const Rows padded{a, rows.groups, rows.steps() * kStep, rows.c, ldc};
  multiply_short_panel(padded, workspace, n % kPanel, panels * kPanel, configured);
}

}  // namespace

const GemmKernel packed_bf16 = {kStep,           sizeof(bf16), kMaxRows,       int(kPanel),      pack_left,
                                multiply_packed, nullptr,      pack_columns,   multiply_columns, column_workspace,
                                nullptr,         kSlice,       multiply_groups};

}  // namespace polymoe::POLYMOE_LEVEL
#endif
