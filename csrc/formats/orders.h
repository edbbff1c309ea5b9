// Orders of the 32 elements of a step of bf16: that in which codes are decoded with the fewest instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

namespace polymoe::POLYMOE_LEVEL {
namespace {

// Which element is at a place.
struct InOrder {
  static constexpr int element(int place) { return place; }
};
struct InQuarters {  // every fourth one in a quarter: 16 bits of a row have four codes of four bits
  static constexpr int element(int place) { return place % 8 * 4 + place / 8; }
};
struct InHalves {  // of the first and of the second half in turn
  static constexpr int element(int place) { return place % 2 * 16 + place / 2; }
};
struct InEights {  // elements of a pair are four apart, in eight codes of four bits
  static constexpr int element(int place) { return place / 8 * 8 + place / 2 % 4 + place % 2 * 4; }
};
struct InFours {  // two apart, in four codes of eight bits
  static constexpr int element(int place) { return place / 4 * 4 + place / 2 % 2 + place % 2 * 2; }
};
struct InParity {  // the even ones, then the odd ones
  static constexpr int element(int place) { return place % 16 * 2 + place / 16; }
};

template <class Order>
struct Places {
  alignas(64) uint16_t element[32];
  constexpr Places() : element{} {
    for (int i = 0; i < 32; ++i) element[i] = uint16_t(Order::element(i));
  }
};
template <class Order>
constexpr Places<Order> kPlaces{};

template <class Order>
inline __m512i in_order(__m512i step) {
  if constexpr (std::is_same_v<Order, InOrder>)
    return step;
  else
    return _mm512_permutexvar_epi16(_mm512_load_si512(kPlaces<Order>.element), step);
}

struct PairOrders {
  alignas(64) uint16_t of[2][32];
  constexpr PairOrders() : of{} {
    for (int i = 0; i < 32; ++i)
      for (int half = 0; half < 2; ++half) of[half][i] = uint16_t(half * 16 + i / 2 + i % 2 * 32);
  }
};
constexpr PairOrders kPairOrders;

// Two rows of bf16 become pairs: of the first 16 elements of either, and of the second.
class RowPairs {
 public:
  __m512i first(__m512i even, __m512i odd) const { return _mm512_permutex2var_epi16(even, first_, odd); }
  __m512i second(__m512i even, __m512i odd) const { return _mm512_permutex2var_epi16(even, second_, odd); }

 private:
  __m512i first_ = _mm512_load_si512(kPairOrders.of[0]), second_ = _mm512_load_si512(kPairOrders.of[1]);
};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
