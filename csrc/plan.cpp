// A counting sort in ranges of tokens: count per (range, expert), sum up over experts and within an expert over ranges,
// then place. Each range counts on from where the one before it ends, so rows are stable in slot order however many
// ranges there are.
#include "plan.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "gemm.h"
#include "route.h"
#include "threads.h"

namespace polymoe {
namespace {

// A range has at least so many slots, and as many as there are experts: below that a thread costs more than it saves.
constexpr int64_t kMinRangeSlots = 16384;

template <class Id>
struct Ids {
  const Id* data;
  int64_t t_stride, k_stride, K, E;

  // fn(slot, expert) for the tokens [begin, end); expert is -1 where the slot is skipped.
  template <class F>
  void for_each(int64_t begin, int64_t end, F fn) const {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t k = 0; k < K; ++k) {
        const int64_t id = data[t * t_stride + k * k_stride];
        fn(t * K + k, id >= 0 && id < E ? id : -1);
      }
    }
  }

  void count(int64_t begin, int64_t end, int32_t* counts) const {
    for_each(begin, end, [&](int64_t, int64_t expert) {
      if (expert >= 0) ++counts[expert];
    });
  }

  // next[e] is the row that expert e's next slot gets.
  void place(int64_t begin, int64_t end, int32_t* next, int32_t* row_slot, int32_t* slot_row) const {
    for_each(begin, end, [&](int64_t slot, int64_t expert) {
      const int32_t row = expert < 0 ? -1 : next[expert]++;
      slot_row[slot] = row;
      if (row >= 0) row_slot[row] = static_cast<int32_t>(slot);
    });
  }
};

// Without memory of its own: offsets[1 + e] is the count of expert e, then its first row, then its end.
template <class Id>
void build_serially(const Ids<Id>& ids, int64_t T, int32_t* offsets, int32_t* row_slot, int32_t* slot_row) {
  std::fill_n(offsets, ids.E + 1, 0);
  ids.count(0, T, offsets + 1);
  int32_t row = 0;
  for (int64_t e = 1; e <= ids.E; ++e) row += std::exchange(offsets[e], row);
  ids.place(0, T, offsets + 1, row_slot, slot_row);
}

template <class Id>
void build_in_ranges(const Ids<Id>& ids, int64_t T, int64_t ranges, int32_t* offsets, int32_t* row_slot,
                     int32_t* slot_row) {
  std::vector<int32_t> rows(static_cast<size_t>(ranges * ids.E));
  parallel_region(static_cast<int>(ranges), [&](int r) {
    const auto [begin, end] = even_part(T, ranges, r);
    ids.count(begin, end, rows.data() + r * ids.E);
  });
  int32_t row = 0;
  for (int64_t e = 0; e < ids.E; ++e) {
    offsets[e] = row;
    for (int64_t r = 0; r < ranges; ++r) row += std::exchange(rows[static_cast<size_t>(r * ids.E + e)], row);
  }
  offsets[ids.E] = row;
  parallel_region(static_cast<int>(ranges), [&](int r) {
    const auto [begin, end] = even_part(T, ranges, r);
    ids.place(begin, end, rows.data() + r * ids.E, row_slot, slot_row);
  });
}

template <class Id>
void build_rows(const Ids<Id>& ids, int64_t T, int32_t* offsets, int32_t* row_slot, int32_t* slot_row) {
  const int64_t slots = T * ids.K;
  const int64_t ranges = std::min<int64_t>(num_threads(), slots / std::max(kMinRangeSlots, ids.E));
  if (ranges > 1) {
    build_in_ranges(ids, T, ranges, offsets, row_slot, slot_row);
  } else {
    build_serially(ids, T, offsets, row_slot, slot_row);
  }
  std::fill(row_slot + offsets[ids.E], row_slot + slots, -1);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> plan_cpu(const at::Tensor& ids, int64_t num_experts, c10::string_view) {
  check_cpu("plan", "ids", ids);
  check_dtype("plan", "ids", ids, {at::kInt, at::kLong});
  check_shape("plan", "ids", ids, {{"T"}, {"K"}});
  POLYMOE_CHECK(num_experts >= 1, "plan", "num_experts", "at least 1", num_experts);
  POLYMOE_CHECK(ids.numel() <= std::numeric_limits<int32_t>::max(), "plan", "ids", "fewer than 2^31 slots",
                describe(ids));

  const PlanTensors plan = build_plan(ids, num_experts);
  return {plan.offsets, plan.row_slot, plan.slot_row};
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "plan", plan_cpu); }

}  // namespace

PlanTensors build_plan(const at::Tensor& ids, int64_t num_experts) {
  const at::TensorOptions int32 = ids.options().dtype(at::kInt);
  const PlanTensors plan{at::empty({num_experts + 1}, int32), at::empty({ids.numel()}, int32),
                         at::empty(ids.sizes(), int32)};
  build_plan(ids, num_experts, plan.offsets.mutable_data_ptr<int32_t>(), plan.row_slot.mutable_data_ptr<int32_t>(),
             plan.slot_row.mutable_data_ptr<int32_t>());
  return plan;
}

void build_plan(const at::Tensor& ids, int64_t num_experts, int32_t* offsets, int32_t* row_slot, int32_t* slot_row) {
  const auto build = [&](const auto* data) {
    build_rows(Ids<std::remove_const_t<std::remove_pointer_t<decltype(data)>>>{data, ids.stride(0), ids.stride(1),
                                                                               ids.size(1), num_experts},
               ids.size(0), offsets, row_slot, slot_row);
  };
  if (ids.scalar_type() == at::kInt) {
    build(ids.const_data_ptr<int32_t>());
  } else {
    build(ids.const_data_ptr<int64_t>());
  }
}

}  // namespace polymoe
