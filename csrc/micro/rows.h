// Work on single rows, of one ISA level: conversion, scaling, and the weighted sum of rows.
//
// "f32" below means f64 where the row's type is f64; entries for f64 exist at the portable level alone, and no entry
// mixes f64 with another type.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtype.h"

namespace polymoe {

struct RowTable {
  // out[i] = in[i] as f32. By the type of `in`.
  void (*widen_row[kDtypes])(const void* in, void* out, int64_t n);

  // out[i] = acc[i] + bias[i], both f32, rounded once; `bias` may be null. By the type of `out`.
  void (*store_row[kDtypes])(const void* acc, const void* bias, void* out, int64_t n);

  // The same for rows without a bias, `acc_stride` and `out_stride` bytes apart, or zeros where `acc` is null, written
  // past the caches: for results much larger than these. The thread fences before it says that it is done.
  void (*stream_rows[kDtypes])(const void* acc, int64_t acc_stride, void* out, int64_t out_stride, int64_t rows,
                               int64_t n);

  // out[i] = in[i] * weight[0], an f32 product rounded once; `weight` is f32. By the type of `in` and `out`.
  void (*scale_row[kDtypes])(const void* in, const void* weight, void* out, int64_t n);

  // out[i] = sum over r of weights[r] * rows[r][i], in f32 by multiply-add from zero in the order of r, rounded once.
  // `weights` is f32, or null for a plain sum. By the type of the rows, then of `out`.
  void (*combine_row[kDtypes][kDtypes])(const void* const* rows, const void* weights, int count, void* out, int64_t n);

  // out[0] = sum over i of a[i] * b[i], f32, in an order that depends on n alone. By the types of a and b.
  void (*dot_row[kDtypes][kDtypes])(const void* a, const void* b, void* out, int64_t n);
};

}  // namespace polymoe
