// pack_weight_ and unpack_weight_: plain weights to packed ones and back, in place, one expert's memory aside.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "check.h"
#include "gemm.h"
#include "route.h"
#include "threads.h"

namespace polymoe {
namespace {

// One matrix [rows, d] inside a plain weight.
struct Plain {
  Operand at;
  int64_t rows, d;
};

// Visits panel `index` of a packed matrix element by element: f(element of the plain matrix, element of the panel).
template <class T, class F>
void for_panel(const Plain& plain, int64_t step, int64_t index, T* packed, F&& f) {
  const int64_t first = index * kPanel, columns = std::min(kPanel, plain.rows - first), whole = plain.d / step;
  T* out = packed + first * plain.d;
  const auto element = [&](int64_t column, int64_t d) {
    return const_cast<char*>(plain.at.data) + (first + column) * plain.at.row_stride + d * plain.at.d_stride;
  };
  for (int64_t s = 0; s < whole; ++s)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t k = 0; k < step; ++k) f(*reinterpret_cast<T*>(element(c, s * step + k)), *out++);
  for (int64_t d = whole * step; d < plain.d; ++d)
    for (int64_t c = 0; c < columns; ++c) f(*reinterpret_cast<T*>(element(c, d)), *out++);
}

template <class T>
void convert(const Plain& copy, const Plain& weight, int64_t step, char* packed, bool pack) {
  DynamicTasks panels(ceil_div(weight.rows, kPanel));
  const int64_t count = ceil_div(weight.rows, kPanel);
  parallel_region(int(std::min<int64_t>(num_threads(), count)), [&](int) {
    for (Range r = panels.next(); !r.empty(); r = panels.next()) {
      T* const data = reinterpret_cast<T*>(packed);
      if (pack)
        for_panel<T>(copy, step, r.begin, data, [](T& from, T& to) { to = from; });
      else
        for_panel<T>(weight, step, r.begin, data, [](T& to, T& from) { to = from; });
    }
  });
}

// `pack`: copy an expert aside as it is, then write its panels in place. Otherwise the copy holds the panels.
void convert_all(const char* op, const at::Tensor& weight, bool gate_up, bool interleaved, bool transposed, bool pack) {
  check_cpu(op, "weight", weight);
  check_dtype(op, "weight", weight, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  check_shape(op, "weight", weight, {{"E"}, {transposed ? "D" : "N"}, {transposed ? "N" : "D"}});
  check_contiguous(op, "weight", weight);
  const int64_t n = weight.size(transposed ? 2 : 1), d = weight.size(transposed ? 1 : 2), size = weight.element_size();
  POLYMOE_CHECK(!gate_up || n % 2 == 0, op, "weight", "an even N with gate_up", describe(weight));
  POLYMOE_CHECK(!interleaved || gate_up, op, "interleaved", "False without gate_up", "True");

  const int64_t halves = gate_up ? 2 : 1, rows = n / halves, expert_bytes = n * d * size;
  const int64_t step = weight.scalar_type() == at::kBFloat16 ? 2 : 1;
  const int64_t row_stride = (transposed ? 1 : d) * size, d_stride = (transposed ? n : 1) * size;
  const std::unique_ptr<char[]> aside(new char[size_t(expert_bytes)]);
  char* const data = static_cast<char*>(weight.mutable_data_ptr());
  for (int64_t e = 0; e < weight.size(0); ++e) {
    char* const expert = data + e * expert_bytes;
    std::memcpy(aside.get(), expert, size_t(expert_bytes));
    for (int64_t half = 0; half < halves; ++half) {
      const int64_t begin = half * (interleaved ? 1 : rows) * row_stride;
      const auto matrix = [&](char* base) {
        return Plain{{base + begin, row_stride * (interleaved ? 2 : 1), d_stride}, rows, d};
      };
      char* const packed = (pack ? expert : aside.get()) + half * rows * d * size;
      const auto run = size == 2 ? convert<uint16_t> : size == 4 ? convert<uint32_t> : convert<uint64_t>;
      run(matrix(aside.get()), matrix(expert), step, packed, pack);
    }
  }
}

void pack_weight_cpu(at::Tensor& weight, bool gate_up, bool interleaved, bool transposed) {
  convert_all("pack_weight_", weight, gate_up, interleaved, transposed, true);
}

void unpack_weight_cpu(at::Tensor& weight, bool gate_up, bool interleaved, bool transposed) {
  convert_all("unpack_weight_", weight, gate_up, interleaved, transposed, false);
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) {
  m.impl("pack_weight_", TORCH_FN(pack_weight_cpu));
  m.impl("unpack_weight_", TORCH_FN(unpack_weight_cpu));
}

}  // namespace
}  // namespace polymoe
