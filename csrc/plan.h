// The plan of a routing: slots sorted by expert, as `polymoe.plan` defines it.
#pragma once

#include <cstdint>

namespace polymoe {

// ids[t, k] lies at ids[t * t_stride + k * k_stride], T*K < 2^31. Writes offsets [E+1], row_slot [T*K], slot_row [T,
// K]. Id is int32_t or int64_t.
template <class Id>
void build_plan(const Id* ids, int64_t t_stride, int64_t k_stride, int64_t T, int64_t K, int64_t E, int32_t* offsets,
                int32_t* row_slot, int32_t* slot_row);

}  // namespace polymoe
