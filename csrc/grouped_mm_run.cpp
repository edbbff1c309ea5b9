// grouped_mm on the CPU, the run: every case is a list of ordinary matmuls over strided operands.
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <utility>
#include <vector>

#include "gemm.h"
#include "grouped_mm.h"
#include "isa.h"
#include "threads.h"

namespace polymoe {
namespace {

// out[m, n] = a[m, d] * w[n, d] + bias[n]; columns of out are contiguous.
struct Problem {
  Operand a, w;
  int64_t m, n, d;
  char* out;
  int64_t out_stride;        // bytes between rows
  const char* bias;          // null: none
  QuantizedMatrix matrix{};  // of quantised weights, instead of w
};

struct Types {
  Dtype in, out, bias;
  WeightFormat format = WeightFormat::plain;
  bool accumulate = false;
  bool streams = false;        // the result is too large for the caches
  bool copies_panels = false;  // plain weights along the columns of the result, into the layout of packed ones

  WeightFormat multiplied() const { return copies_panels ? WeightFormat::packed : format; }
};

// A part of the rows of a problem, which is multiplied `columns` columns at a time.
struct Block {
  const Problem* problem;
  int64_t begin, rows, columns;
};

const char* widened_bias(const Problem& p, int64_t column, int64_t columns, const Types& types,
                         const LevelTable& table) {
  if (!p.bias) return nullptr;
  char* const wide = scratch(Scratch::bias, columns * accumulator_size(types.in));
  table.rows->widen_row[int(types.bias)](p.bias + column * size_of(types.bias), wide, columns);
  return wide;
}

// Whether a block's results are zeros that need no sums.
bool is_empty(const Block& block, const Types& types) {
  return block.problem->d == 0 && types.streams && !block.problem->bias;
}

void finish_streams(const Types& types) {
#if defined(__SSE2__)
  if (types.streams) _mm_sfence();
#endif
}

// Rounds a block's sums, `stride` elements from row to row, or null for zeros, to its columns of the result, with the
// bias or with what is there already.
void write_sums(const Block& block, const char* sums, int64_t stride, int64_t column, int64_t columns,
                const Types& types, const LevelTable& table) {
  const Problem& p = *block.problem;
  const int64_t size = accumulator_size(types.in), out_size = size_of(types.out);
  const bool is_wide = out_size == size;
  const char* const bias = widened_bias(p, column, columns, types, table);
  if (types.streams && !bias) {
    table.rows->stream_rows[int(types.out)](sums, stride * size, p.out + block.begin * p.out_stride + column * out_size,
                                            p.out_stride, block.rows, columns);
    return;
  }
  char* const copy = types.accumulate && !is_wide ? scratch(Scratch::bias, columns * size) : nullptr;
  for (int64_t r = 0; r < block.rows; ++r) {
    char* const out = p.out + (block.begin + r) * p.out_stride + column * out_size;
    const char* add = bias;
    if (types.accumulate) {
      if (copy) table.rows->widen_row[int(types.out)](out, copy, columns);
      add = copy ? copy : out;
    }
    table.rows->store_row[int(types.out)](sums + r * stride * size, add, out, columns);
  }
}

// Columns of a task by the rows of its problem.
constexpr int64_t kFewRows = 64, kManyColumns = 2048, kFewColumns = 512;

// Bytes between the sums of two rows: a power of two apart, they would fall into few sets of the caches.
constexpr int64_t kApart = 64;

// Computes one problem's block of rows after the other, keeping what two consecutive tasks share.
class Worker {
 public:
  Worker(const LevelTable& table, const Types& types)
      : table_(table), gemm_(gemm_kernel(table, types.multiplied(), types.in)), types_(types) {}

  // A copy of columns pays by long rows of memory, the longer the fewer rows of sums the L2 cache has to hold; after a
  // short reduction it is the sums of a row group that the L1 cache should hold.
  static int64_t target_columns(const Types& types, const Problem& p) {
    if (!types.copies_panels) return 192;
    if (p.d <= kShort) return 128;
    return p.m <= kFewRows ? kManyColumns : kFewColumns;
  }
  static int64_t rows_of_block(const LevelTable& table, const Types& types, int64_t d) {
    return block_rows(Panel::resident_bytes(gemm_kernel(table, types.multiplied(), types.in), d), cache_sizes().l2);
  }

  // `next`: the first weight of the call that will follow, or null.
  void run(const Block& block, int64_t column, int64_t columns, const char* next) {
    if (is_empty(block, types_)) return write_sums(block, nullptr, 0, column, columns, types_, table_);
    const Problem& p = *block.problem;
    pack(block);
    if (types_.copies_panels && p.d <= kShort) return run_short(block, column, columns);
    const int64_t size = accumulator_size(types_.in);
    const int64_t stride = columns + kApart / size;
    char* const sums = scratch(Scratch::accumulators, block.rows * stride * size);
    if (types_.copies_panels) {
      const Operand w = p.w.at(column);
      char* const workspace = scratch(Scratch::weights, gemm_.column_workspace(p.d));
      gemm_.multiply_columns(panel_, block.rows, w.data, w.d_stride, columns, p.d, workspace, sums, stride);
    } else {
      gemm_.multiply(panel_, block.rows, weights(p, column, columns, next), columns, p.d, sums, stride);
    }
    write_sums(block, sums, stride, column, columns, types_, table_);
  }

  // Null where the weights are copied before they are multiplied.
  const char* first_weight(const Problem& p, int64_t column) const {
    const int64_t size = size_of(types_.in);
    if (gemm_.workspace) return p.matrix.data + column * p.matrix.data_stride;
    if (types_.format == WeightFormat::packed) return p.w.data + column * p.d * size;
    return !types_.copies_panels && (p.w.d_stride == size || p.d <= 1) ? p.w.at(column).data : nullptr;
  }

 private:
  static constexpr int64_t kShort = 128;  // reductions after which a block's sums cost more than its products

  // Row group by row group, so that its sums stay in the L1 or L2 cache until they are rounded.
  void run_short(const Block& block, int64_t column, int64_t columns) {
    const Problem& p = *block.problem;
    const int64_t size = accumulator_size(types_.in);
    const int64_t padded = ceil_div(p.d, gemm_.step) * gemm_.step;  // both operands have zeros there
    const Operand w = p.w.at(column);
    char* const copy = scratch(Scratch::weights, columns * padded * size_of(types_.in));
    gemm_.pack_columns(w.data, w.d_stride, columns, p.d, copy);
    const int64_t stride = columns + kApart / size;
    float* const sums = reinterpret_cast<float*>(scratch(Scratch::accumulators, gemm_.max_rows * stride * size));
    auto write = [&](int64_t first, int64_t rows) {
      write_sums({&p, block.begin + first, rows, columns}, reinterpret_cast<const char*>(sums), stride, column, columns,
                 types_, table_);
    };
    const GroupSink sink{[](void* f, int64_t first, int64_t rows) { (*static_cast<decltype(write)*>(f))(first, rows); },
                         &write};
    gemm_.multiply_groups(panel_, block.rows, copy, columns, padded, sums, stride, sink);
  }

  void pack(const Block& block) {
    if (packed_ == &block) return;
    packed_ = &block;
    const Problem& p = *block.problem;
    const int64_t size = size_of(types_.in);
    const Panel panel(gemm_, block.rows, p.d);
    panel_ = scratch(Scratch::panel, panel.bytes());
    const Operand a = p.a.at(block.begin);
    if (a.d_stride == size) {
      panel.pack(panel_, 0, p.d, [&](int64_t r) { return a.at(r).data; });
      return;
    }
    // A piece of the reduction at a time, so that the copy stays in the L1 or L2 cache.
    constexpr int64_t kPiece = 256;
    char* const copy = scratch(Scratch::row, block.rows * kPiece * size);
    for (int64_t begin = 0; begin < p.d; begin += kPiece) {
      const int64_t d = std::min(kPiece, p.d - begin);
      copy_rows({a.data + begin * a.d_stride, a.row_stride, a.d_stride}, block.rows, d, size, copy);
      panel.pack(panel_, begin, d, [&](int64_t r) { return copy + r * d * size; });
    }
  }

  Weights weights(const Problem& p, int64_t column, int64_t columns, const char* next) {
    const int64_t size = size_of(types_.in);
    if (gemm_.workspace) {
      Weights weights{nullptr, nullptr, columns, 0, 0, next};
      weights.matrix = &p.matrix;
      weights.first_row = column;
      weights.workspace = scratch(Scratch::weights, gemm_.workspace(p.d));
      return weights;
    }
    const char* const first = first_weight(p, column);
    if (types_.format == WeightFormat::packed) return {first, nullptr, columns, 0, p.n - column, next};
    if (first) return {first, nullptr, columns, p.w.row_stride, 0, next};
    char* const copy = scratch(Scratch::weights, columns * p.d * size);
    copy_rows(p.w.at(column), columns, p.d, size, copy);
    return {copy, nullptr, columns, p.d * size, 0, nullptr};
  }

  const LevelTable& table_;
  const GemmKernel& gemm_;
  const Types types_;
  const Block* packed_ = nullptr;
  char* panel_ = nullptr;
};

// The same for weights stored along the columns of the result.
class ColumnWorker {
 public:
  ColumnWorker(const LevelTable& table, const Types& types)
      : table_(table), gemm_(*table.row_gemm->by_dtype[int(types.in)]), types_(types) {}

  // Long rows of W for few rows of sums, which the L2 cache should hold, since the reduction goes over all of them
  // block by block.
  static int64_t target_columns(const Types&, const Problem& p) { return p.m <= kFewRows ? kManyColumns : kFewColumns; }
  static int64_t rows_of_block(const LevelTable&, const Types& types, int64_t) {
    return block_rows(kFewColumns * accumulator_size(types.in), cache_sizes().l2);
  }

  const char* first_weight(const Problem&, int64_t) const { return nullptr; }

  void run(const Block& block, int64_t column, int64_t columns, const char*) {
    if (is_empty(block, types_)) return write_sums(block, nullptr, 0, column, columns, types_, table_);
    const Problem& p = *block.problem;
    pack(block);
    const int64_t size = accumulator_size(types_.in);
    const int64_t stride = ceil_div(columns, gemm_.width) * gemm_.width + kApart / size;
    char* const sums = scratch(Scratch::accumulators, block.rows * stride * size);
    const Operand w = p.w.at(column);
    char* const out = p.out + block.begin * p.out_stride + column * size_of(types_.out);
    const bool direct = goes_direct(p, out, columns);
    gemm_.multiply(panel_, block.rows, w.data, w.d_stride, columns, p.d, sums, stride,
                   {direct ? out : nullptr, p.out_stride, size_of(types_.out) != size});
    if (!direct) write_sums(block, sums, stride, column, columns, types_, table_);
  }

 private:
  // Whether the kernel may write sums past the caches itself: nothing is added, they are rounded to its own type if to
  // any, and rows are aligned.
  bool goes_direct(const Problem& p, const char* out, int64_t columns) const {
    constexpr int64_t kLine = 64;
    const bool kernel_rounds = types_.out == types_.in || size_of(types_.out) == accumulator_size(types_.in);
    return types_.streams && !p.bias && kernel_rounds && columns % gemm_.width == 0 && p.out_stride % kLine == 0 &&
           reinterpret_cast<uintptr_t>(out) % uintptr_t(kLine) == 0;
  }

  void pack(const Block& block) {
    if (packed_ == &block) return;
    packed_ = &block;
    const Problem& p = *block.problem;
    const RowGroups groups(block.rows, gemm_.max_rows);
    const int64_t row_bytes = ceil_div(p.d, gemm_.step) * gemm_.step * gemm_.packed_size;
    panel_ = scratch(Scratch::panel, block.rows * row_bytes);
    for (int64_t group = 0; group < groups.count; ++group) {
      const int64_t first = groups.first_row(group);
      const Operand a = p.a.at(block.begin + first);
      gemm_.pack(a.data, a.row_stride, a.d_stride, groups.rows(group), p.d, panel_ + first * row_bytes);
    }
  }

  const LevelTable& table_;
  const RowGemm& gemm_;
  const Types types_;
  const Block* packed_ = nullptr;
  char* panel_ = nullptr;
};

template <class Worker>
void run(const std::vector<Problem>& problems, const Types& types) {
  const LevelTable& table = level_table(types.in);
  int64_t width = 0;
  for (const Problem& p : problems) width = std::max(width, p.n);
  if (width == 0) return;
  const int threads = num_threads();

  std::vector<Block> blocks;
  for (const Problem& p : problems) {
    const int64_t parts = ceil_div(p.m, Worker::rows_of_block(table, types, p.d));
    for (int64_t i = 0; i < parts; ++i) {
      const auto [begin, end] = even_part(p.m, parts, i);
      blocks.push_back({&p, begin, end - begin, 0});
    }
  }
  constexpr int64_t kUnit = kPanel;
  std::vector<int64_t> first_task;  // of each block
  int64_t tasks = 0;
  for (Block& block : blocks) {
    const int64_t target = Worker::target_columns(types, *block.problem);
    block.columns = task_columns(width, kUnit, target, int64_t(blocks.size()), threads);
    first_task.push_back(tasks);
    tasks += ceil_div(block.problem->n, block.columns);
  }

  const auto place_of = [&](int64_t task) {
    const size_t index = size_t(std::upper_bound(first_task.begin(), first_task.end(), task) - first_task.begin()) - 1;
    return std::pair{&blocks[index], (task - first_task[index]) * blocks[index].columns};
  };
  GuidedTasks queue(tasks, threads);
  parallel_region(int(std::min<int64_t>(threads, tasks)), [&](int) {
    Worker worker(table, types);
    queue.run([&](int64_t task, int64_t after) {
      const auto [block, column] = place_of(task);
      const char* next = nullptr;
      if (after >= 0) {
        const auto [coming, begin] = place_of(after);
        next = worker.first_weight(*coming->problem, begin);
      }
      worker.run(*block, column, std::min(block->columns, block->problem->n - column), next);
    });
    finish_streams(types);
  });
}

constexpr int64_t kHugePage = int64_t(2) << 20, kLarge = 16 * kHugePage;

// Most of the time of a large result that is written once would go into page faults, one for every 4 KiB.
void advise_huge_pages(const at::Tensor& out) {
#if defined(__linux__)
  const auto begin = reinterpret_cast<int64_t>(out.data_ptr()), end = begin + int64_t(out.nbytes());
  const int64_t first = ceil_div(begin, kHugePage) * kHugePage, last = end / kHugePage * kHugePage;
  if (end - begin >= kLarge) madvise(reinterpret_cast<void*>(first), size_t(last - first), MADV_HUGEPAGE);
#endif
}

// The matrix of a group: rows along dimension `row`, the reduction along dimension `d`, of the last two.
Operand operand(const at::Tensor& t, int64_t row, int64_t d, int64_t group) {
  const int64_t size = t.element_size();
  const char* const data =
      static_cast<const char*>(t.const_data_ptr()) + (t.dim() == 3 ? group * t.stride(0) * size : 0);
  return {data, t.stride(row) * size, t.stride(d) * size};
}

// Whether plain weights lie along the columns of the result.
bool along_columns(const GroupedMm& mm) {
  return mm.b_stored.format == WeightFormat::plain && mm.b.stride(-1) == 1 && mm.b.stride(-2) != 1 && mm.a.size(-1) > 1;
}

// Whether the level rather copies them into the layout of packed weights.
bool copies_panels(const GroupedMm& mm) {
  const Dtype dtype = kernel_dtype(mm.a.scalar_type());
  return along_columns(mm) && gemm_kernel(level_table(dtype), WeightFormat::packed, dtype).pack_columns;
}

// Whether weights that lie along the columns of the result are multiplied as they lie, or copied. Of rows that are cut
// it must not depend on how many there are.
bool takes_columns(const GroupedMm& mm) {
  if (!along_columns(mm) || (mm.a_ragged() && !mm.b_ragged() && mm.as_experts)) return false;
  if (!copies_panels(mm)) return true;
  // A matrix tile repays the copy, but not in a short reduction.
  constexpr int64_t kLong = 16;
  return mm.a_ragged() && mm.b_ragged() && mm.a.size(-1) < kLong * mm.groups;
}

}  // namespace

void compute(const GroupedMm& mm, const at::Tensor& out) {
  if (!mm.accumulate) advise_huge_pages(out);
  const int64_t m = mm.a.size(-2), n = mm.b.size(-1), d = mm.a.size(-1);
  const int64_t out_size = out.element_size();
  char* const out_data = static_cast<char*>(out.data_ptr());

  std::vector<Problem> problems;
  for (int64_t g = 0; g < mm.groups; ++g) {
    const int64_t begin = mm.ends.empty() || g == 0 ? 0 : mm.ends[size_t(g) - 1];
    const int64_t end = mm.ends.empty() ? 0 : mm.ends[size_t(g)];
    Problem p{
        operand(mm.a, -2, -1, g), operand(mm.b, -1, -2, g), m, n, d, out_data, out.stride(-2) * out_size, nullptr};
    if (mm.quantized) p.matrix = mm.quantized->of_group(g);
    if (mm.per_group()) p.out += g * out.stride(0) * out_size;
    if (mm.a_ragged() && mm.b_ragged()) {  // along the reduction
      p.a.data += begin * p.a.d_stride;
      p.w.data += begin * p.w.d_stride;
      p.d = end - begin;
    } else if (mm.a_ragged()) {  // along the rows
      p.a.data += begin * p.a.row_stride;
      p.out += begin * p.out_stride;
      p.m = end - begin;
    } else if (mm.b_ragged()) {  // along the columns
      p.w.data += begin * p.w.row_stride;
      p.out += begin * out_size;
      p.n = end - begin;
    }
    if (mm.bias.defined())
      p.bias = static_cast<const char*>(mm.bias.const_data_ptr()) +
               (mm.bias.dim() == 2 ? g * n : begin) * mm.bias.element_size();
    p.n /= mm.b_stored.matrices;
    if (p.m == 0 || p.n == 0 || (mm.accumulate && p.d == 0)) continue;
    for (int64_t i = 0; i < mm.b_stored.matrices; ++i) {
      problems.push_back(p);
      p.w.data += p.n * d * mm.b.element_size();
      p.out += p.n * out_size;
      if (p.bias) p.bias += p.n * mm.bias.element_size();
    }
  }
  if (!mm.per_group()) {  // what lies past the last end
    const int64_t end = mm.ends.empty() ? 0 : mm.ends.back();
    if (mm.a_ragged())
      out.narrow(0, end, m - end).zero_();
    else
      out.narrow(1, end, n - end).zero_();
  }
  const Types types{kernel_dtype(mm.a.scalar_type()),
                    kernel_dtype(out.scalar_type()),
                    mm.bias.defined() ? kernel_dtype(mm.bias.scalar_type()) : Dtype::f32,
                    mm.b_stored.format,
                    mm.accumulate,
                    !mm.accumulate && int64_t(out.nbytes()) >= kLarge,
                    copies_panels(mm)};
  if (takes_columns(mm))
    run<ColumnWorker>(problems, types);
  else
    run<Worker>(problems, types);
}

}  // namespace polymoe
