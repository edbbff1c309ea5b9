// Rows of A rounded to 8-bit integers, in the pieces that kernels of the modes "int8" and "int8_g128" share.
#pragma once

#include <cstdint>

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

}  // namespace polymoe::POLYMOE_LEVEL
