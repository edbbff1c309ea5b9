#include "experts_run.h"

#include <algorithm>

#include "isa.h"
#include "threads.h"

namespace polymoe {
namespace {

struct Columns {
  int64_t begin, count;
};

// Rows of one expert that are packed and multiplied together; `begin` is a row of the plan.
struct Block {
  int64_t expert, begin, rows;
};

// The experts' rows, each cut into even blocks of at most `limit` rows.
std::vector<Block> cut_rows(const int32_t* offsets, int64_t experts, int64_t limit) {
  std::vector<Block> blocks;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t rows = offsets[e + 1] - offsets[e], parts = ceil_div(rows, limit);
    for (int64_t i = 0; i < parts; ++i) {
      const auto [begin, end] = even_part(rows, parts, i);
      blocks.push_back({e, offsets[e] + begin, end - begin});
    }
  }
  return blocks;
}

// What both phases know.
struct Layer {
  const ExpertsArguments& args;
  const ChunkPlan& plan;
  const LevelTable& table;
  const GemmKernel& gemm;
  int64_t size;               // bytes of an element of x
  int64_t sum_size;           // bytes of an accumulator
  std::vector<Block> blocks;  // each is a panel in both phases
  char* activations;          // the panels of phase 2, in the order of the blocks
  const char* rounded;        // every token's row of x, packed on its own, where packing rounds; else null

  int64_t activation_row_bytes() const { return Panel::row_bytes(gemm, args.intermediate); }
  char* activation_panel(const Block& block) const { return activations + block.begin * activation_row_bytes(); }
  const char* weight_of_row(int64_t row) const { return args.weights + plan.row_slot[row] * sum_size; }
};

// acc[r][c] += bias[c], which is the sum and the rounding of grouped_mm.
void add_bias(const Layer& layer, const char* bias, Dtype bias_dtype, char* acc, int64_t rows, int64_t columns,
              int64_t stride) {
  const Dtype wide = layer.args.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  char* const widened = scratch(Scratch::bias, columns * layer.sum_size);
  layer.table.rows->widen_row[int(bias_dtype)](bias, widened, columns);
  for (int64_t r = 0; r < rows; ++r) {
    char* const row = acc + r * stride * layer.sum_size;
    layer.table.rows->store_row[int(wide)](row, widened, row, columns);
  }
}

class GateUp {
 public:
  explicit GateUp(const Layer& layer) : layer_(layer), args_(layer.args) {}

  void run(const Block& block, const Columns& columns, const char* next) {
    gather(block);
    const int64_t width = columns.count * args_.halves();
    char* const acc = scratch(Scratch::accumulators, block.rows * width * layer_.sum_size);
    layer_.gemm.multiply(panel_, block.rows, weights(block.expert, columns, next), width, args_.hidden, acc, width);
    if (args_.gate_up_bias) add_biases(block, columns, acc, width);
    if (args_.pre_activation) save(block, columns, acc, width);
    activate(block, columns, acc, width);
  }

  const char* first_weight(int64_t expert, const Columns& columns) const { return gate_rows(expert, columns).data; }

 private:
  // Packs the block's rows of x, unless the last task was about the same ones.
  void gather(const Block& block) {
    if (gathered_ == &block) return;
    gathered_ = &block;
    const Panel panel(layer_.gemm, block.rows, args_.hidden);
    panel_ = scratch(Scratch::panel, panel.bytes());
    const int32_t* const slots = layer_.plan.row_slot + block.begin;
    const auto token = [&](int64_t r) { return args_.x + slots[r] / args_.slots * args_.x_stride; };
    if (layer_.rounded) {
      const int64_t packed = Panel::row_bytes(layer_.gemm, args_.hidden);
      panel.copy(panel_, [&](int64_t r) { return layer_.rounded + slots[r] / args_.slots * packed; });
      return;
    }
    if (args_.placement != WeightPlacement::input) {
      panel.pack(panel_, 0, args_.hidden, token);
      return;
    }
    const int64_t row_bytes = args_.hidden * layer_.size;
    char* const scaled = scratch(Scratch::row, block.rows * row_bytes);
    for (int64_t r = 0; r < block.rows; ++r)
      layer_.table.rows->scale_row[int(args_.dtype)](token(r), layer_.weight_of_row(block.begin + r),
                                                     scaled + r * row_bytes, args_.hidden);
    panel.pack(panel_, 0, args_.hidden, [&](int64_t r) { return scaled + r * row_bytes; });
  }

  // The gate rows of these columns.
  Operand gate_rows(int64_t expert, const Columns& columns) const {
    Operand rows = args_.gate_up;
    rows.data += expert * args_.gate_up_expert_stride;
    if (args_.format == WeightFormat::packed)
      rows.row_stride = args_.hidden * layer_.size;
    else if (args_.interleaved)
      rows.row_stride *= 2;
    return rows.at(columns.begin);
  }

  // The gate columns, then the up columns, whatever the layout of the weights.
  Weights weights(int64_t expert, const Columns& columns, const char* next) {
    if (args_.quantized()) return quantized_weights(expert, columns, next);
    const Operand gate = gate_rows(expert, columns);
    const bool packed = args_.format == WeightFormat::packed;
    // From a gate row to its up row.
    const int64_t apart =
        args_.interleaved && !packed ? args_.gate_up.row_stride : args_.intermediate * gate.row_stride;
    const Operand up{gate.data + apart, gate.row_stride, gate.d_stride};
    if (packed || gate.d_stride == layer_.size || args_.hidden <= 1)
      return {gate.data, up.data, columns.count, gate.row_stride, args_.intermediate - columns.begin, next};

    const int64_t row_bytes = args_.hidden * layer_.size;
    char* const copy = scratch(Scratch::weights, columns.count * args_.halves() * row_bytes);
    copy_rows(gate, columns.count, args_.hidden, layer_.size, copy);
    char* const up_copy = copy + columns.count * row_bytes;
    if (args_.gated()) copy_rows(up, columns.count, args_.hidden, layer_.size, up_copy);
    return {copy, up_copy, columns.count, row_bytes, 0, nullptr};
  }

  Weights quantized_weights(int64_t expert, const Columns& columns, const char* next) {
    matrix_ = args_.quantized_gate_up->of_group(expert);
    const int64_t step = args_.interleaved ? 2 : 1, begin = columns.begin * step;
    Weights w{nullptr, nullptr, columns.count, matrix_.data_stride * step, 0, next};
    w.matrix = &matrix_;
    w.first_row = begin;
    w.second_row = begin + (args_.interleaved ? 1 : args_.intermediate);
    w.row_step = step;
    w.workspace = scratch(Scratch::weights, layer_.gemm.workspace(args_.hidden));
    return w;
  }

  void add_biases(const Block& block, const Columns& columns, char* acc, int64_t width) const {
    const int64_t bias_size = size_of(args_.gate_up_bias_dtype);
    const char* const bias = args_.gate_up_bias + block.expert * args_.halves() * args_.intermediate * bias_size;
    if (!args_.interleaved) {
      for (int64_t half = 0; half < args_.halves(); ++half)
        add_bias(layer_, bias + (half * args_.intermediate + columns.begin) * bias_size, args_.gate_up_bias_dtype,
                 acc + half * columns.count * layer_.sum_size, block.rows, columns.count, width);
      return;
    }
    // Sorted into the order of the accumulators first: all gates, then all ups.
    char* const sorted = scratch(Scratch::row, width * bias_size);
    const Operand pairs{bias + 2 * columns.begin * bias_size, bias_size, 2 * bias_size};
    copy_rows(pairs, 2, columns.count, bias_size, sorted);
    add_bias(layer_, sorted, args_.gate_up_bias_dtype, acc, block.rows, width, width);
  }

  // Keeps the pre-activation for the backward, in x's dtype and the layout of gate_up.
  void save(const Block& block, const Columns& columns, const char* acc, int64_t width) const {
    const int64_t row_bytes = args_.halves() * args_.intermediate * layer_.size;
    char* const rounded = scratch(Scratch::row, width * layer_.size);
    for (int64_t r = 0; r < block.rows; ++r) {
      layer_.table.rows->store_row[int(args_.dtype)](acc + r * width * layer_.sum_size, nullptr, rounded, width);
      const int64_t slot = layer_.plan.row_slot[block.begin + r];
      char* const row = args_.pre_activation + args_.pre_activation_row[slot] * row_bytes;
      if (args_.interleaved) {
        const Operand pairs{rounded, layer_.size, columns.count * layer_.size};
        copy_rows(pairs, columns.count, 2, layer_.size, row + 2 * columns.begin * layer_.size);
        continue;
      }
      for (int64_t half = 0; half < args_.halves(); ++half)
        std::copy_n(rounded + half * columns.count * layer_.size, columns.count * layer_.size,
                    row + (half * args_.intermediate + columns.begin) * layer_.size);
    }
  }

  void activate(const Block& block, const Columns& columns, const char* acc, int64_t width) const {
    const auto activate_row = layer_.table.activation->activate_row[int(args_.dtype)];
    const int64_t row_bytes = columns.count * layer_.size;
    char* const activated = scratch(Scratch::row, block.rows * row_bytes);
    for (int64_t r = 0; r < block.rows; ++r) {
      const char* const gate = acc + r * width * layer_.sum_size;
      const char* const up = args_.gated() ? gate + columns.count * layer_.sum_size : nullptr;
      const bool weighted = args_.placement == WeightPlacement::activation;
      activate_row(args_.activation, gate, up, weighted ? layer_.weight_of_row(block.begin + r) : nullptr,
                   activated + r * row_bytes, columns.count);
    }
    Panel(layer_.gemm, block.rows, args_.intermediate)
        .pack(layer_.activation_panel(block), columns.begin, columns.count,
              [&](int64_t r) { return activated + r * row_bytes; });
  }

  const Layer& layer_;
  const ExpertsArguments& args_;
  QuantizedMatrix matrix_{};
  const Block* gathered_ = nullptr;
  char* panel_ = nullptr;
};

// The sums of all rows in one stretch of columns of H.
struct Sums {
  char* data;
  Columns columns;
  int64_t stride;  // elements from a row to the next

  char* at(int64_t row, int64_t column, int64_t size) const {
    return data + (row * stride + column - columns.begin) * size;
  }
};

class Down {
 public:
  Down(const Layer& layer, const Sums& sums) : layer_(layer), args_(layer.args), sums_(sums) {}

  void run(const Block& block, const Columns& columns, const char* next) {
    char* const acc = sums_.at(block.begin, columns.begin, layer_.sum_size);
    layer_.gemm.multiply(layer_.activation_panel(block), block.rows, weights(block.expert, columns, next),
                         columns.count, args_.intermediate, acc, sums_.stride);
    if (args_.down_bias)
      add_bias(layer_, args_.down_bias + (block.expert * args_.hidden + columns.begin) * size_of(args_.down_bias_dtype),
               args_.down_bias_dtype, acc, block.rows, columns.count, sums_.stride);
  }

  const char* first_weight(int64_t expert, const Columns& columns) const { return rows_of(expert, columns).data; }

 private:
  Operand rows_of(int64_t expert, const Columns& columns) const {
    Operand rows = args_.down;
    rows.data += expert * args_.down_expert_stride;
    if (args_.format == WeightFormat::packed) rows.row_stride = args_.intermediate * layer_.size;
    return rows.at(columns.begin);
  }

  Weights weights(int64_t expert, const Columns& columns, const char* next) {
    if (args_.quantized()) {
      matrix_ = args_.quantized_down->of_group(expert);
      Weights w{nullptr, nullptr, columns.count, matrix_.data_stride, 0, next};
      w.matrix = &matrix_;
      w.first_row = columns.begin;
      w.workspace = scratch(Scratch::weights, layer_.gemm.workspace(args_.intermediate));
      return w;
    }
    const Operand rows = rows_of(expert, columns);
    if (args_.format == WeightFormat::packed || rows.d_stride == layer_.size || args_.intermediate <= 1)
      return {rows.data, nullptr, columns.count, rows.row_stride, args_.hidden - columns.begin, next};
    const int64_t row_bytes = args_.intermediate * layer_.size;
    char* const copy = scratch(Scratch::weights, columns.count * row_bytes);
    copy_rows(rows, columns.count, args_.intermediate, layer_.size, copy);
    return {copy, nullptr, columns.count, row_bytes, 0, nullptr};
  }

  const Layer& layer_;
  const ExpertsArguments& args_;
  const Sums& sums_;
  QuantizedMatrix matrix_{};
};

// Sums the slots of tokens [tokens.begin, tokens.end) in one stretch of columns.
void combine(const Layer& layer, const Sums& sums, Range tokens) {
  const ExpertsArguments& args = layer.args;
  const Dtype wide = args.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  const auto combine_row = layer.table.rows->combine_row[int(wide)][int(args.dtype)];
  const bool weighted = args.placement == WeightPlacement::output;
  std::vector<const void*> rows(size_t(args.slots));
  std::vector<char> weights(size_t(args.slots * layer.sum_size));
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    int count = 0;
    for (int64_t slot = t * args.slots; slot < (t + 1) * args.slots; ++slot) {
      const int64_t row = layer.plan.slot_row[slot];
      if (row < 0) continue;
      rows[size_t(count)] = sums.at(row, sums.columns.begin, layer.sum_size);
      std::copy_n(args.weights + slot * layer.sum_size, layer.sum_size, weights.data() + count * layer.sum_size);
      ++count;
    }
    combine_row(rows.data(), weighted ? weights.data() : nullptr, count,
                args.out + (t * args.hidden + sums.columns.begin) * layer.size, sums.columns.count);
  }
}

// Every block of rows times every part of `columns`: f(worker, block, part, the part after it on the same thread).
template <class MakeWorker>
void for_blocks(const Layer& layer, const Columns& all, int64_t unit, int threads, MakeWorker make_worker) {
  constexpr int64_t kTarget = 128;
  const std::vector<Block>& blocks = layer.blocks;
  const int64_t width = task_columns(all.count, unit, kTarget, int64_t(blocks.size()), threads);
  const int64_t parts = ceil_div(all.count, width), tasks = int64_t(blocks.size()) * parts;
  const auto part = [&](int64_t task) {
    const int64_t begin = task % parts * width;
    return Columns{all.begin + begin, std::min(width, all.count - begin)};
  };
  GuidedTasks queue(tasks, threads);
  parallel_region(int(std::min<int64_t>(threads, tasks)), [&](int) {
    auto worker = make_worker();
    queue.run([&](int64_t task, int64_t after) {
      const char* next = nullptr;
      if (after >= 0) next = worker.first_weight(blocks[size_t(after / parts)].expert, part(after));
      worker.run(blocks[size_t(task / parts)], part(task), next);
    });
  });
}

// Packs the rows of x, one by one.
void round_tokens(const Layer& layer, char* out, int threads) {
  constexpr int64_t kTokens = 4;
  const ExpertsArguments& args = layer.args;
  const int64_t row_bytes = Panel::row_bytes(layer.gemm, args.hidden);
  DynamicTasks tokens(args.tokens);
  parallel_region(int(std::min<int64_t>(threads, ceil_div(args.tokens, kTokens))), [&](int) {
    for (Range range = tokens.next(kTokens); !range.empty(); range = tokens.next(kTokens))
      for (int64_t t = range.begin; t < range.end; ++t) {
        const char* const row = args.x + t * args.x_stride;
        if (args.hidden > 0) layer.gemm.pack_rows(&row, 1, args.hidden, out + t * row_bytes);
      }
  });
}

void gate_up_phase(const Layer& layer, int threads) {
  // Whole steps, because a task packs its columns of the activation on its own, and whole panels of packed weights.
  const int64_t unit = std::max(layer.gemm.step, layer.gemm.columns);
  for_blocks(layer, {0, layer.args.intermediate}, unit, threads, [&] { return GateUp(layer); });
}

void down_combine_phase(const Layer& layer, int threads) {
  const ExpertsArguments& args = layer.args;
  constexpr int64_t kUnit = 32, kTokens = 16;
  static_assert(kUnit % kPanel == 0);
  const int64_t rows = layer.plan.offsets[args.experts];
  const int64_t width = sum_columns(args.hidden, kUnit, rows * layer.sum_size, cache_sizes().l3);
  // Rows a power of two apart would fall into few sets of the caches.
  const int64_t stride = width + 64 / layer.sum_size;
  char* const data = scratch(Scratch::sums, rows * stride * layer.sum_size);
  for (int64_t begin = 0; begin < args.hidden; begin += width) {
    const Sums sums{data, {begin, std::min(width, args.hidden - begin)}, stride};
    for_blocks(layer, sums.columns, kUnit, threads, [&] { return Down(layer, sums); });
    DynamicTasks tokens(args.tokens);
    const int64_t tasks = std::min<int64_t>(threads, ceil_div(args.tokens, kTokens));
    parallel_region(int(tasks), [&](int) {
      for (Range range = tokens.next(kTokens); !range.empty(); range = tokens.next(kTokens))
        combine(layer, sums, range);
    });
  }
}

}  // namespace

void run_experts(const ExpertsArguments& args, const ChunkPlan& plan) {
  const LevelTable& table = level_table(args.dtype);
  const GemmKernel& gemm = gemm_kernel(table, args.format, args.dtype);
  const int64_t total = plan.offsets[args.experts];
  const int threads = worthwhile_threads(num_threads(), total, (args.halves() + 1) * args.intermediate * args.hidden);
  const int64_t row_bytes = Panel::row_bytes(gemm, args.intermediate);
  const int64_t resident = Panel::resident_bytes(gemm, std::max(args.intermediate, args.hidden));

  Layer layer{args, plan, table, gemm, size_of(args.dtype), accumulator_size(args.dtype), {}, nullptr, nullptr};
  layer.blocks = cut_rows(plan.offsets, args.experts, block_rows(resident, cache_sizes().l2));
  const Memory activations(Scratch::activations, total * row_bytes);
  layer.activations = activations.data();

  Memory rounded;
  if (rounds_to_int8(args.format) && args.placement != WeightPlacement::input) {
    rounded = Memory(Scratch::rounded, args.tokens * Panel::row_bytes(gemm, args.hidden));
    round_tokens(layer, rounded.data(), threads);
    layer.rounded = rounded.data();
  }
  gate_up_phase(layer, threads);
  down_combine_phase(layer, threads);
}

}  // namespace polymoe
