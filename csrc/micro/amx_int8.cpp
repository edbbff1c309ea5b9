// The matmul kernel for bf16 on AMX tiles and weights of 8-bit integers, each row with a scale. An element of C is the
// sum over the whole reduction, in the order of all products of tiles, times the scale.
#include "amx_gemm.h"

#if defined(POLYMOE_LEVEL_AMX)

#include "amx_strip.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

using Int8Strip = Strip<Int8<Dot>>;

[[gnu::nothrow]] void multiply_whole(const Rows& rows, Int8Strip& strip, int64_t column, Configured& configured) {
  Transposed sums[kGroupsTogether];
  for (int64_t from = 0; from < rows.groups.count; from += kGroupsTogether) {
    const int64_t to = from + kGroupsTogether < rows.groups.count ? from + kGroupsTogether : rows.groups.count;
    for (int64_t p = 0; p < strip.panels(); ++p) {
      strip.begin(p);
      strip.decode_piece(0);
      const auto multiply = [&](int64_t group, auto&& meanwhile) {
        multiply_left(rows, group, strip.operand(0), kTiles, kTileRows, strip.first_step(), strip.steps(), p != 0,
                      sums[group - from], configured, meanwhile);
      };
      multiply(from, EachStep{[&](int64_t s) { strip.decode_after(s); }});
      for (int64_t group = from + 1; group < to; ++group) multiply(group, Nothing{});
    }
    for (int64_t group = from; group < to; ++group) {
      strip.scale(sums[group - from], Halves(rows.groups.rows(group)).tiles());
      store_transposed(rows, group, strip.count(), sums[group - from], column);
    }
  }
}

void multiply(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const Rows rows{a, RowGroups(m, kMaxRows), d, static_cast<float*>(c), ldc};
  if (trivial(rows, m, n)) return;
  Configured configured;
  for (int64_t column = 0; column < n; column += kStripRows) {
    Int8Strip strip(w, column, n, d);
    multiply_whole(rows, strip, column, configured);
  }
}

int64_t workspace(int64_t) { return 0; }

}  // namespace

const GemmKernel int8_bf16 = {kStep, sizeof(bf16), kMaxRows, 1, pack_right, multiply, workspace};

}  // namespace polymoe::POLYMOE_LEVEL
#endif
