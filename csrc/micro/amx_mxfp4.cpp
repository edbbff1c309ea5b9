// The matmul kernel for mxfp4 weights and bf16 on AMX tiles. Codes are decoded to bf16, exactly, into a panel that
// the L1 cache holds: the left operand of tile products for all rows of A. What a block of the reduction sums to is
// multiplied by the scale that the block shares and added to the total, which is one fused multiply-add:
//
//   total += scale[block] * sum over the block of x * code
//
// The sum of a block is a chain over its steps, as in all products of tiles, whatever the number of rows.
#include "amx_gemm.h"

#if defined(POLYMOE_LEVEL_AMX)

#include "../formats/scales.h"
#include "amx_few_rows.h"
#include "amx_product.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kTiles = 2, kStripRows = kTiles * kTileRows;
constexpr int64_t kStepBytes = kStripRows * kLine;  // of a step of decoded weights
constexpr int64_t kPiece = 4;                       // steps that are decoded together
constexpr int64_t kGroupsTogether = 8;              // row groups whose totals wait while a block passes over them all

using C = Mxfp4<Dot>;

// Rows of W in two tiles; rows past `count` repeat the last one.
class Strip {
 public:
  static constexpr int64_t bytes = kStep * C::bits / 8;

  // `next`: where the weights begin that will be read next.
  Strip(const Weights& w, int64_t column, int64_t count, int64_t d, const char* next) : matrix_(*w.matrix), d_(d) {
    for (int r = 0; r < kStripRows; ++r) {
      const int64_t row = matrix_row(w, column + (r < count ? r : count - 1));
      data_[r] = matrix_.data + row * matrix_.data_stride;
      scales_[r] = RowScales(matrix_, row);
    }
    ahead_ = next ? next - data_[0] : 0;
  }

  void begin_block(int64_t b) {
    block_ = b * block_of<C>(matrix_) / kStep;
    for (int r = 0; r < kStripRows; ++r) multiplier_[r] = prepare_block<Dot, C>(matrix_, scales_[r], b, d_, adjust_[r]);
  }

  // Decodes rows [first, first + count) of steps [from, to) of the block, at most a piece.
  void decode(int first, int count, int64_t from, int64_t to) {
    for (int r = first; r < first + count; ++r) {
      const char* const data = data_[r] + (block_ + from) * bytes;
#pragma GCC unroll 2
      for (int64_t line = 0; line < kPiece * bytes; line += kLine) __builtin_prefetch(data + ahead_ + line, 0, 2);
      const uint32_t* const adjust = adjust_[r] + from;
      char* const out = panel_ + r * kLine + from * kStepBytes;
      if (to - from == kPiece && (block_ + to) * kStep <= d_) {
#pragma GCC unroll 4
        for (int s = 0; s < kPiece; ++s) Dot::store(out + s * kStepBytes, C::decode(data + s * bytes, adjust[s]));
        continue;
      }
      for (int64_t s = from; s < to; ++s) {
        const int64_t left = d_ - (block_ + s) * kStep;
        char step[bytes] = {};
        __builtin_memcpy(step, data + (s - from) * bytes, left < kStep ? size_t(left * C::bits + 7) / 8 : bytes);
        Dot::store(out + (s - from) * kStepBytes, C::decode(step, adjust[s - from]));
      }
    }
  }

  // total += multiplier * sums, for a row group in `tiles` tiles.
  void add(const Transposed& sums, int tiles, Transposed& total) const {
    for (int i = 0; i < kTiles; ++i)
      for (int r = 0; r < kTileRows; ++r) {
        const VF factor = set<VF>(multiplier_[i * kTileRows + r]);
        for (int j = 0; j < tiles; ++j) {
          float* const to = total.tile[i * tiles + j] + r * kTileRows;
          store(to, fma(load<VF>(sums.tile[i * tiles + j] + r * kTileRows), factor, load<VF>(to)));
        }
      }
  }

  // Block b with M few rows, added to the totals of tile i in total[i]; false if its groups are too far apart.
  template <int M>
  bool add_few(int64_t b, const FewRows& x, int64_t steps, VF (&total)[kTiles][kFewRows]) {
    block_ = b * block_of<C>(matrix_) / kStep;
    VF sum[kTiles][M], multiplier[kTiles];
    for (int i = 0; i < kTiles; ++i) {
      VF factor[kGroups];
      const char* scales[kTileRows];
      char last[kTileRows][kGroups] = {};
      for (int r = 0; r < kTileRows; ++r) {
        scales[r] = scales_[i * kTileRows + r].scale + b * kGroups;
        if (steps < kGroups) scales[r] = static_cast<char*>(__builtin_memcpy(last[r], scales[r], size_t(steps)));
      }
      if (!factors_of_lanes(scales, int(steps), factor, multiplier[i])) return false;
      const char* const* const row = data_ + i * kTileRows;
      VF acc[M];
      for (VF& v : acc) v = set<VF>(0);
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t at = (block_ + s) * bytes;
        // A piece of a row is a cache line; asked for all at once they would fill the fill buffers.
        constexpr int part = kTileRows / kPiece;
        for (int r = int(s % kPiece) * part, last = r + part; r < last; ++r)
          __builtin_prefetch(row[r] + ahead_ + at, 0, 2);
        const float* in[M];
        for (int m = 0; m < M; ++m) in[m] = x.row(m, block_ + s);
        VF sums[M];
        if ((block_ + s + 1) * kStep <= d_) {
          step_of_e2m1<M>(row, at, in, sums);
        } else {
          char last[kTileRows][bytes] = {};
          const char* end[kTileRows];
          for (int r = 0; r < kTileRows; ++r) {
            end[r] = last[r];
            __builtin_memcpy(last[r], row[r] + at, size_t((d_ - (block_ + s) * kStep) * C::bits + 7) / 8);
          }
          step_of_e2m1<M>(end, 0, in, sums);
        }
        for (int m = 0; m < M; ++m) acc[m] = fma(sums[m], factor[s], acc[m]);
      }
      for (int m = 0; m < M; ++m) sum[i][m] = acc[m];
    }
    for (int i = 0; i < kTiles; ++i)
      for (int m = 0; m < M; ++m) total[i][m] = fma(sum[i][m], multiplier[i], total[i][m]);
    return true;
  }

  Side operand() const { return {{panel_, panel_ + kTileRows * kLine}, {kLine, kLine}, kStepBytes}; }
  int64_t first_step() const { return block_; }

 private:
  const QuantizedMatrix& matrix_;
  const int64_t d_;
  int64_t ahead_;      // bytes from a row to the one that is asked for meanwhile
  int64_t block_ = 0;  // its first step
  const char* data_[kStripRows];
  RowScales scales_[kStripRows];
  float multiplier_[kStripRows];
  uint32_t adjust_[kStripRows][kGroups];
  alignas(64) char panel_[kBlock / kStep * kStepBytes];
};

void multiply_strip(const Rows& rows, Strip& strip, int64_t count, int64_t block, int64_t column,
                    Configured& configured) {
  Transposed sums, totals[kGroupsTogether];
  for (int64_t from = 0; from < rows.groups.count; from += kGroupsTogether) {
    const int64_t to = from + kGroupsTogether < rows.groups.count ? from + kGroupsTogether : rows.groups.count;
    for (int64_t group = from; group < to; ++group) __builtin_memset(&totals[group - from], 0, sizeof(Transposed));
    for (int64_t b = 0; b * block < rows.steps(); ++b) {
      const int64_t left = rows.steps() - b * block, steps = left < block ? left : block;
      strip.begin_block(b);
      strip.decode(0, kStripRows, 0, steps < kPiece ? steps : kPiece);
      for (int64_t group = from; group < to; ++group) {
        const auto multiply = [&](auto&& meanwhile) {
          multiply_left(rows, group, strip.operand(), kTiles, kTileRows, strip.first_step(), steps, false, sums,
                        configured, meanwhile);
        };
        if (group > from)
          multiply(Nothing{});
        else  // a part of the rows of the next piece in every step
          multiply(EachStep{[&](int64_t s) {
            const int64_t piece = (s / kPiece + 1) * kPiece;
            if (piece >= steps) return;
            constexpr int part = kStripRows / kPiece;
            strip.decode(int(s % kPiece) * part, part, piece, piece + kPiece < steps ? piece + kPiece : steps);
          }});
        strip.add(sums, Halves(rows.groups.rows(group)).tiles(), totals[group - from]);
      }
    }
    for (int64_t group = from; group < to; ++group) store_transposed(rows, group, count, totals[group - from], column);
  }
}

// The same with few rows, which are one group. Blocks whose groups are too far apart go through tiles.
template <int M>
void multiply_few(const Rows& rows, const FewRows& x, Strip& strip, int64_t count, int64_t block, int64_t column,
                  Configured& configured) {
  VF total[kTiles][kFewRows];
  for (auto& of_tile : total)
    for (VF& v : of_tile) v = set<VF>(0);
  for (int64_t b = 0; b * block < rows.steps(); ++b) {
    const int64_t left = rows.steps() - b * block, steps = left < block ? left : block;
    if (strip.add_few<M>(b, x, steps, total)) continue;
    strip.begin_block(b);
    Transposed sums, totals;
    for (int64_t s = 0; s < steps; s += kPiece) strip.decode(0, kStripRows, s, s + kPiece < steps ? s + kPiece : steps);
    multiply_left(rows, 0, strip.operand(), kTiles, kTileRows, strip.first_step(), steps, false, sums, configured,
                  Nothing{});
    const auto each_of = [&](auto&& f) {
      for (int i = 0; i < kTiles; ++i)
        for (int m = 0; m < M; ++m)
          for (int r = 0; r < kTileRows; ++r)
            f(reinterpret_cast<float*>(&total[i][m])[r], totals.tile[i][r * kTileRows + m]);
    };
    each_of([](float v, float& t) { t = v; });
    strip.add(sums, 1, totals);
    each_of([](float& v, float t) { v = t; });
  }
  for (int i = 0; i < kTiles && i * kTileRows < count; ++i)
    for (int m = 0; m < M; ++m) {
      const int64_t left = count - i * kTileRows;
      store_n(rows.c + m * rows.ldc + column + i * kTileRows, total[i][m], left < kTileRows ? int(left) : kTileRows);
    }
}

void multiply(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const Rows rows{a, RowGroups(m, kMaxRows), d, static_cast<float*>(c), ldc};
  if (trivial(rows, m, n)) return;
  Configured configured;
  const QuantizedMatrix& matrix = *w.matrix;
  const int64_t block = block_of<C>(matrix) / kStep;
  const auto strips = [&](auto&& run) {
    for (int64_t column = 0; column < n; column += kStripRows) {
      const int64_t count = n - column < kStripRows ? n - column : kStripRows, next = column + kStripRows;
      Strip strip(w, column, count, d, next < n ? matrix.data + matrix_row(w, next) * matrix.data_stride : w.next);
      run(strip, count, column);
    }
  };
  const auto few = [&](auto count_of_rows, const FewRows& x) {
    strips([&](Strip& strip, int64_t count, int64_t column) {
      multiply_few<count_of_rows.value>(rows, x, strip, count, block, column, configured);
    });
  };
  if (m <= kFewRows) {
    const FewRows x(rows, w.workspace);
    if (x.narrow()) return m == 1 ? few(Index<1>{}, x) : m == 2 ? few(Index<2>{}, x) : few(Index<3>{}, x);
  }
  strips([&](Strip& strip, int64_t count, int64_t column) {
    multiply_strip(rows, strip, count, block, column, configured);
  });
}

}  // namespace

const GemmKernel mxfp4_bf16 = {kStep, sizeof(bf16), kMaxRows, 1, pack_right, multiply, FewRows::bytes};

}  // namespace polymoe::POLYMOE_LEVEL
#endif
