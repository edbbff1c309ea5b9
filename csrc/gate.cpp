// gate on the CPU. A token is one row of work: scores and selection keys come from the level's kernels, the choice of
// k among E is scalar.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "route.h"
#include "router.h"

namespace polymoe {
namespace {

constexpr const char* kOp = "gate";

struct Options {
  int64_t T, E, k;
  Scoring scoring;
  int64_t n_group, topk_group, group_top;
  Renormalize renormalize;
  double eps, scale;
};

// The experts of larger key first, and of equal keys the smaller index.
template <class T>
auto better(const T* keys) {
  return [keys](int32_t a, int32_t b) { return keys[a] > keys[b] || (keys[a] == keys[b] && a < b); };
}

// Writes the k best of keys[0, n) to best, in order; -1 where fewer than k are above -infinity.
template <class T>
void select_best(const T* keys, int64_t n, int64_t k, std::vector<int32_t>& order, int32_t* best) {
  constexpr int64_t kMaxInsertion = 32;  // more are found sooner by a heap
  std::fill_n(best, k, -1);
  if (k <= kMaxInsertion) {
    T held[kMaxInsertion];
    int64_t count = 0;
    T threshold = kNever<T>;  // of a full list, its last key
    for (int64_t e = 0; e < n; ++e) {
      if (!(keys[e] > threshold)) continue;
      int64_t place = count < k ? count++ : k - 1;
      for (; place > 0 && keys[e] > held[place - 1]; --place) {
        held[place] = held[place - 1];
        best[place] = best[place - 1];
      }
      held[place] = keys[e];
      best[place] = static_cast<int32_t>(e);
      if (count == k) threshold = held[k - 1];
    }
    return;
  }
  order.resize(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + k, order.end(), better(keys));
  for (int64_t i = 0; i < k && keys[order[static_cast<size_t>(i)]] > kNever<T>; ++i)
    best[i] = order[static_cast<size_t>(i)];
}

// Scores, selects and weighs one token at a time; holds the memory to do so.
template <class T>
class Router {
 public:
  Router(const Options& options, const LevelTable& table, Dtype logits_dtype, const T* bias)
      : o_(options), table_(table), scores_(options.scoring, options.E, table, logits_dtype, bias) {}

  void score(const void* logits) { scores_.read(logits); }

  void select(int32_t* ids) {
    if (o_.n_group > 1) keep_best_groups();
    select_best(scores_.key.data(), o_.E, o_.k, order_, ids);
  }

  template <class Id>
  void take_given(const Id* given, int64_t stride, int32_t* ids) {
    for (int64_t i = 0; i < o_.k; ++i) {
      const int64_t id = given[i * stride];
      const bool usable = id >= 0 && id < o_.E && scores_.key[static_cast<size_t>(id)] > kNever<T>;
      ids[i] = usable ? static_cast<int32_t>(id) : -1;
    }
  }

  void weigh(const int32_t* ids, T* weights) {
    for (int64_t i = 0; i < o_.k; ++i) weights[i] = ids[i] < 0 ? T(0) : scores_.score[static_cast<size_t>(ids[i])];
    if (o_.scoring == Scoring::softmax_topk) softmax_of_chosen(table_, ids, o_.k, weights);
    if (o_.renormalize != Renormalize::none) {
      const T total = std::accumulate(weights, weights + o_.k, T(0)), eps = static_cast<T>(o_.eps);
      const T divisor = o_.renormalize == Renormalize::max ? std::max(total, eps) : total + eps;
      for (int64_t i = 0; i < o_.k; ++i) weights[i] /= divisor;
    }
    const T scale = static_cast<T>(o_.scale);
    for (int64_t i = 0; i < o_.k; ++i) weights[i] = ids[i] < 0 ? T(0) : weights[i] * scale;
  }

 private:
  // Takes the experts of all but the best groups out of the selection.
  void keep_best_groups() {
    const int64_t size = o_.E / o_.n_group;
    group_score_.resize(static_cast<size_t>(o_.n_group));
    best_.resize(static_cast<size_t>(o_.group_top));
    for (int64_t g = 0; g < o_.n_group; ++g) {
      const T* const keys = scores_.key.data() + g * size;
      select_best(keys, size, o_.group_top, order_, best_.data());
      T total = best_[0] < 0 ? kNever<T> : T(0);
      for (const int32_t e : best_) total += e < 0 ? T(0) : keys[e];
      group_score_[static_cast<size_t>(g)] = total;
    }
    order_.resize(static_cast<size_t>(o_.n_group));
    std::iota(order_.begin(), order_.end(), 0);
    std::partial_sort(order_.begin(), order_.begin() + o_.topk_group, order_.end(), better(group_score_.data()));
    for (int64_t i = o_.topk_group; i < o_.n_group; ++i)
      std::fill_n(scores_.key.data() + order_[static_cast<size_t>(i)] * size, size, kNever<T>);
  }

  const Options& o_;
  const LevelTable& table_;
  Scores<T> scores_;
  std::vector<T> group_score_;
  std::vector<int32_t> order_, best_;
};

void check_groups(const Options& o) {
  POLYMOE_CHECK(o.n_group >= 1 && o.E % o.n_group == 0, kOp, "n_group", c10::str("a divisor of E = ", o.E), o.n_group);
  POLYMOE_CHECK(o.topk_group >= 1 && o.topk_group <= o.n_group, kOp, "topk_group",
                c10::str("1 <= topk_group <= n_group = ", o.n_group), o.topk_group);
  if (o.n_group == 1) return;  // group_top, whose default is more than one expert, has no groups to score
  const int64_t size = o.E / o.n_group;
  POLYMOE_CHECK(o.group_top >= 1 && o.group_top <= size, kOp, "group_top",
                c10::str("1 <= group_top <= E / n_group = ", size), o.group_top);
  POLYMOE_CHECK(o.k <= o.topk_group * size, kOp, "k",
                c10::str("at most the ", o.topk_group * size, " experts of the topk_group groups kept"), o.k);
}

void check_tensors(const Options& o, const at::Tensor& logits, const std::optional<at::Tensor>& bias,
                   const std::optional<at::Tensor>& indices, const std::optional<at::Tensor>& token_mask) {
  check_gate_bias(kOp, logits, bias);
  if (indices) {
    check_cpu(kOp, "indices", *indices);
    check_dtype(kOp, "indices", *indices, {at::kInt, at::kLong});
    check_shape(kOp, "indices", *indices, {{"T", o.T}, {"K", o.k}});
    POLYMOE_CHECK(o.n_group == 1, kOp, "indices", "nothing where n_group > 1", describe(*indices));
    POLYMOE_CHECK(!bias, kOp, "indices", "nothing where a bias is given", describe(*indices));
  }
  if (token_mask) {
    check_cpu(kOp, "token_mask", *token_mask);
    check_dtype(kOp, "token_mask", *token_mask, {at::kBool});
    check_shape(kOp, "token_mask", *token_mask, {{"T", o.T}});
  }
}

template <class T>
void route(const Options& o, const at::Tensor& logits, const std::optional<at::Tensor>& bias,
           const std::optional<at::Tensor>& indices, const std::optional<at::Tensor>& token_mask, T* weights,
           int32_t* ids) {
  const Dtype dtype = kernel_dtype(logits.scalar_type());
  const LevelTable& table = level_table(dtype);
  const Operand rows = rows_of(logits);
  const std::vector<T> bias_row = padded_bias<T>(bias, o.E);

  const auto one = [&](Router<T>& router, int64_t t, char* copy) {
    int32_t* const row_ids = ids + t * o.k;
    T* const row_weights = weights + t * o.k;
    if (token_mask && !token_mask->const_data_ptr<bool>()[t * token_mask->stride(0)]) {
      std::fill_n(row_ids, o.k, -1);
      std::fill_n(row_weights, o.k, T(0));
      return;
    }
    router.score(contiguous_row(rows, t, 0, o.E, size_of(dtype), copy));
    if (!indices) {
      router.select(row_ids);
    } else if (indices->scalar_type() == at::kInt) {
      router.take_given(indices->const_data_ptr<int32_t>() + t * indices->stride(0), indices->stride(1), row_ids);
    } else {
      router.take_given(indices->const_data_ptr<int64_t>() + t * indices->stride(0), indices->stride(1), row_ids);
    }
    router.weigh(row_ids, row_weights);
  };

  constexpr int64_t kSerialLogits = 8192, kTokensAtOnce = 8;
  DynamicTasks queue(o.T);
  const int tasks = o.T * o.E < kSerialLogits ? 1 : static_cast<int>(std::min<int64_t>(num_threads(), o.T));
  parallel_region(tasks, [&](int) {
    Router<T> router(o, table, dtype, bias_row.data());
    std::vector<char> copy(static_cast<size_t>(o.E * size_of(dtype)));
    for (Range range = queue.next(kTokensAtOnce); !range.empty(); range = queue.next(kTokensAtOnce))
      for (int64_t t = range.begin; t < range.end; ++t) one(router, t, copy.data());
  });
}

std::tuple<at::Tensor, at::Tensor> gate_cpu(const at::Tensor& logits, int64_t k, c10::string_view scoring,
                                            const std::optional<at::Tensor>& bias, int64_t n_group, int64_t topk_group,
                                            int64_t group_top, c10::string_view renormalize, double eps, double scale,
                                            const std::optional<at::Tensor>& indices,
                                            const std::optional<at::Tensor>& token_mask, c10::string_view) {
  check_cpu(kOp, "logits", logits);
  check_dtype(kOp, "logits", logits, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  check_shape(kOp, "logits", logits, {{"T"}, {"E"}});
  const int64_t T = logits.size(0), E = logits.size(1);
  POLYMOE_CHECK(k >= 1 && k <= E, kOp, "k", c10::str("1 <= k <= E = ", E), k);
  const Options options{T,       E,          k,         parse_scoring(kOp, scoring),
                        n_group, topk_group, group_top, parse_renormalize(kOp, renormalize),
                        eps,     scale};
  check_groups(options);
  check_tensors(options, logits, bias, indices, token_mask);

  const bool wide = logits.scalar_type() == at::kDouble;
  const at::Tensor weights = at::empty({T, k}, logits.options().dtype(wide ? at::kDouble : at::kFloat));
  const at::Tensor ids = at::empty({T, k}, logits.options().dtype(at::kInt));
  int32_t* const id_data = ids.mutable_data_ptr<int32_t>();
  if (wide) {
    route(options, logits, bias, indices, token_mask, weights.mutable_data_ptr<double>(), id_data);
  } else {
    route(options, logits, bias, indices, token_mask, weights.mutable_data_ptr<float>(), id_data);
  }
  return {weights, ids};
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "gate", gate_cpu); }

}  // namespace
}  // namespace polymoe
