// Bit-exact scalar conversions between f32 and the 16-bit types, round to nearest even.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

inline uint32_t float_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}

inline float bits_float(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }

inline float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude << 13));  // infinity, NaN
  // Subnormals are exact multiples of 2^-24; the product below is exact for them.
  if (magnitude < 0x0400u) return bits_float(sign | float_bits(float(magnitude) * 0x1p-24f));
  return bits_float(sign | ((magnitude << 13) + (112u << 23)));
}

inline void narrow(float* p, float x) { *p = x; }

inline void narrow(bf16* p, float x) {
  const uint32_t u = float_bits(x);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  p->bits = uint16_t(nan ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline void narrow(f16* p, float x) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520: ties to the even side, which is infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 lets the float adder round at 2^-24
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = uint16_t(sign | half);
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
