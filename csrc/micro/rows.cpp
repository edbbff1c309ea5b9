#include "rows.h"

#include "span.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

template <class In>
void widen_row(const void* in, void* out, int64_t n) {
  using V = typename Compute<In>::Vector;
  const In* from = static_cast<const In*>(in);
  auto* to = static_cast<typename Compute<In>::Value*>(out);
  for_vectors<V>(n, [&](int64_t i, auto part) { write(to + i, read<V>(from + i, part), part); });
}

template <class Out>
void store_row(const void* acc, const void* bias, void* out, int64_t n) {
  using V = typename Compute<Out>::Vector;
  using Value = typename Compute<Out>::Value;
  const Value* from = static_cast<const Value*>(acc);
  const Value* add = static_cast<const Value*>(bias);
  Out* to = static_cast<Out*>(out);
  if (add == nullptr) {
    for_vectors<V>(n, [&](int64_t i, auto part) { write(to + i, read<V>(from + i, part), part); });
  } else {
    for_vectors<V>(
        n, [&](int64_t i, auto part) { write(to + i, read<V>(from + i, part) + read<V>(add + i, part), part); });
  }
}

template <class Out>
void stream_rows(const void* acc, int64_t acc_stride, void* out, int64_t out_stride, int64_t rows, int64_t n) {
  using V = typename Compute<Out>::Vector;
  using Value = typename Compute<Out>::Value;
  constexpr uintptr_t bytes = V::width * sizeof(Out);
  for (int64_t r = 0; r < rows; ++r) {
    const auto* from = acc ? reinterpret_cast<const Value*>(static_cast<const char*>(acc) + r * acc_stride) : nullptr;
    Out* const to = reinterpret_cast<Out*>(static_cast<char*>(out) + r * out_stride);
    const auto sums = [&](int64_t i, auto part) { return from ? read<V>(from + i, part) : set<V>(0); };
    int64_t i = 0;
    if (reinterpret_cast<uintptr_t>(to) % bytes == 0) {
      for (; i + 2 * V::width <= n; i += 2 * V::width) stream(to + i, sums(i, Full{}), sums(i + V::width, Full{}));
      for (; i + V::width <= n; i += V::width) stream(to + i, sums(i, Full{}));
    }
    for_vectors<V>(n - i, [&](int64_t j, auto part) { write(to + i + j, sums(i + j, part), part); });
  }
}

template <class T>
void scale_row(const void* in, const void* weight, void* out, int64_t n) {
  using V = typename Compute<T>::Vector;
  const T* from = static_cast<const T*>(in);
  T* to = static_cast<T*>(out);
  const V w = set<V>(*static_cast<const typename Compute<T>::Value*>(weight));
  for_vectors<V>(n, [&](int64_t i, auto part) { write(to + i, read<V>(from + i, part) * w, part); });
}

template <class In, class Out>
void combine_row(const void* const* rows, const void* weights, int count, void* out, int64_t n) {
  using V = typename Compute<In>::Vector;
  using Value = typename Compute<In>::Value;
  const Value* w = static_cast<const Value*>(weights);
  Out* to = static_cast<Out*>(out);
  for_vectors<V>(n, [&](int64_t i, auto part) {
    V acc = set<V>(0);
    for (int r = 0; r < count; ++r) {
      const V x = read<V>(static_cast<const In*>(rows[r]) + i, part);
      acc = w == nullptr ? acc + x : fma(set<V>(w[r]), x, acc);
    }
    write(to + i, acc, part);
  });
}

// Fresh lanes for every block, so that none sums many terms.
template <class A, class B>
void dot_row(const void* a, const void* b, void* out, int64_t n) {
  using V = typename Compute<A>::Vector;
  using Value = typename Compute<A>::Value;
  constexpr int64_t kBlock = 128 * V::width;
  Value total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const A* const x = static_cast<const A*>(a) + begin;
    const B* const y = static_cast<const B*>(b) + begin;
    V acc = set<V>(0);
    for_vectors<V>(n - begin < kBlock ? n - begin : kBlock,
                   [&](int64_t i, auto part) { acc = fma(read<V>(x + i, part), read<V>(y + i, part), acc); });
    total += sum(acc);
  }
  *static_cast<Value*>(out) = total;
}

}  // namespace

#if defined(POLYMOE_LEVEL_PORTABLE)
#define POLYMOE_F64(function) function
#else
#define POLYMOE_F64(function) nullptr
#endif

extern const RowTable row_table;
const RowTable row_table = {
    {widen_row<float>, widen_row<bf16>, widen_row<f16>, POLYMOE_F64(widen_row<double>)},
    {store_row<float>, store_row<bf16>, store_row<f16>, POLYMOE_F64(store_row<double>)},
    {stream_rows<float>, stream_rows<bf16>, stream_rows<f16>, POLYMOE_F64(stream_rows<double>)},
    {scale_row<float>, scale_row<bf16>, scale_row<f16>, POLYMOE_F64(scale_row<double>)},
    {
        {combine_row<float, float>, combine_row<float, bf16>, combine_row<float, f16>, nullptr},
        {combine_row<bf16, float>, combine_row<bf16, bf16>, combine_row<bf16, f16>, nullptr},
        {combine_row<f16, float>, combine_row<f16, bf16>, combine_row<f16, f16>, nullptr},
        {nullptr, nullptr, nullptr, POLYMOE_F64((combine_row<double, double>))},
    },
    {
        {dot_row<float, float>, dot_row<float, bf16>, dot_row<float, f16>, nullptr},
        {dot_row<bf16, float>, dot_row<bf16, bf16>, dot_row<bf16, f16>, nullptr},
        {dot_row<f16, float>, dot_row<f16, bf16>, dot_row<f16, f16>, nullptr},
        {nullptr, nullptr, nullptr, POLYMOE_F64((dot_row<double, double>))},
    },
};

}  // namespace polymoe::POLYMOE_LEVEL
