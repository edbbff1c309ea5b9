#include "score.h"

#include "math.h"
#include "span.h"

namespace polymoe::POLYMOE_LEVEL {
namespace {

template <class T>
constexpr T kInfinity = T(__builtin_inf());
template <class T>
constexpr T kLargest = T(__FLT_MAX__);
template <>
constexpr double kLargest<double> = __DBL_MAX__;

// Puts aside what no expert may be selected by: -infinity and NaN. Every other logit is finite afterwards.
template <class T, class V>
inline V usable_or(V fallback, V logit, V bias) {
  const V never = set<V>(-kInfinity<T>);
  const V finite = min(logit, set<V>(kLargest<T>));
  return select(less(never, bias), select(less(never, logit), finite, fallback), fallback);
}

template <Scoring scoring, class V>
inline V score_of(V logit, V max) {
  if constexpr (scoring == Scoring::softmax) return exp(logit - max);
  if constexpr (scoring == Scoring::softmax_topk) return logit;
  if constexpr (scoring == Scoring::sigmoid) return sigmoid(logit);
  if constexpr (scoring == Scoring::sqrtsoftplus) return sqrt_softplus(logit);
}

template <class T, class V>
inline V largest_logit(const T* logits, const T* bias, int64_t n) {
  V most = set<V>(-kLargest<T>);
  for (int64_t i = 0; i < n; i += V::width)
    most = max(most, usable_or<T>(set<V>(-kLargest<T>), load<V>(logits + i), load<V>(bias + i)));
  T lanes[V::width];
  store(lanes, most);
  for (int i = 1; i < V::width; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return set<V>(lanes[0]);
}

template <class T, Scoring scoring>
void score_row(const T* logits, const T* bias, T* score, T* key, int64_t n) {
  using V = typename Compute<T>::Vector;
  const V never = set<V>(-kInfinity<T>), zero = set<V>(0);
  const bool softmax = scoring == Scoring::softmax;
  const V most = softmax ? largest_logit<T, V>(logits, bias, n) : zero;
  // As many partial sums as the widest level has, so that none runs long.
  constexpr int64_t sums = kScorePadding / V::width;
  V total[sums];
  for (V& part : total) part = zero;
  for (int64_t i = 0; i < n; i += V::width) {
    const V logit = usable_or<T>(never, load<V>(logits + i), load<V>(bias + i));
    const V value = select(less(never, logit), score_of<scoring>(logit, most), zero);
    V& part = total[i / V::width % sums];
    part = part + value;
    store(score + i, value);
    if (!softmax) store(key + i, select(less(never, logit), value + load<V>(bias + i), never));
  }
  if (!softmax) return;
  for (int64_t s = 1; s < sums; ++s) total[0] = total[0] + total[s];
  const V divisor = set<V>(sum(total[0]));
  for (int64_t i = 0; i < n; i += V::width) {
    const V logit = usable_or<T>(never, load<V>(logits + i), load<V>(bias + i));
    const V value = select(less(never, logit), load<V>(score + i) / divisor, zero);
    store(score + i, value);
    store(key + i, select(less(never, logit), value + load<V>(bias + i), never));
  }
}

template <class T>
void score_row(Scoring scoring, const void* logits, const void* bias, void* score, void* key, int64_t n) {
  const T *l = static_cast<const T*>(logits), *b = static_cast<const T*>(bias);
  T *s = static_cast<T*>(score), *k = static_cast<T*>(key);
  switch (scoring) {
    case Scoring::softmax:
      return score_row<T, Scoring::softmax>(l, b, s, k, n);
    case Scoring::softmax_topk:
      return score_row<T, Scoring::softmax_topk>(l, b, s, k, n);
    case Scoring::sigmoid:
      return score_row<T, Scoring::sigmoid>(l, b, s, k, n);
    case Scoring::sqrtsoftplus:
      return score_row<T, Scoring::sqrtsoftplus>(l, b, s, k, n);
  }
}

template <class T>
void exp_row(const void* in, const void* max, void* out, int64_t n) {
  using V = typename Compute<T>::Vector;
  const T* from = static_cast<const T*>(in);
  T* to = static_cast<T*>(out);
  const V most = set<V>(*static_cast<const T*>(max));
  for_vectors<V>(n, [&](int64_t i, auto part) { write(to + i, exp(read<V>(from + i, part) - most), part); });
}

}  // namespace

extern const ScoreTable score_table;
#if defined(POLYMOE_LEVEL_PORTABLE)
const ScoreTable score_table = {{score_row<float>, nullptr, nullptr, score_row<double>},
                                {exp_row<float>, nullptr, nullptr, exp_row<double>}};
#else
const ScoreTable score_table = {{score_row<float>, nullptr, nullptr, nullptr},
                                {exp_row<float>, nullptr, nullptr, nullptr}};
#endif

}  // namespace polymoe::POLYMOE_LEVEL
