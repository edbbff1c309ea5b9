// Rows of A rounded to 8-bit integers, in the pieces that kernels of the modes "int8" and "int8_g128" share.
#pragma once

#include "simd.h"

namespace polymoe::POLYMOE_LEVEL {

constexpr int64_t kPiece = 32;

// A piece of a row of A.
struct Piece {
  int8_t code[kPiece];  // of 4-bit weights in every eight the even elements first
  float scale;
  // Of the codes, and what the integer sum begins with, that is -offset times it: of this piece, and of its group.
  float sum, group_sum;
  int32_t begin, group_begin;
  char unused[12];  // a cache line in all
};
static_assert(sizeof(Piece) == 64);

namespace {

// Bytes 0, 2, 4, 6, then 1, 3, 5, 7.
inline uint64_t evens_first(uint64_t x) {
  const auto evens = [](uint64_t v) {
    v &= 0x00ff00ff00ff00ffu;
    v = (v | v >> 8) & 0x0000ffff0000ffffu;
    return (v | v >> 16) & 0xffffffffu;
  };
  return evens(x) | evens(x >> 8) << 32;
}

// Scale and codes of a group: see polymoe/reference/_quantized.py.
template <class C, int GROUP>
void round_group(const float* x, Piece* out) {
  constexpr int count = GROUP * int(kPiece);
  uint32_t largest_bits = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t bits = float_bits(x[i]) & 0x7fffffffu;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  const bool finite = largest_bits < 0x7f800000u;
  const float largest = bits_float(largest_bits), usable = !finite ? 1 : largest > 0x1p-119f ? largest : 0x1p-119f;
  const float factor = finite ? 127 / usable : 0;
  int32_t group_sum = 0;
  for (int p = 0; p < GROUP; ++p, x += kPiece) {
    int32_t codes[kPiece], sum = 0;
    for (int i = 0; i < kPiece; ++i) {
      // Adding 1.5 * 2^23 rounds to an integer, ties to even, which are then the low bits.
      codes[i] = int32_t(float_bits((finite ? x[i] * factor : 0) + 0x1.8p23f) - float_bits(0x1.8p23f));
      sum += codes[i];
    }
    for (int i = 0; i < kPiece; ++i) out[p].code[i] = int8_t(codes[i]);
    for (int i = 0; i < kPiece && C::bits == 4; i += 8) {
      uint64_t eight;
      __builtin_memcpy(&eight, out[p].code + i, 8);
      eight = evens_first(eight);
      __builtin_memcpy(out[p].code + i, &eight, 8);
    }
    out[p].scale = finite ? usable / 127 : bits_float(0x7fc00000u);
    out[p].sum = float(sum);
    out[p].begin = -C::offset * sum;
    group_sum += sum;
  }
  for (int p = 0; p < GROUP; ++p) {
    out[p].group_sum = float(group_sum);
    out[p].group_begin = -C::offset * group_sum;
  }
}

template <class C, int GROUP, class T>
void pack_rows(const char* const* rows, int64_t count, int64_t d, char* out) {
  constexpr int64_t group = GROUP * kPiece;
  Piece* const pieces = reinterpret_cast<Piece*>(out);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t begin = 0; begin < d; begin += group) {
      const T* const from = reinterpret_cast<const T*>(rows[r]) + begin;
      float x[group] = {};
      if (begin + group <= d)
        for (int i = 0; i < group; i += VF::width) store(x + i, load<VF>(from + i));
      else
        for (int i = 0; i < d - begin; ++i) x[i] = widen(from[i]);
      round_group<C, GROUP>(x, pieces + (begin / group * count + r) * GROUP);
    }
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
