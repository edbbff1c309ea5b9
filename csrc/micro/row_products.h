// What the kernel for weights along their output columns multiplies: elements of the reduction one by one, widened, or
// in pairs of bf16, two rows of W joined. And how rows of A are packed for either.
#pragma once

#include "span.h"

#if defined(POLYMOE_LEVEL_AVX512_BF16)
#include "../formats/orders.h"
#endif

namespace polymoe::POLYMOE_LEVEL {
namespace {

template <class T>
struct Widened {
  using Stored = T;
  using V = typename Compute<T>::Vector;
  using Value = typename Compute<T>::Value;
  using X = V;
  static constexpr int step = 1;  // rows of W

  static X factor(const Value* p) { return set<V>(*p); }
  static X load(const Value* p) { return polymoe::POLYMOE_LEVEL::load<V>(p); }
  static void store(Value* p, X x) { polymoe::POLYMOE_LEVEL::store(p, x); }
  static V multiply_add(V acc, X factor, X x) { return fma(factor, x, acc); }

  // Vectors of a step, of which the next row of W lies `stride` bytes after `row`; `both`: the step has that row.
  template <int VECTORS, class Part>
  [[gnu::always_inline]] static void read(const char* row, int64_t, bool, X (&x)[VECTORS], Part part) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v)
      x[v] = polymoe::POLYMOE_LEVEL::read<V>(reinterpret_cast<const T*>(row) + v * V::width, part);
  }

  // A step of a row of A; of `rows` rows side by side, in lanes; and of one row as many steps as a vector has lanes.
  static Value pack_one(const char* p, int64_t, bool) { return widen(*reinterpret_cast<const T*>(p)); }
#if !defined(POLYMOE_LEVEL_PORTABLE)
  static V pack_rows(const char* p, int64_t, bool, int rows) { return load_n<V>(reinterpret_cast<const T*>(p), rows); }
  static V pack_steps(const char* p) { return polymoe::POLYMOE_LEVEL::load<V>(reinterpret_cast<const T*>(p)); }
#endif
};

// On AMX levels the dot product of pairs takes twice as long as two multiply-adds.
#if defined(POLYMOE_LEVEL_AVX512_BF16) && !defined(POLYMOE_LEVEL_AMX)

struct JoinedPairs {
  using Stored = bf16;
  using V = VF;
  using Value = float;  // a pair
  using X = __m512i;
  static constexpr int step = 2;

  static X factor(const Value* p) { return _mm512_castps_si512(_mm512_set1_ps(*p)); }
  static X load(const Value* p) { return _mm512_loadu_si512(p); }
  static void store(Value* p, X x) { _mm512_storeu_si512(p, x); }
  static V multiply_add(V acc, X factor, X x) { return {_mm512_dpbf16_ps(acc.v, __m512bh(factor), __m512bh(x))}; }

  template <int VECTORS, class Part>
  [[gnu::always_inline]] static void read(const char* row, int64_t stride, bool both, X (&x)[VECTORS], Part part) {
    const RowPairs pairs;
    const __mmask32 mask = both ? ~__mmask32(0) : 0;
    if constexpr (VECTORS % 2 == 0) {
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v += 2) {
        const X even = _mm512_loadu_si512(row + v * 32), odd = _mm512_maskz_loadu_epi16(mask, row + stride + v * 32);
        x[v] = pairs.first(even, odd);
        x[v + 1] = pairs.second(even, odd);
      }
    } else {
      const __mmask16 taken = lanes_of(part);
      const __m256i even = _mm256_maskz_loadu_epi16(taken, row);
      const __m256i odd = _mm256_maskz_loadu_epi16(taken & __mmask16(mask), row + stride);
      x[0] = pairs.first(_mm512_castsi256_si512(even), _mm512_castsi256_si512(odd));
    }
  }

  static Value pack_one(const char* p, int64_t stride, bool both) {
    const auto bits = [](const char* at) { return uint32_t(reinterpret_cast<const bf16*>(at)->bits); };
    return bits_float(bits(p) | (both ? bits(p + stride) << 16 : 0));
  }
  static V pack_rows(const char* p, int64_t stride, bool both, int rows) {
    const __mmask8 taken = __mmask8(lanes_below(rows));
    const __m256i even = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(taken, p));
    const __m256i odd = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(both ? taken : __mmask8(0), p + stride));
    return {_mm512_castsi512_ps(_mm512_castsi256_si512(_mm256_or_si256(even, _mm256_slli_epi32(odd, 16))))};
  }
  static V pack_steps(const char* p) { return polymoe::POLYMOE_LEVEL::load<V>(reinterpret_cast<const float*>(p)); }

 private:
  static __mmask16 lanes_of(Full) { return 0xffff; }
  static __mmask16 lanes_of(Tail tail) { return lanes_below(tail.n); }
};
using OfBf16 = JoinedPairs;
#else
using OfBf16 = Widened<bf16>;
#endif

// Elements [0, d) of `rows` <= MAX_ROWS rows of A, step by step, the rows of a step side by side. Strides in bytes.
template <class P, int MAX_ROWS>
void pack(const char* a, int64_t row_stride, int64_t d_stride, int64_t rows, int64_t d, void* out) {
  [[maybe_unused]] constexpr int64_t size = sizeof(typename P::Stored);
  auto* const to = static_cast<typename P::Value*>(out);
  const int64_t steps = (d + P::step - 1) / P::step;
  const auto at = [&](int64_t r, int64_t s) { return a + r * row_stride + s * P::step * d_stride; };
  const auto both = [&](int64_t s) { return s * P::step + 1 < d; };
  int64_t s = 0;
#if !defined(POLYMOE_LEVEL_PORTABLE)
  constexpr int64_t width = VF::width;
  static_assert(MAX_ROWS <= width);
  if (row_stride == size)
    for (; s < steps; ++s) store_n(to + s * rows, P::pack_rows(at(0, s), d_stride, both(s), int(rows)), int(rows));
  else if (d_stride == size)
    for (; (s + width) * P::step <= d; s += width) {
      VF v[width];
      for (int64_t r = 0; r < width; ++r) v[r] = r < rows ? P::pack_steps(at(r, s)) : set<VF>(0);
      transpose(v);
      for (int64_t i = 0; i < width; ++i) store_n(to + (s + i) * rows, v[i], int(rows));
    }
#endif
  for (; s < steps; ++s)
    for (int64_t r = 0; r < rows; ++r) to[s * rows + r] = P::pack_one(at(r, s), d_stride, both(s));
}

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
