// grouped_mm on the CPU: every case is a list of ordinary matmuls over strided operands.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"
#include "gemm.h"
#include "isa.h"
#include "route.h"
#include "threads.h"

namespace polymoe {
namespace {

constexpr const char* kOp = "grouped_mm";

// out[m, n] = a[m, d] * w[n, d] + bias[n]; columns of out are contiguous.
struct Problem {
  Operand a, w;
  int64_t m, n, d;
  char* out;
  int64_t out_stride;  // bytes between rows
  const char* bias;    // null: none
};

struct Types {
  Dtype in, out, bias;
};

// A part of the rows of a problem.
struct Block {
  const Problem* problem;
  int64_t begin, rows;
};

// Computes one problem's block of rows after the other, keeping what two consecutive tasks share.
class Worker {
 public:
  Worker(const LevelTable& table, const Types& types)
      : table_(table), gemm_(*table.dense_gemm->by_dtype[int(types.in)]), types_(types) {}

  void run(const Block& block, int64_t column, int64_t columns) {
    const Problem& p = *block.problem;
    pack(block);
    const WeightRows weights = weight_rows(p, column, columns);
    const int64_t size = accumulator_size(types_.in);
    char* const sums = scratch(Scratch::accumulators, block.rows * columns * size);
    gemm_.multiply(panel_, block.rows, weights, columns, p.d, sums, columns);

    const char* const bias = widened_bias(p, column, columns);
    const int64_t out_size = size_of(types_.out);
    for (int64_t r = 0; r < block.rows; ++r)
      table_.rows->store_row[int(types_.out)](sums + r * columns * size, bias,
                                              p.out + (block.begin + r) * p.out_stride + column * out_size, columns);
  }

 private:
  void pack(const Block& block) {
    if (packed_ == &block) return;
    packed_ = &block;
    const Problem& p = *block.problem;
    const int64_t size = size_of(types_.in);
    const Panel panel(gemm_, block.rows, p.d);
    panel_ = scratch(Scratch::panel, panel.bytes());
    if (p.a.d_stride == size) {
      for (int64_t r = 0; r < block.rows; ++r)
        panel.pack(panel_, r, p.a.data + (block.begin + r) * p.a.row_stride, 0, p.d);
      return;
    }
    constexpr int64_t kRowsAtOnce = 32;
    for (int64_t r = 0; r < block.rows; r += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, block.rows - r);
      char* const copy = scratch(Scratch::row, rows * p.d * size);
      copy_rows(p.a.at(block.begin + r), rows, p.d, size, copy);
      for (int64_t i = 0; i < rows; ++i) panel.pack(panel_, r + i, copy + i * p.d * size, 0, p.d);
    }
  }

  WeightRows weight_rows(const Problem& p, int64_t column, int64_t columns) {
    const int64_t size = size_of(types_.in);
    const Operand w = p.w.at(column);
    if (p.w.d_stride == size || p.d <= 1) return {w.data, nullptr, columns, w.row_stride, nullptr};
    char* const copy = scratch(Scratch::weights, columns * p.d * size);
    copy_rows(w, columns, p.d, size, copy);
    return {copy, nullptr, columns, p.d * size, nullptr};
  }

  const char* widened_bias(const Problem& p, int64_t column, int64_t columns) {
    if (!p.bias) return nullptr;
    char* const wide = scratch(Scratch::bias, columns * accumulator_size(types_.in));
    table_.rows->widen_row[int(types_.bias)](p.bias + column * size_of(types_.bias), wide, columns);
    return wide;
  }

  const LevelTable& table_;
  const DenseGemm& gemm_;
  const Types types_;
  const Block* packed_ = nullptr;
  char* panel_ = nullptr;
};

void run(const std::vector<Problem>& problems, const Types& types) {
  const LevelTable& table = level_table(types.in);
  const DenseGemm& gemm = *table.dense_gemm->by_dtype[int(types.in)];
  int64_t width = 0, depth = 0;
  for (const Problem& p : problems) {
    width = std::max(width, p.n);
    depth = std::max(depth, p.d);
  }
  if (width == 0) return;
  const int threads = num_threads();
  const int64_t limit = block_rows(Panel::row_bytes(gemm, depth), cache_sizes().l2);

  std::vector<Block> blocks;
  for (const Problem& p : problems) {
    const int64_t parts = ceil_div(p.m, limit);
    for (int64_t i = 0; i < parts; ++i) {
      const auto [begin, end] = even_part(p.m, parts, i);
      blocks.push_back({&p, begin, end - begin});
    }
  }
  constexpr int64_t kUnit = 32, kTarget = 192;
  const int64_t columns = task_columns(width, kUnit, kTarget, int64_t(blocks.size()), threads);
  std::vector<int64_t> first_task;  // of each block
  int64_t tasks = 0;
  for (const Block& block : blocks) {
    first_task.push_back(tasks);
    tasks += ceil_div(block.problem->n, columns);
  }

  DynamicTasks queue(tasks);
  parallel_region(int(std::min<int64_t>(threads, tasks)), [&](int) {
    Worker worker(table, types);
    for (Range task = queue.next(); !task.empty(); task = queue.next()) {
      const auto after = std::upper_bound(first_task.begin(), first_task.end(), task.begin);
      const size_t index = size_t(after - first_task.begin()) - 1;
      const int64_t column = (task.begin - first_task[index]) * columns;
      worker.run(blocks[index], column, std::min(columns, blocks[index].problem->n - column));
    }
  });
}

// Ends of the groups, checked against the size of the ragged dimension.
std::vector<int64_t> group_ends(const at::Tensor& offs, int64_t ragged) {
  check_cpu(kOp, "offs", offs);
  check_dtype(kOp, "offs", offs, {at::kInt, at::kLong});
  POLYMOE_CHECK(offs.dim() == 1, kOp, "offs", "a tensor [G]", describe(offs));
  std::vector<int64_t> ends(size_t(offs.size(0)));
  int64_t previous = 0;
  for (size_t g = 0; g < ends.size(); ++g) {
    const int64_t at = int64_t(g) * offs.stride(0);
    ends[g] = offs.scalar_type() == at::kInt ? offs.const_data_ptr<int32_t>()[at] : offs.const_data_ptr<int64_t>()[at];
    POLYMOE_CHECK(ends[g] >= previous && ends[g] <= ragged, kOp, "offs",
                  c10::str("cumulative ends, non-decreasing, from 0 to ", ragged), ends[g], " after ", previous);
    previous = ends[g];
  }
  return ends;
}

// The matrix of a group: rows along dimension `row`, the reduction along dimension `d`, of the last two.
Operand operand(const at::Tensor& t, int64_t row, int64_t d, int64_t group) {
  const int64_t size = t.element_size();
  const char* const data =
      static_cast<const char*>(t.const_data_ptr()) + (t.dim() == 3 ? group * t.stride(0) * size : 0);
  return {data, t.stride(row) * size, t.stride(d) * size};
}

struct Arguments {
  const at::Tensor &a, &b;
  std::vector<int64_t> ends;  // empty for 3D x 3D
  int64_t groups;
  at::Tensor bias;  // undefined: none
  at::ScalarType out_dtype;
  bool a_ragged() const { return a.dim() == 2; }
  bool b_ragged() const { return b.dim() == 2; }
};

Arguments check(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& offs,
                const std::optional<at::Tensor>& bias, std::optional<at::ScalarType> out_dtype) {
  check_cpu(kOp, "a", a);
  check_cpu(kOp, "b", b);
  check_dtype(kOp, "a", a, {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
  check_dtype(kOp, "b", b, {a.scalar_type()});
  POLYMOE_CHECK(a.dim() == 2 || a.dim() == 3, kOp, "a", "a tensor [M, D] or [G, M, D]", describe(a));
  POLYMOE_CHECK(b.dim() == 2 || b.dim() == 3, kOp, "b", "a tensor [D, N] or [G, D, N]", describe(b));
  POLYMOE_CHECK(a.size(-1) == b.size(-2), kOp, "b", c10::str("its second last size to be D=", a.size(-1)), describe(b));
  const bool ragged = a.dim() == 2 || b.dim() == 2;
  POLYMOE_CHECK(offs.has_value() == ragged, kOp, "offs",
                ragged ? "cumulative ends [G], since an operand is 2-D" : "None, since both operands are 3-D",
                offs ? describe(*offs) : "None");
  Arguments args{a, b, {}, a.dim() == 3 ? a.size(0) : b.dim() == 3 ? b.size(0) : offs->size(0), {}, {}};
  if (a.dim() == 3 && b.dim() == 3)
    POLYMOE_CHECK(a.size(0) == b.size(0), kOp, "b", c10::str("G=", a.size(0), " matrices"), describe(b));
  if (ragged) {
    args.ends = group_ends(*offs, b.dim() == 3 ? a.size(0) : a.dim() == 3 ? b.size(1) : a.size(1));
    POLYMOE_CHECK(int64_t(args.ends.size()) == args.groups, kOp, "offs", c10::str("a tensor [G=", args.groups, "]"),
                  describe(*offs));
  }
  if (bias) {
    check_cpu(kOp, "bias", *bias);
    check_dtype(kOp, "bias", *bias, {a.scalar_type(), at::kFloat});
    if (a.dim() == 3 && b.dim() == 2)
      check_shape(kOp, "bias", *bias, {{"N", b.size(-1)}});
    else
      check_shape(kOp, "bias", *bias, {{"G", args.groups}, {"N", b.size(-1)}});
    args.bias = kernel_bias(*bias, kernel_dtype(a.scalar_type()));
  }
  args.out_dtype = out_dtype.value_or(a.scalar_type());
  const bool wide = a.scalar_type() == at::kDouble;
  POLYMOE_CHECK(wide ? args.out_dtype == at::kDouble
                     : args.out_dtype == at::kFloat || args.out_dtype == at::kBFloat16 || args.out_dtype == at::kHalf,
                kOp, "out_dtype", wide ? "float64" : "float32, bfloat16 or float16", dtype_name(args.out_dtype));
  return args;
}

at::Tensor grouped_mm_cpu(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& offs,
                          const std::optional<at::Tensor>& bias, std::optional<at::ScalarType> out_dtype,
                          c10::string_view) {
  const Arguments args = check(a, b, offs, bias, out_dtype);
  const int64_t m = a.size(-2), n = b.size(-1), d = a.size(-1);
  const bool per_group = args.a_ragged() == args.b_ragged();  // the output has a matrix for each group
  const at::Tensor out = per_group ? at::empty({args.groups, m, n}, a.options().dtype(args.out_dtype))
                                   : at::empty({m, n}, a.options().dtype(args.out_dtype));
  const int64_t out_size = out.element_size();
  char* const out_data = static_cast<char*>(out.data_ptr());

  std::vector<Problem> problems;
  for (int64_t g = 0; g < args.groups; ++g) {
    const int64_t begin = args.ends.empty() || g == 0 ? 0 : args.ends[size_t(g) - 1];
    const int64_t end = args.ends.empty() ? 0 : args.ends[size_t(g)];
    Problem p{operand(a, -2, -1, g), operand(b, -1, -2, g), m, n, d, out_data, n * out_size, nullptr};
    if (per_group) p.out += g * m * n * out_size;
    if (args.a_ragged() && args.b_ragged()) {  // along the reduction
      p.a.data += begin * p.a.d_stride;
      p.w.data += begin * p.w.d_stride;
      p.d = end - begin;
    } else if (args.a_ragged()) {  // along the rows
      p.a.data += begin * p.a.row_stride;
      p.out += begin * p.out_stride;
      p.m = end - begin;
    } else if (args.b_ragged()) {  // along the columns
      p.w.data += begin * p.w.row_stride;
      p.out += begin * out_size;
      p.n = end - begin;
    }
    if (args.bias.defined())
      p.bias = static_cast<const char*>(args.bias.const_data_ptr()) +
               (args.bias.dim() == 2 ? g * n : begin) * args.bias.element_size();
    if (p.m > 0 && p.n > 0) problems.push_back(p);
  }
  if (!per_group) {  // what lies past the last end
    const int64_t end = args.ends.empty() ? 0 : args.ends.back();
    if (args.a_ragged())
      out.narrow(0, end, m - end).zero_();
    else
      out.narrow(1, end, n - end).zero_();
  }
  run(problems, {kernel_dtype(a.scalar_type()), kernel_dtype(args.out_dtype),
                 args.bias.defined() ? kernel_dtype(args.bias.scalar_type()) : Dtype::f32});
  return out;
}

TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "grouped_mm", grouped_mm_cpu); }

}  // namespace
}  // namespace polymoe
