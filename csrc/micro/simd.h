// One vector of floats, `VF`, with the same operations at every ISA level, so that a kernel is written once.
//
// Everything here has internal linkage: a micro source is compiled once per level, and a function shared by two
// objects could be merged by the linker into the one that the machine cannot run.
//
//   VF::width                    lanes
//   load(p), load_n(p, n)        p to float, bf16 or f16 (widened); load_n reads n < width elements, other lanes 0
//   store(p, v), store_n(...)    rounds to nearest even for bf16 and f16
//   stream(p, v)                 store past the caches, p aligned to the stored vector; ordinary at the portable level
//   + - * /, fma(a, b, c)        fma is fused where the level has it; the portable level rounds twice
//   product_error(a, b, a * b)   a * b less its rounded value, exact barring underflow
//   min(a, b), max(a, b)         b when either is NaN: min(limit, x) lets a NaN in x through
//   less(a, b) -> Mask, select(mask, a, b)
//   round_even, sqrt, abs, scale_pow2(v, n): v * 2^n for integer-valued n in [-252, 252]; a NaN stays
//   sum(v)                       over lanes, in one fixed tree; sum4 gives the same bits for four vectors at once
#pragma once

#include "../dtype.h"

#if defined(POLYMOE_LEVEL_AVX512) || defined(POLYMOE_LEVEL_AVX512_BF16)
#include "simd_avx512.h"
#elif defined(POLYMOE_LEVEL_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif
