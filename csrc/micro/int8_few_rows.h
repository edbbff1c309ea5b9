// The product of the modes "int8" and "int8_g128" for few rows of A. Lanes run along the reduction, so that 64 bytes of
// a row of W are a dot product or two, and what 16 rows of W come to is brought into their lanes by a tree of integer
// additions, a third of the work of bringing the weights themselves there. The sums of a group are integers and
// therefore exact, in whatever order; what follows are the steps of int8_gemm.cpp, and its bits.
#pragma once

#include "bytes.h"
#include "int8_piece.h"
#include "int8_scales.h"

#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)

namespace polymoe::POLYMOE_LEVEL {
namespace {

constexpr int kFewRows = 3;  // beyond, trees for every row cost more than lanes once for all
constexpr int64_t kChunk = 64;

// Of four rows: lane r of every 128 bits is the sum of row r's lanes there.
inline Bytes add_quads(Bytes a, Bytes b, Bytes c, Bytes d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// Of four times four rows: the sums of the lower 256 bits, and of the upper ones, of row r in lane r.
inline void add_halves(const Bytes (&v)[4], Bytes& lower, Bytes& upper) {
  const auto halves = [](Bytes a, Bytes b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  };
  const __m512i a = halves(v[0], v[1]), b = halves(v[2], v[3]);
  lower = _mm512_shuffle_i32x4(a, b, 0x88), upper = _mm512_shuffle_i32x4(a, b, 0xdd);
}

// 16 rows of 8-bit W by M rows of A. `ask()`, with every four rows of W, asks for what is needed later.
template <int M, int GROUP, class Ask>
[[gnu::always_inline]] inline void multiply_few(const Piece* a, const char* const* row, int64_t d, VF scale,
                                                VF (&total)[M], Ask&& ask) {
  constexpr int kChunks = GROUP == 1 ? 1 : GROUP * int(kPiece) / int(kChunk), kGroups = GROUP == 1 ? 2 : 1;
  const int64_t pieces = (d + GROUP * kPiece - 1) / (GROUP * kPiece) * GROUP;
#pragma GCC unroll 4
  for (VF& v : total) v = set<VF>(0);
  for (int64_t p = 0; p < pieces; p += kGroups * GROUP, a += kGroups * GROUP * M) {
    const bool both = kGroups == 1 || p + 1 < pieces;
    Bytes sums[M][4];
    for (int q = 0; q < 4; ++q) {
      Bytes dots[M][4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) dots[m][r] = _mm512_setzero_si512();
#pragma GCC unroll 2
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          const int64_t at = p * kPiece + chunk * kChunk, left = d - at;
          const char* const from = row[4 * q + r] + at;
          const Bytes codes = left >= kChunk ? load_bytes(from)
                                             : _mm512_maskz_loadu_epi8(left > 0 ? (uint64_t(1) << left) - 1 : 0, from);
          const Bytes w = flip_sign(codes);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            const Piece* const first = GROUP == 1 ? a + m : a + m * GROUP + 2 * chunk;
            const Piece* const second = GROUP == 1 ? (both ? a + M + m : first) : first + 1;
            const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first->code));
            const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second->code));
            dots[m][r] = dot(dots[m][r], w, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
          }
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums[m][q] = add_quads(dots[m][0], dots[m][1], dots[m][2], dots[m][3]);
      ask();
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      Bytes lower, upper;
      add_halves(sums[m], lower, upper);
      const auto add = [&](Bytes exact, int32_t begin, float scale_a) {
        total[m] = fma(to_float(add_ints(exact, set_ints(begin))), set<VF>(scale_a), total[m]);
      };
      if constexpr (GROUP == 1) {
        add(lower, a[m].begin, a[m].scale);
        if (both) add(upper, a[M + m].begin, a[M + m].scale);
      } else {
        add(add_ints(lower, upper), a[m * GROUP].group_begin, a[m * GROUP].scale);
      }
    }
  }
#pragma GCC unroll 4
  for (VF& v : total) v = v * scale;
}

// --- 4-bit weights: a chunk of a row is four pieces ------------------------------------------------------------------

constexpr int kChunkPieces = 4;

// M rows of A by chunk: of every row what low nibbles are multiplied with, then what high ones are; zeros at the end.
template <int M, int GROUP>
void deal_out(const Piece* a, int64_t pieces, char* out) {
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const int64_t padded = (pieces + kChunkPieces - 1) / kChunkPieces * kChunkPieces;
  for (int64_t p = 0; p < padded; ++p)
    for (int m = 0; m < M; ++m) {
      const Piece& piece = a[(p / GROUP * M + m) * GROUP + p % GROUP];
      __m256i codes = _mm256_setzero_si256();
      if (p < pieces)
        codes = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(piece.code)), order);
      char* const to = out + (p / kChunkPieces * M + m) * 2 * kChunk + p % kChunkPieces * 16;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(codes));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kChunk), _mm256_extracti128_si256(codes, 1));
    }
}

// Of four times four rows: the sums of 128 bits each of row r in lane r.
inline void add_quarters(const Bytes (&v)[4], Bytes (&sums)[kChunkPieces]) {
  VF x[4];
  for (int i = 0; i < 4; ++i) x[i] = {_mm512_castsi512_ps(v[i])};
  exchange_quarters(x);
  for (int i = 0; i < kChunkPieces; ++i) sums[i] = _mm512_castps_si512(x[i].v);
}

// The integer sums of a chunk of 16 rows of W, `bytes` of each, with M rows of A that deal_out wrote. `ask()` as above.
template <int M, class C, class Ask>
[[gnu::always_inline]] inline void sum_chunk(const char* const* row, int64_t at, int64_t bytes, const char* a,
                                             Bytes (&sums)[M][kChunkPieces], Ask&& ask) {
  const uint64_t mask = bytes >= kChunk ? ~uint64_t(0) : (uint64_t(1) << bytes) - 1;
  Bytes quads[M][4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    Bytes dots[M][4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const Bytes both = _mm512_maskz_loadu_epi8(mask, row[4 * q + r] + at);
      const Bytes low = C::of_nibbles(low_nibbles(both)), high = C::of_nibbles(high_nibbles(both));
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const char* const from = a + m * 2 * kChunk;
        dots[m][r] = dot(_mm512_setzero_si512(), low, load_bytes(from));
        dots[m][r] = dot(dots[m][r], high, load_bytes(from + kChunk));
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) quads[m][q] = add_quads(dots[m][0], dots[m][1], dots[m][2], dots[m][3]);
    ask();
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) add_quarters(quads[m], sums[m]);
}

// 16 rows of W by M rows of A. `scale` and `offset`, or null: by piece, as Stored::prepare writes them. SUMMED pieces
// are summed in integers.
template <int M, class C, int GROUP, int SUMMED, class Ask>
[[gnu::always_inline]] inline void multiply_few_nibbles(const Piece* a, const char* dealt, const char* const* row,
                                                        int64_t d, const float* scale, const float* offset,
                                                        VF (&total)[M], Ask&& ask) {
  constexpr int kLanes = VF::width;
  const int64_t pieces = (d + GROUP * kPiece - 1) / (GROUP * kPiece) * GROUP;
#pragma GCC unroll 4
  for (VF& v : total) v = set<VF>(0);
  for (int64_t p = 0; p < pieces; p += kChunkPieces, dealt += M * 2 * kChunk) {
    Bytes sums[M][kChunkPieces];
    sum_chunk<M, C>(row, p / kChunkPieces * kChunk, (d - p * kPiece + 1) / 2, dealt, sums, ask);
    const int64_t left = pieces - p;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const auto value = [&](Bytes exact, int32_t begin, float sum, int64_t piece) {
        const VF x = to_float(add_ints(exact, set_ints(begin)));
        return offset ? fma(load<VF>(offset + piece * kLanes), set<VF>(-sum), x) : x;
      };
      if constexpr (GROUP == 1) {
#pragma GCC unroll 4
        for (int q = 0; q < kChunkPieces; ++q) {
          if (q >= left) break;
          const Piece& piece = a[(p + q) * M + m];
          const VF part = scaled<C::scales>(value(sums[m][q], piece.begin, piece.sum, p + q), scale + (p + q) * kLanes);
          total[m] = fma(part, set<VF>(piece.scale), total[m]);
        }
      } else {
        const Piece* const group = a + p * M + m * GROUP;
        VF part;
        if constexpr (SUMMED == 1) {
#pragma GCC unroll 4
          for (int q = 0; q < GROUP; ++q) {
            const VF x = value(sums[m][q], group[q].begin, group[q].sum, p + q);
            const float* const at = scale + (p + q) * kLanes;
            part = q == 0 ? scaled<C::scales>(x, at) : add_scaled<C::scales>(part, x, at);
          }
        } else {
          const Bytes all = add_ints(add_ints(sums[m][0], sums[m][1]), add_ints(sums[m][2], sums[m][3]));
          part = scaled<C::scales>(value(all, group->group_begin, group->group_sum, p), scale + p * kLanes);
        }
        total[m] = fma(part, set<VF>(group->scale), total[m]);
      }
    }
  }
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
#endif
