// Errors of the ops. Every message reads "polymoe.<op>: <argument>: expected <accepted>, got <what came>" and
// becomes a ValueError in Python. Check all arguments before writing anything.
//
//   POLYMOE_CHECK(k >= 1, "gate", "k", "at least 1", k);
//   check_shape("plan", "ids", ids, {{"T"}, {"K", k}});
//   check_dtype("plan", "ids", ids, {at::kInt, at::kLong});
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

// `expected` and each part of what came are anything c10::str can print; they are evaluated only on failure.
#define POLYMOE_CHECK(condition, op, argument, expected, ...) \
  TORCH_CHECK_VALUE(condition, "polymoe.", op, ": ", argument, ": expected ", expected, ", got ", __VA_ARGS__)

namespace polymoe {

inline std::string dtype_name(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

// "float32 [3, 4]", with " on <device>" for a tensor that is not on the CPU.
inline std::string describe(const at::Tensor& tensor) {
  std::string text = dtype_name(tensor.scalar_type()) + " [";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  text += "]";
  if (!tensor.device().is_cpu()) text += " on " + tensor.device().str();
  return text;
}

// One dimension of an expected shape: its letter, and its size where it is known.
struct Dim {
  const char* letter;
  int64_t size = -1;
};

inline bool has_shape(const at::Tensor& tensor, std::initializer_list<Dim> dims) {
  if (tensor.dim() != static_cast<int64_t>(dims.size())) return false;
  int64_t d = 0;
  for (const Dim& dim : dims) {
    if (dim.size >= 0 && tensor.size(d) != dim.size) return false;
    ++d;
  }
  return true;
}

// "a tensor [T, K=6]"
inline std::string describe(std::initializer_list<Dim> dims) {
  std::string text = "a tensor [";
  const char* separator = "";
  for (const Dim& dim : dims) {
    text += separator + std::string(dim.letter);
    if (dim.size >= 0) text += "=" + std::to_string(dim.size);
    separator = ", ";
  }
  return text + "]";
}

inline void check_shape(const char* op, const char* argument, const at::Tensor& tensor,
                        std::initializer_list<Dim> dims) {
  POLYMOE_CHECK(has_shape(tensor, dims), op, argument, describe(dims), describe(tensor));
}

// "float32, bfloat16 or float16"
inline std::string describe(std::initializer_list<at::ScalarType> dtypes) {
  std::vector<at::ScalarType> once;  // an argument's own dtype may be listed twice
  for (at::ScalarType dtype : dtypes)
    if (std::find(once.begin(), once.end(), dtype) == once.end()) once.push_back(dtype);
  std::string text;
  for (size_t i = 0; i < once.size(); ++i)
    text += (i == 0 ? "" : i + 1 < once.size() ? ", " : " or ") + dtype_name(once[i]);
  return text;
}

inline void check_dtype(const char* op, const char* argument, const at::Tensor& tensor,
                        std::initializer_list<at::ScalarType> accepted) {
  bool found = false;
  for (at::ScalarType dtype : accepted) found |= tensor.scalar_type() == dtype;
  POLYMOE_CHECK(found, op, argument, describe(accepted), describe(tensor));
}

inline void check_contiguous(const char* op, const char* argument, const at::Tensor& tensor) {
  POLYMOE_CHECK(tensor.is_contiguous(), op, argument, "a contiguous tensor", describe(tensor), " with strides ",
                tensor.strides());
}

// A CPU kernel also runs when only some of its tensors are on the CPU.
inline void check_cpu(const char* op, const char* argument, const at::Tensor& tensor) {
  POLYMOE_CHECK(tensor.device().is_cpu(), op, argument, "a CPU tensor", describe(tensor));
}

}  // namespace polymoe
