// How a matmul over experts is cut into tasks. Pure functions of sizes; their answers never show in results.
#pragma once

#include <cstdint>

namespace polymoe {

// Rows of A that are packed together, `row_bytes` each: as many as stay in half of the L2 cache while weights stream
// past, but enough that weights are not read again too often, and so few that a hot expert is shared out.
int64_t block_rows(int64_t row_bytes, int64_t l2_bytes);

// Columns of a task, when `blocks` matrices of `width` columns are computed by `threads` threads: a multiple of `unit`
// near `target`, since a wide task repays packing its rows, but less where it takes that to give every thread several
// tasks, so that all finish together (one thread needs one). The last task of a matrix takes what is left.
int64_t task_columns(int64_t width, int64_t unit, int64_t target, int64_t blocks, int threads);

// Columns of a stretch of H whose sums, `column_bytes` a column, stay in half of the L3 cache: a
// multiple of `unit`, at least one, in as few and even stretches as that allows.
int64_t sum_columns(int64_t hidden, int64_t unit, int64_t column_bytes, int64_t l3_bytes);

// Threads, of at most `threads`, for `rows` rows that are multiplied by `elements` weights each: one where waking the
// others would take longer than they save.
int worthwhile_threads(int threads, int64_t rows, int64_t elements);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace polymoe
