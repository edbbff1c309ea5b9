// Columns of C, that is rows of W, as the products with rows rounded to 8-bit integers take them: unsigned bytes, each
// the code plus `offset`, four elements of the reduction side by side in every lane. From where they are stored, or in
// a panel.
#pragma once

#include "even_rows.h"
#include "int8_piece.h"
#include "int8_scales.h"
#include "quantized_ahead.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kFours = kPiece / 4;  // vectors of a piece, for every vector of columns
constexpr int kVectors = 2;         // of columns in a panel
constexpr int kLanes = VF::width, kColumns = kVectors * kLanes;
constexpr int64_t kPanelPieces = 16;  // of a panel, which the L1 cache holds beside the rows of a tile
constexpr int64_t kPanelBytes = kPanelPieces * kPiece * kColumns;
static_assert(kPanelPieces % 4 == 0, "whole groups of A");

#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
constexpr int kPanelRows = 6;
#else
constexpr int kPanelRows = 2;
#endif

// --- codes -----------------------------------------------------------------------------------------------------------

struct E2m1Codes {  // twice the value
  static constexpr ScaleKind scales = ScaleKind::powers;
  static constexpr int bits = 4, offset = 12;
  static Bytes of_nibbles(Bytes x) {
#if defined(POLYMOE_LEVEL_PORTABLE)
    constexpr uint8_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    for (uint32_t& v : x.v)
      v = table[v & 15] | uint32_t(table[v >> 8 & 15]) << 8 | uint32_t(table[v >> 16 & 15]) << 16 |
          uint32_t(table[v >> 24 & 15]) << 24;
    return x;
#else
    return look_up(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0), x);
#endif
  }
};
struct Int8Codes {
  static constexpr ScaleKind scales = ScaleKind::rows;
  static constexpr int bits = 8, offset = 128;
};
struct Int4Codes {
  static constexpr ScaleKind scales = ScaleKind::blocks;
  static constexpr int bits = 4, offset = 8;  // which is the zero point where no other is given
  static Bytes of_nibbles(Bytes x) { return x; }
};

// Rows of A in a tile with a vector of columns: more than with a panel where what they save of decoding is more than
// what sums lose that leave the registers.
#if defined(POLYMOE_LEVEL_AVX512_BF16) && !defined(POLYMOE_LEVEL_AMX)
template <class C, int GROUP>
constexpr int kStoredRows = C::bits == 4 || GROUP > 1 ? 10 : 8;
#else
template <class C, int GROUP>
constexpr int kStoredRows = kPanelRows;
#endif

// Rows of a row group: a tile with a vector of columns, or as many with a panel as that takes.
template <class C, int GROUP>
constexpr int kRows = kStoredRows<C, GROUP> > kPanelRows ? 2 * kPanelRows : kPanelRows;

// --- where they lie --------------------------------------------------------------------------------------------------

// Places in the workspace for kColumns columns of d elements, padded to whole groups of A.
struct Space {
  int64_t pieces;
  Space(int64_t d, int64_t group) : pieces((d + group - 1) / group * group / kPiece) {}

  char* panel(char* base) const { return base; }
  // Of kLanes rows of W.
  char* copy(char* base, int vector) const { return base + kPanelBytes + vector * pieces * kLanes * kPiece; }
  float* scale(char* base) const { return reinterpret_cast<float*>(copy(base, kVectors)); }
  float* offset(char* base) const { return scale(base) + pieces * kColumns; }
  // Of kMostRows rows, kColumns apart.
  float* sums(char* base) const { return offset(base) + pieces * kColumns; }
  int64_t bytes() const {
    return kPanelBytes + pieces * kColumns * (kPiece + 2 * int64_t(sizeof(float))) +
           kMostRows * kColumns * int64_t(sizeof(float));
  }
};

// A vector of columns, as they are stored; those past `count` repeat the last one.
template <class C>
class Stored {
 public:
  using Codes = C;
  static constexpr int vectors = 1, lines = C::bits == 8 ? 2 : 1;  // lines: Streams::ask
  static constexpr ScaleKind scales = C::scales;
  template <int GROUP>
  static constexpr int max_rows = kStoredRows<C, GROUP>;
  static constexpr int64_t piece_bytes = kPiece * C::bits / 8;

  Stored(const Weights& w, int64_t column, int64_t count, int64_t d) : used_((d + kPiece - 1) / kPiece) {
    const QuantizedMatrix& m = *w.matrix;
    share_ = m.scale_columns ? m.scale_columns / kPiece : used_;
    for (int r = 0; r < kLanes; ++r) {
      const MatrixRow row(m, matrix_row(w, column + (r < count ? r : count - 1)));
      row_[r] = row.data;
      scale_[r] = row.scale;
      zero_[r] = row.zero;
    }
  }
  // For `piece`, which takes rows evenly apart and whole groups of A; others are copied, to the place of `vector`.
  Stored(const Weights& w, int64_t column, int64_t count, int64_t d, const Space& space, int vector)
      : Stored(w, column, count, d) {
    rows_ = even_rows(w, column, count, row_, kLanes, (d * C::bits + 7) / 8, space.pieces * piece_bytes,
                      space.copy(w.workspace, vector));
  }
  Stored(const Stored&) = delete;

  // f(i, 0, codes): the four elements i of kFours.
  template <class F>
  [[gnu::always_inline]] void piece(int64_t p, F&& f) const {
    Bytes v[piece_bytes / 4];
    load_lanes(rows_.from + p * piece_bytes, rows_.stride, v);
    keep_order();
#pragma GCC unroll 8
    for (int i = 0; i < int(piece_bytes / 4); ++i) {
      if constexpr (C::bits == 8) {
        f(i, 0, flip_sign(v[i]));
      } else {
        f(2 * i, 0, C::of_nibbles(low_nibbles(v[i])));
        f(2 * i + 1, 0, C::of_nibbles(high_nibbles(v[i])));
      }
    }
  }

  const char* const* rows() const { return row_; }
  VF row_scales() const {
    float scale[kLanes];
    for (int r = 0; r < kLanes; ++r) __builtin_memcpy(scale + r, scale_[r], sizeof(float));
    return load<VF>(scale);
  }

  // Scales as `add_scaled` takes them, by piece and zero where it is all padding, or one vector if whole rows share
  // them; and, where there are zero points, what they are above C::offset.
  template <ScaleKind KIND = C::scales>
  void prepare(int64_t pieces, float* scale, float* offset) const {
    if constexpr (KIND == ScaleKind::rows) {
      store(scale, row_scales());
    } else if constexpr (KIND == ScaleKind::powers || KIND == ScaleKind::logarithms) {
      prepare_powers<KIND>(scale);
    } else {
      set_lanes(scale, [&](int r, int64_t entry) {
        float value;
        __builtin_memcpy(&value, scale_[r] + entry * 4, 4);
        return value;
      });
    }
    if (offset)
      set_lanes(offset, [&](int r, int64_t entry) { return float(int(uint8_t(zero_[r][entry])) - C::offset); });
    for (int64_t p = used_; p < pieces; ++p) {
      if (C::scales != ScaleKind::rows) store(scale + p * kLanes, set<VF>(0));
      if (offset) store(offset + p * kLanes, set<VF>(0));
    }
  }

  // Bytes from the scales of the first column to those of column `next` of n, or of what the next call begins with.
  int64_t scales_ahead(const Weights& w, int64_t next, int64_t n) const {
    const int64_t row = row_ahead(w, next, n);
    return row < 0 ? 0 : MatrixRow(*w.matrix, row).scale - scale_[0];
  }
  // A line of scales so far on from those of each column, into the L2 cache.
  void ask_scales(int64_t ahead) const {
    for (const char* const scale : scale_) __builtin_prefetch(scale + ahead, 0, 2);
  }

#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
  // near_powers of every group of four pieces in [first, end); false if one is not near.
  bool compare_powers(int64_t first, int64_t end, Bytes (&least)[kPanelPieces / 4],
                      Bytes (&above)[kPanelPieces / 4]) const {
    Bytes codes[kPanelPieces / 4];
    load_lanes(scale_, first, used_ - first, codes);
    for (int64_t g = 0; g < (end - first) / 4; ++g)
      if (!near_powers(codes[g], least[g], above[g])) return false;
    return true;
  }
#endif

 private:
  template <class F>
  void set_lanes(float* to, F&& value) const {
    for (int64_t p = 0, entry = 0; p < used_; p += share_, ++entry) {
      for (int r = 0; r < kLanes; ++r) to[p * kLanes + r] = value(r, entry);
      const VF lanes = load<VF>(to + p * kLanes);
      for (int64_t q = p + 1; q < p + share_ && q < used_; ++q) store(to + q * kLanes, lanes);
    }
  }

  template <ScaleKind KIND>
  void prepare_powers(float* scale) const {
    constexpr int64_t kTogether = 16;
    for (int64_t p = 0; p < used_; p += kTogether) {
      const int64_t count = used_ - p < kTogether ? used_ - p : kTogether;
      Bytes codes[4];
      if (count == kTogether) {
        load_lanes(scale_, p, codes);
      } else {
        char last[kLanes][kTogether] = {};
        const char* row[kLanes];
        for (int r = 0; r < kLanes; ++r)
          row[r] = static_cast<char*>(__builtin_memcpy(last[r], scale_[r] + p, size_t(count)));
        load_lanes(row, 0, codes);
      }
#pragma GCC unroll 16
      for (int i = 0; i < int(kTogether); ++i) {
        if (i >= count) break;
        store(scale + (p + i) * kLanes, half_power_of_byte<KIND>(codes[i / 4], i % 4));
      }
    }
  }

  int64_t used_;   // pieces
  int64_t share_;  // pieces that have one scale
  const char *row_[kLanes], *scale_[kLanes], *zero_[kLanes];
  EvenRows rows_;  // for `piece`
};

// The same in a panel of up to kPanelPieces pieces from `first` on, all columns of it.
template <class C>
struct Panel {
  using Codes = C;
  static constexpr int vectors = kVectors, lines = 1;
  static constexpr ScaleKind scales = C::scales == ScaleKind::powers ? kPanelPowers : C::scales;
  template <int GROUP>
  static constexpr int max_rows = kPanelRows;

  char* data;
  int64_t first;

  // Pieces [first, end) of vector v. The codes of a piece become `change` of them.
  template <class Change>
  void write(const Stored<C>& columns, int64_t end, int v, Change&& change) const {
    for (int64_t p = first; p < end; ++p) {
      char* const to = data + ((p - first) * kFours * kVectors + v) * kLanes * 4;
      const auto change_codes = change(p);
      columns.piece(
          p, [&](int i, int, Bytes codes)
                 __attribute__((always_inline)) { store_bytes(to + i * kColumns * 4, change_codes(codes)); });
    }
  }
  void write(const Stored<C>& columns, int64_t end, int v) const {
    write(columns, end, v, [](int64_t) { return [](Bytes codes) { return codes; }; });
  }

#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
  // Whole groups: codes times 2^n, if the power of two of their piece is n above the least of its group, plus
  // kFarFactor times the offset. The least becomes the scale of the group's first piece. False, and nothing written,
  // where powers are too far apart.
  bool write_aligned(const Stored<C> (&columns)[kVectors], int count, int64_t end, float* scale, int64_t pieces) const {
    Bytes least[kVectors][kPanelPieces / 4], above[kVectors][kPanelPieces / 4];
    for (int v = 0; v < count; ++v)
      if (!columns[v].compare_powers(first, end, least[v], above[v])) return false;
    const Bytes offset = _mm512_set1_epi8(C::offset), whole = _mm512_set1_epi8(kFarFactor * C::offset);
    for (int v = 0; v < count; ++v) {
      for (int64_t p = first; p < end; p += 4)
        store(scale + (v * pieces + p) * kLanes, half_power_of_byte<scales>(least[v][(p - first) / 4], 0));
      write(columns[v], end, v, [&](int64_t p) {
        const int64_t at = p - first;
        const Bytes shift =
            _mm512_and_si512(_mm512_srli_epi32(above[v][at / 4], unsigned(at % 4 * 8)), _mm512_set1_epi32(255));
        const Bytes missing = _mm512_sub_epi8(whole, _mm512_sllv_epi32(offset, shift));
        return [=](Bytes codes) { return _mm512_add_epi8(_mm512_sllv_epi32(codes, shift), missing); };
      });
    }
    return true;
  }
#endif

  template <class F>
  [[gnu::always_inline]] void piece(int64_t p, F&& f) const {
    const char* const at = data + (p - first) * kFours * kColumns * 4;
#pragma GCC unroll 8
    for (int i = 0; i < kFours; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) f(i, v, load_bytes(at + (i * kVectors + v) * kLanes * 4));
  }
};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
