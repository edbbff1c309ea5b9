// Element types as the kernels see them: plain bits, free of ATen so that ISA-level sources may include this.
#pragma once

#include <cstdint>

namespace polymoe {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Dtype : int { f32, bf16, f16, f64 };
constexpr int kDtypes = 4;

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

}  // namespace polymoe
