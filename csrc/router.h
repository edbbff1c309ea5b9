// What gate and its gradient share: the options, and the scores of one token.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "row_op.h"

namespace polymoe {

enum class Renormalize { none, max, add };

// Raise ValueError for an unknown name.
Scoring parse_scoring(const char* op, c10::string_view name);
Renormalize parse_renormalize(const char* op, c10::string_view name);

void check_gate_bias(const char* op, const at::Tensor& logits, const std::optional<at::Tensor>& bias);

// Of a key: an expert that is not to be chosen.
template <class T>
constexpr T kNever = -std::numeric_limits<T>::infinity();

template <class T>
constexpr Dtype kRouterDtype = std::is_same_v<T, double> ? Dtype::f64 : Dtype::f32;

// Experts with those that only fill up the last vector.
inline int64_t padded_experts(int64_t experts) { return ceil_div(experts, kScorePadding) * kScorePadding; }

// The bias as Scores reads it; zeros where there is none.
template <class T>
std::vector<T> padded_bias(const std::optional<at::Tensor>& bias, int64_t experts) {
  std::vector<T> row(size_t(padded_experts(experts)));
  if (bias) {
    const at::Tensor wide = bias->to(c10::CppTypeToScalarType<T>::value).contiguous();
    std::copy_n(wide.const_data_ptr<T>(), experts, row.begin());
  }
  return row;
}

// The logits of a token, widened, with their scores and the keys experts are chosen by (see ScoreTable).
template <class T>
struct Scores {
  Scores(Scoring scoring, int64_t experts, const LevelTable& table, Dtype logits_dtype, const T* bias)
      : logit(size_t(padded_experts(experts)), std::numeric_limits<T>::quiet_NaN()),
        score(logit.size()),
        key(logit.size()),
        scoring_(scoring),
        experts_(experts),
        bias_(bias),
        widen_row_(table.rows->widen_row[int(logits_dtype)]),
        score_row_(table.score->score_row[int(kRouterDtype<T>)]) {}

  void read(const void* logits) {
    widen_row_(logits, logit.data(), experts_);
    score_row_(scoring_, logit.data(), bias_, score.data(), key.data(), int64_t(logit.size()));
  }

  std::vector<T> logit, score, key;

 private:
  const Scoring scoring_;
  const int64_t experts_;
  const T* const bias_;
  void (*const widen_row_)(const void*, void*, int64_t);
  void (*const score_row_)(Scoring, const void*, const void*, void*, void*, int64_t);
};

// Softmax over the chosen experts (id >= 0) of the logits that values[0, k) holds, in place; 0 for the others.
template <class T>
void softmax_of_chosen(const LevelTable& table, const int32_t* ids, int64_t k, T* values) {
  T most = std::numeric_limits<T>::lowest();
  for (int64_t i = 0; i < k; ++i)
    if (ids[i] >= 0) most = std::max(most, values[i]);
  table.score->exp_row[int(kRouterDtype<T>)](values, &most, values, k);
  T total = 0;
  for (int64_t i = 0; i < k; ++i)
    if (ids[i] >= 0) total += values[i];
  for (int64_t i = 0; i < k; ++i) values[i] = ids[i] < 0 ? T(0) : values[i] / total;
}

}  // namespace polymoe
