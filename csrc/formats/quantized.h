// Quantised weights as operands of a product. What multiplies: `Wide`, f32 by f32, or, where x is bf16 and the level
// has the instruction, `Pairs` of bf16 (pairs.h). What is stored: a codec for each family of formats, which turns the
// bytes of a step of a row into such operands, exactly; the scale of a block is left to whoever adds up its products.
//
//   step               elements of the reduction taken at a time
//   pack(p, out)       a step of x, in the order in which `decode` puts the elements of a step
//   decode(p, adjust)  a step of a row, from p; `adjust` makes it relative to its block: how many powers of two a group
//                        of 32 is below the largest of its block (mxfp4, mxfp8), the zero point (int4), else nothing
//
// bf16 holds every code here exactly, and as a normal number, which matters because the dot product reads subnormal
// ones as zero: groups stay kSpread below the largest of the block at most.
#pragma once

#include "../micro/gemm_kernel.h"
#include "../micro/simd.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

inline float from_e8m0(uint8_t code) {
  return bits_float(code == 255 ? 0x7fc00000u : code == 0 ? 1u << 22 : code << 23);
}

// The row of the matrix that column j of C is.
inline int64_t matrix_row(const Weights& w, int64_t j) {
  return j < w.split ? w.first_row + j * w.row_step : w.second_row + (j - w.split) * w.row_step;
}

// A row of the matrix, with its scales and zero points.
struct MatrixRow {
  const char *data, *scale, *zero;  // zero: null where there are no zero points

  MatrixRow(const QuantizedMatrix& m, int64_t n)
      : data(m.data + n * m.data_stride),
        scale(m.scale + (n >> __builtin_ctzll(uint64_t(m.scale_rows))) * m.scale_stride),  // a power of two
        zero(m.zero ? m.zero + n * m.zero_stride : nullptr) {}
};

// Powers of two that the groups of a block may differ by; groups further below count as that far below.
constexpr int kSpread = 110;

constexpr int64_t kGroup = 32;   // elements of a group of the MX formats
constexpr int64_t kBlock = 512;  // elements of a block, where scales allow any
constexpr int64_t kGroups = kBlock / kGroup;

struct Wide {
  using Packed = float;
  static constexpr int step = 2 * VF::width, at_once = 1;  // steps

  struct X {  // elements 0, 2, 4, ... and 1, 3, 5, ...
    VF even, odd;
  };
  static X load(const char* p) {
    const float* const f = reinterpret_cast<const float*>(p);
    return {polymoe::POLYMOE_LEVEL::load<VF>(f), polymoe::POLYMOE_LEVEL::load<VF>(f + VF::width)};
  }
  static void store(char* p, X x) {
    float* const f = reinterpret_cast<float*>(p);
    polymoe::POLYMOE_LEVEL::store(f, x.even);
    polymoe::POLYMOE_LEVEL::store(f + VF::width, x.odd);
  }
  static VF multiply_add(VF acc, X x, X w) { return fma(x.odd, w.odd, fma(x.even, w.even, acc)); }

  template <class T>
  static void pack(const T* p, char* out) {
    float in_order[step];
    for (int i = 0; i < step; i += VF::width)
      polymoe::POLYMOE_LEVEL::store(in_order + i, polymoe::POLYMOE_LEVEL::load<VF>(p + i));
    float* const f = reinterpret_cast<float*>(out);
    for (int i = 0; i < VF::width; ++i) {
      f[i] = in_order[2 * i];
      f[VF::width + i] = in_order[2 * i + 1];
    }
  }
};

// 2^-n, and n.
struct Factors {
  float halved[kSpread + 1], integer[256];
};
constexpr Factors factors() {
  Factors f{};
  float power = 1;
  for (float& x : f.halved) x = power, power *= 0.5f;
  for (int i = 0; i < 256; ++i) f.integer[i] = float(i);
  return f;
}
constexpr Factors kFactors = factors();

// The even and odd bytes of a step of 8-bit codes, or low and high nibbles of a step of 4-bit ones, and what becomes of
// them; each codec says so for one vector of 32-bit integers.
#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)

struct Ints {
  __m512i v;
};
inline Ints bytes_at(const char* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Ints words_at(const char* p) {
  return {_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline VF signed_low_byte(Ints x) { return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x.v, 24), 24))}; }
inline VF signed_high_byte(Ints x) { return {_mm512_cvtepi32_ps(_mm512_srai_epi32(x.v, 8))}; }
inline VF low_nibble(Ints x) { return {_mm512_cvtepi32_ps(_mm512_and_si512(x.v, _mm512_set1_epi32(15)))}; }
inline Ints high_nibble(Ints x) { return {_mm512_srli_epi32(x.v, 4)}; }
inline Ints high_byte(Ints x) { return {_mm512_srli_epi32(x.v, 8)}; }
inline VF e2m1(Ints x) {
  const __m512 values = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, 0, -0.5f, -1, -1.5f, -2, -3, -4, -6);
  return {_mm512_permutexvar_ps(x.v, values)};
}
inline VF e4m3(Ints x) {  // of the low byte
  const __m512i code = _mm512_and_si512(x.v, _mm512_set1_epi32(0x7f));
  const __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(code, 20), _mm512_set1_epi32(120 << 23));
  const __m512i subnormal = _mm512_castps_si512(_mm512_mul_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(0x1p-9f)));
  __m512i magnitude = _mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(code, _mm512_set1_epi32(8)), normal, subnormal);
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(0x7f));
  magnitude = _mm512_mask_mov_epi32(magnitude, nan, _mm512_set1_epi32(0x7fc00000));
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(x.v, _mm512_set1_epi32(0x80)), 24);
  return {_mm512_castsi512_ps(_mm512_or_si512(magnitude, sign))};
}

#elif defined(POLYMOE_LEVEL_AVX2)

struct Ints {
  __m256i v;
};
inline Ints bytes_at(const char* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline Ints words_at(const char* p) {
  return {_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline VF signed_low_byte(Ints x) { return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x.v, 24), 24))}; }
inline VF signed_high_byte(Ints x) { return {_mm256_cvtepi32_ps(_mm256_srai_epi32(x.v, 8))}; }
inline VF low_nibble(Ints x) { return {_mm256_cvtepi32_ps(_mm256_and_si256(x.v, _mm256_set1_epi32(15)))}; }
inline Ints high_nibble(Ints x) { return {_mm256_srli_epi32(x.v, 4)}; }
inline Ints high_byte(Ints x) { return {_mm256_srli_epi32(x.v, 8)}; }
inline VF e2m1(Ints x) {
  const __m256 magnitude = _mm256_permutevar8x32_ps(_mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6), x.v);
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(x.v, _mm256_set1_epi32(8)), 28);
  return {_mm256_or_ps(magnitude, _mm256_castsi256_ps(sign))};
}
inline VF e4m3(Ints x) {  // of the low byte
  const __m256i code = _mm256_and_si256(x.v, _mm256_set1_epi32(0x7f));
  const __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(code, 20), _mm256_set1_epi32(120 << 23));
  const __m256i subnormal = _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(0x1p-9f)));
  const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), code);
  const __m256i nan = _mm256_cmpeq_epi32(code, _mm256_set1_epi32(0x7f));
  __m256i magnitude = _mm256_blendv_epi8(normal, subnormal, small);
  magnitude = _mm256_blendv_epi8(magnitude, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(x.v, _mm256_set1_epi32(0x80)), 24);
  return {_mm256_castsi256_ps(_mm256_or_si256(magnitude, sign))};
}

#else

struct Ints {
  int32_t v[VF::width];
};
template <class F>
inline Ints each(F f) {
  Ints r;
  for (int i = 0; i < VF::width; ++i) r.v[i] = f(i);
  return r;
}
inline int32_t byte_of(const char* p, int i) { return int32_t(uint8_t(p[i])); }
inline Ints bytes_at(const char* p) {
  return each([&](int i) { return byte_of(p, i); });
}
inline Ints words_at(const char* p) {
  return each([&](int i) { return byte_of(p, 2 * i) | byte_of(p, 2 * i + 1) << 8; });
}
inline VF signed_low_byte(Ints x) {
  return map<float, VF::width>([&](int i) { return float(int8_t(uint8_t(x.v[i]))); });
}
inline VF signed_high_byte(Ints x) {
  return map<float, VF::width>([&](int i) { return float(int8_t(uint8_t(x.v[i] >> 8))); });
}
inline VF low_nibble(Ints x) {
  return map<float, VF::width>([&](int i) { return float(x.v[i] & 15); });
}
inline Ints high_nibble(Ints x) {
  return each([&](int i) { return x.v[i] >> 4; });
}
inline Ints high_byte(Ints x) {
  return each([&](int i) { return x.v[i] >> 8; });
}
inline VF e2m1(Ints x) {
  constexpr float values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, 0, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  return map<float, VF::width>([&](int i) { return values[x.v[i] & 15]; });
}
inline VF e4m3(Ints x) {  // of the low byte
  return map<float, VF::width>([&](int i) {
    const uint32_t code = uint32_t(x.v[i]) & 0x7f, sign = (uint32_t(x.v[i]) & 0x80) << 24;
    const uint32_t small = float_bits(float(code) * 0x1p-9f), normal = (code << 20) + (120u << 23);
    return bits_float(sign | (code == 0x7f ? 0x7fc00000u : code < 8 ? small : normal));
  });
}

#endif

// A step in the order of its elements.
inline void store_in_order(float* out, Wide::X x) {
#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  store(out, VF{_mm512_permutex2var_ps(x.even.v, first, x.odd.v)});
  store(out + VF::width, VF{_mm512_permutex2var_ps(x.even.v, second, x.odd.v)});
#elif defined(POLYMOE_LEVEL_AVX2)
  const __m256 low = _mm256_unpacklo_ps(x.even.v, x.odd.v), high = _mm256_unpackhi_ps(x.even.v, x.odd.v);
  store(out, VF{_mm256_permute2f128_ps(low, high, 0x20)});
  store(out + VF::width, VF{_mm256_permute2f128_ps(low, high, 0x31)});
#else
  for (int i = 0; i < VF::width; ++i) {
    out[2 * i] = x.even.v[i];
    out[2 * i + 1] = x.odd.v[i];
  }
#endif
}

// What `adjust` of a row speaks of.
enum class Adjust { none, groups, blocks };

// How a family of formats is stored, whatever multiplies it.
template <int BITS, Adjust ADJUST>
struct Layout {
  static constexpr int bits = BITS;
  static constexpr Adjust adjust = ADJUST;
};
using Mxfp4Layout = Layout<4, Adjust::groups>;
using Mxfp8Layout = Layout<8, Adjust::groups>;
using Fp8Layout = Layout<8, Adjust::none>;
using Int8Layout = Layout<8, Adjust::none>;
using Int4Layout = Layout<4, Adjust::blocks>;

template <class A>
struct Mxfp4;
template <class A>
struct Mxfp8;
template <class A>
struct Fp8;
template <class A>
struct Int8;
template <class A>
struct Int4;

template <>
struct Mxfp4<Wide> : Wide, Mxfp4Layout {
  static X decode(const char* p, uint8_t below) {
    const Ints codes = bytes_at(p);
    const VF factor = set<VF>(kFactors.halved[below]);
    return {e2m1(codes) * factor, e2m1(high_nibble(codes)) * factor};
  }
};

template <>
struct Fp8<Wide> : Wide, Fp8Layout {
  static X decode(const char* p, uint8_t) {
    const Ints codes = words_at(p);
    return {e4m3(codes), e4m3(high_byte(codes))};
  }
};

template <>
struct Mxfp8<Wide> : Wide, Mxfp8Layout {
  static X decode(const char* p, uint8_t below) {
    const X x = Fp8<Wide>::decode(p, 0);
    const VF factor = set<VF>(kFactors.halved[below]);
    return {x.even * factor, x.odd * factor};
  }
};

template <>
struct Int8<Wide> : Wide, Int8Layout {
  static X decode(const char* p, uint8_t) {
    const Ints codes = words_at(p);
    return {signed_low_byte(codes), signed_high_byte(codes)};
  }
};

template <>
struct Int4<Wide> : Wide, Int4Layout {
  static X decode(const char* p, uint8_t zero) {
    const Ints codes = bytes_at(p);
    const VF offset = set<VF>(kFactors.integer[zero]);
    return {low_nibble(codes) - offset, low_nibble(high_nibble(codes)) - offset};
  }
};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
