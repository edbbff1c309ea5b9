// The matmul kernel for bf16 on AMX tiles and weights of 8-bit integers, each row with a scale. Codes are decoded to
// bf16, exactly, into a panel that the L1 cache holds: the left operand of tile products for all rows of A. An element
// of C is the sum over the whole reduction, in the order of all products of tiles, times the scale.
#include "amx_gemm.h"

#if defined(POLYMOE_LEVEL_AMX)

#include "../formats/quantized.h"
#include "amx_product.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

using Codes = Int8<Dot>;

constexpr int kTiles = 2, kStripRows = kTiles * kTileRows;
constexpr int64_t kStepBytes = kStripRows * kLine;  // of a step of decoded weights
constexpr int64_t kPanelSteps = 16;                 // steps of a panel
constexpr int64_t kPiece = 4;                       // steps that are decoded together
constexpr int64_t kGroupsTogether = 8;              // row groups whose sums wait while a panel passes over them all

// Rows of W in two tiles; rows past `count` repeat the last one.
class Strip {
 public:
  // `next`: the row that will be read after these, or null.
  Strip(const Weights& w, int64_t column, int64_t count, int64_t d, const char* next) : d_(d) {
    const QuantizedMatrix& matrix = *w.matrix;
    for (int r = 0; r < kStripRows; ++r) {
      const int64_t row = matrix_row(w, column + (r < count ? r : count - 1));
      data_[r] = matrix.data + row * matrix.data_stride;
      __builtin_memcpy(scale_ + r, matrix.scale + row * matrix.scale_stride, sizeof(float));
    }
    ahead_ = next ? next - data_[0] : 0;
  }

  // Decodes rows [first, first + count) of steps [from, to), at most a piece, into the panel that begins at `begin`.
  void decode(int first, int count, int64_t begin, int64_t from, int64_t to) {
    for (int r = first; r < first + count; ++r) {
      const char* const data = data_[r] + from * kStep;
#pragma GCC unroll 2
      for (int64_t line = 0; line < kPiece * kStep; line += kLine) __builtin_prefetch(data + ahead_ + line, 0, 2);
      char* const out = panel_ + (from - begin) * kStepBytes + r * kLine;
      if (to - from == kPiece && to * kStep <= d_) {
#pragma GCC unroll 4
        for (int s = 0; s < kPiece; ++s) Dot::store(out + s * kStepBytes, Codes::decode(data + s * kStep, 0));
        continue;
      }
      for (int64_t s = from; s < to; ++s) {
        const int64_t left = d_ - s * kStep;
        char step[kStep] = {};
        __builtin_memcpy(step, data + (s - from) * kStep, size_t(left < kStep ? left : kStep));
        Dot::store(out + (s - from) * kStepBytes, Codes::decode(step, 0));
      }
    }
  }

  void scale(Transposed& sums, int tiles) const {
    for (int r = 0; r < kStripRows; ++r)
      for (int j = 0; j < tiles; ++j) {
        float* const at = sums.tile[r / kTileRows * tiles + j] + r % kTileRows * kTileRows;
        store(at, load<VF>(at) * set<VF>(scale_[r]));
      }
  }

  Side operand() const { return {{panel_, panel_ + kTileRows * kLine}, {kLine, kLine}, kStepBytes}; }

 private:
  const int64_t d_;
  int64_t ahead_;  // bytes from a row to the one that is asked for meanwhile
  const char* data_[kStripRows];
  float scale_[kStripRows];
  alignas(64) char panel_[kPanelSteps * kStepBytes];
};

[[gnu::nothrow]] void multiply_strip(const Rows& rows, Strip& strip, int64_t count, int64_t column,
                                     Configured& configured) {
  Transposed sums[kGroupsTogether];
  for (int64_t from = 0; from < rows.groups.count; from += kGroupsTogether) {
    const int64_t to = from + kGroupsTogether < rows.groups.count ? from + kGroupsTogether : rows.groups.count;
    for (int64_t begin = 0; begin < rows.steps(); begin += kPanelSteps) {
      const int64_t end = begin + kPanelSteps < rows.steps() ? begin + kPanelSteps : rows.steps();
      const auto piece_end = [&](int64_t s) { return s + kPiece < end ? s + kPiece : end; };
      strip.decode(0, kStripRows, begin, begin, piece_end(begin));
      for (int64_t group = from; group < to; ++group) {
        const auto multiply = [&](auto&& meanwhile) {
          multiply_left(rows, group, strip.operand(), kTiles, kTileRows, begin, end - begin, begin != 0,
                        sums[group - from], configured, meanwhile);
        };
        if (group > from)
          multiply(Nothing{});
        else  // a part of the rows of the next piece in every step
          multiply(EachStep{[&](int64_t s) {
            const int64_t piece = begin + (s / kPiece + 1) * kPiece;
            constexpr int part = kStripRows / kPiece;
            if (piece < end) strip.decode(int(s % kPiece) * part, part, begin, piece, piece_end(piece));
          }});
      }
    }
    for (int64_t group = from; group < to; ++group) {
      strip.scale(sums[group - from], Halves(rows.groups.rows(group)).tiles());
      store_transposed(rows, group, count, sums[group - from], column);
    }
  }
}

void multiply(const char* a, int64_t m, const Weights& w, int64_t n, int64_t d, void* c, int64_t ldc) {
  const Rows rows{a, RowGroups(m, kMaxRows), d, static_cast<float*>(c), ldc};
  if (trivial(rows, m, n)) return;
  Configured configured;
  for (int64_t column = 0; column < n; column += kStripRows) {
    const int64_t count = n - column < kStripRows ? n - column : kStripRows, next = column + kStripRows;
    Strip strip(w, column, count, d, next < n ? w.matrix->data + matrix_row(w, next) * w.matrix->data_stride : w.next);
    multiply_strip(rows, strip, count, column, configured);
  }
}

int64_t workspace(int64_t) { return 0; }

}  // namespace

const GemmKernel int8_bf16 = {kStep, sizeof(bf16), kMaxRows, 1, pack_right, multiply, workspace};

}  // namespace polymoe::POLYMOE_LEVEL
#endif
