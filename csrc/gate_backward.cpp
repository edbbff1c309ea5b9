// The gradient of gate on the CPU, token by token: back through scale, normaliser and score of the chosen experts.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "check.h"
#include "route.h"
#include "router.h"

namespace polymoe {
namespace {

constexpr const char* kOp = "gate_backward";

struct Options {
  int64_t T, E, k;
  Scoring scoring;
  Renormalize renormalize;
  double eps, scale;
};

template <class T>
class Backward {
 public:
  Backward(const Options& options, const LevelTable& table, Dtype logits_dtype, const T* bias)
      : o_(options),
        table_(table),
        scores_(options.scoring, options.E, table, logits_dtype, bias),
        value_(size_t(options.k)),
        g_(size_t(options.k)),
        exp_(size_t(options.k)),
        result_(size_t(options.E)) {}

  // The gradient of the logits of a token whose chosen experts are `ids`, from that of their weights; valid until the
  // next call.
  const T* run(const void* logits, const int32_t* ids, const T* grad) {
    std::fill(result_.begin(), result_.end(), T(0));
    if (std::all_of(ids, ids + o_.k, [](int32_t id) { return id < 0; })) return result_.data();
    scores_.read(logits);
    weigh(ids);
    through_normaliser(ids, grad);
    if (o_.scoring == Scoring::softmax)
      through_softmax(ids);
    else
      through_scores(ids);
    for (size_t e = 0; e < result_.size(); ++e)
      if (!std::isfinite(scores_.logit[e])) result_[e] = T(0);  // a bounded infinity has no slope
    return result_.data();
  }

 private:
  // The weights before the normaliser.
  void weigh(const int32_t* ids) {
    for (int64_t i = 0; i < o_.k; ++i) value_[size_t(i)] = ids[i] < 0 ? T(0) : scores_.score[size_t(ids[i])];
    if (o_.scoring == Scoring::softmax_topk) softmax_of_chosen(table_, ids, o_.k, value_.data());
  }

  // From the gradient of the weights to that of `value_`.
  void through_normaliser(const int32_t* ids, const T* grad) {
    T total = 0;
    for (size_t i = 0; i < g_.size(); ++i) {
      g_[i] = ids[i] < 0 ? T(0) : grad[i] * T(o_.scale);
      total += value_[i];
    }
    if (o_.renormalize == Renormalize::none) return;
    const T eps = T(o_.eps);
    const bool bounded = o_.renormalize == Renormalize::max && !(total >= eps);
    const T divisor = bounded ? eps : o_.renormalize == Renormalize::max ? total : total + eps;
    const T share = bounded ? T(0) : inner_product() / divisor;
    for (size_t i = 0; i < g_.size(); ++i)
      if (ids[i] >= 0) g_[i] = (g_[i] - share) / divisor;
  }

  T inner_product() const {
    T inner = 0;
    for (size_t i = 0; i < g_.size(); ++i) inner += g_[i] * value_[i];
    return inner;
  }

  // Every expert has a part in the sum below the fraction.
  void through_softmax(const int32_t* ids) {
    const T inner = inner_product();
    for (size_t i = 0; i < g_.size(); ++i)
      if (ids[i] >= 0) result_[size_t(ids[i])] += g_[i];
    for (size_t e = 0; e < result_.size(); ++e) result_[e] = scores_.score[e] * (result_[e] - inner);
  }

  void through_scores(const int32_t* ids) {
    const T inner = o_.scoring == Scoring::softmax_topk ? inner_product() : T(0);
    // exp(-|z|) of the chosen, by the level's own function
    for (size_t i = 0; i < g_.size(); ++i) exp_[i] = ids[i] < 0 ? T(0) : -std::abs(scores_.logit[size_t(ids[i])]);
    const T zero = 0;
    table_.score->exp_row[int(kRouterDtype<T>)](exp_.data(), &zero, exp_.data(), o_.k);
    for (size_t i = 0; i < g_.size(); ++i)
      if (ids[i] >= 0) result_[size_t(ids[i])] += slope(i, scores_.logit[size_t(ids[i])], inner);
  }

  // g_[i] times the slope of the score of the i-th chosen expert, whose logit is z.
  T slope(size_t i, T z, T inner) const {
    const T e = exp_[i], value = value_[i];
    if (o_.scoring == Scoring::softmax_topk) return value * (g_[i] - inner);
    if (o_.scoring == Scoring::sigmoid) return g_[i] * value * ((z < 0 ? T(1) : e) / (1 + e));
    // (1 / (2 sqrt(softplus))) sigmoid; far below zero the score is exp(z / 2), whose square would lose digits.
    if (z < -40) return g_[i] * (value / 2);
    return g_[i] * (((z < 0 ? e : T(1)) / (1 + e)) / (2 * value));
  }

  const Options& o_;
  const LevelTable& table_;
  Scores<T> scores_;
  std::vector<T> value_, g_, exp_, result_;
};

template <class T>
void run(const Options& o, const at::Tensor& logits, const at::Tensor& grad, const at::Tensor& ids,
         const std::optional<at::Tensor>& bias, const at::Tensor& out) {
  const Dtype dtype = kernel_dtype(logits.scalar_type());
  const LevelTable& table = level_table(dtype);
  const Operand rows = rows_of(logits);
  const std::vector<T> bias_row = padded_bias<T>(bias, o.E);
  const T* const grads = grad.const_data_ptr<T>();
  const int32_t* const chosen = ids.const_data_ptr<int32_t>();
  char* const results = static_cast<char*>(out.mutable_data_ptr());

  constexpr int64_t kSerialLogits = 8192, kTokensAtOnce = 8;
  DynamicTasks queue(o.T);
  const int tasks = o.T * o.E < kSerialLogits ? 1 : int(std::min<int64_t>(num_threads(), o.T));
  parallel_region(tasks, [&](int) {
    Backward<T> backward(o, table, dtype, bias_row.data());
    std::vector<char> copy(size_t(o.E * size_of(dtype)));
    for (Range range = queue.next(kTokensAtOnce); !range.empty(); range = queue.next(kTokensAtOnce))
      for (int64_t t = range.begin; t < range.end; ++t) {
        const char* const row = contiguous_row(rows, t, 0, o.E, size_of(dtype), copy.data());
        const T* const found = backward.run(row, chosen + t * o.k, grads + t * o.k);
        table.rows->store_row[int(dtype)](found, nullptr, results + t * o.E * size_of(dtype), o.E);
      }
  });
}

at::Tensor gate_backward_cpu(const at::Tensor& logits, const at::Tensor& grad, const at::Tensor& ids,
                             c10::string_view scoring, const std::optional<at::Tensor>& bias,
                             c10::string_view renormalize, double eps, double scale, c10::string_view) {
  check_cpu(kOp, "logits", logits);
  check_dtype(kOp, "logits", logits, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  check_shape(kOp, "logits", logits, {{"T"}, {"E"}});
  const int64_t T = logits.size(0), E = logits.size(1);
  const bool wide = logits.scalar_type() == at::kDouble;
  check_cpu(kOp, "ids", ids);
  check_dtype(kOp, "ids", ids, {at::kInt});
  check_shape(kOp, "ids", ids, {{"T", T}, {"K"}});
  const int64_t k = ids.size(1);
  POLYMOE_CHECK(k >= 1 && k <= E, kOp, "ids", c10::str("1 <= K <= E = ", E), k);
  const at::Tensor chosen = ids.contiguous();
  const int32_t* const data = chosen.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < T * k; ++i) POLYMOE_CHECK(data[i] < E, kOp, "ids", c10::str("experts below E=", E), data[i]);
  check_cpu(kOp, "grad", grad);
  check_dtype(kOp, "grad", grad, {wide ? at::kDouble : at::kFloat});
  check_shape(kOp, "grad", grad, {{"T", T}, {"K", k}});
  check_gate_bias(kOp, logits, bias);
  const Options options{T, E, k, parse_scoring(kOp, scoring), parse_renormalize(kOp, renormalize), eps, scale};

  const at::Tensor out = at::empty(logits.sizes(), logits.options());
  if (wide)
    run<double>(options, logits, grad.contiguous(), chosen, bias, out);
  else
    run<float>(options, logits, grad.contiguous(), chosen, bias, out);
  return out;
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "gate_backward", gate_backward_cpu); }

}  // namespace
}  // namespace polymoe
