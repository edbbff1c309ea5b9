#include "experts_run.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

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
  const DenseGemm& gemm;
  int64_t size;                    // bytes of an element of x
  int64_t sum_size;                // bytes of an accumulator
  std::vector<Block> down_blocks;  // each is a panel of phase 2, in this order
  std::vector<int64_t> down_block_of_row;
  char* activations;  // the panels of phase 2

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

  void run(const Block& block, const Columns& columns) {
    gather(block);
    const int64_t width = columns.count * args_.halves();
    char* const acc = scratch(Scratch::accumulators, block.rows * width * layer_.sum_size);
    layer_.gemm.multiply(panel_, block.rows, weight_rows(block.expert, columns), width, args_.hidden, acc, width);
    if (args_.gate_up_bias) add_biases(block, columns, acc, width);
    if (args_.pre_activation) save(block, columns, acc, width);
    activate(block, columns, acc, width);
  }

 private:
  // Packs the block's rows of x, unless the last task was about the same ones.
  void gather(const Block& block) {
    if (gathered_ == &block) return;
    gathered_ = &block;
    const Panel panel(layer_.gemm, block.rows, args_.hidden);
    panel_ = scratch(Scratch::panel, panel.bytes());
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t row = block.begin + r;
      const char* source = args_.x + layer_.plan.row_slot[row] / args_.slots * args_.x_stride;
      if (args_.placement == WeightPlacement::input) {
        char* const scaled = scratch(Scratch::row, args_.hidden * layer_.size);
        layer_.table.rows->scale_row[int(args_.dtype)](source, layer_.weight_of_row(row), scaled, args_.hidden);
        source = scaled;
      }
      panel.pack(panel_, r, source, 0, args_.hidden);
    }
  }

  // The gate columns, then the up columns, whatever the layout of the weights.
  WeightRows weight_rows(int64_t expert, const Columns& columns) const {
    Operand rows = args_.gate_up;
    rows.data += expert * args_.gate_up_expert_stride;
    const int64_t apart = args_.interleaved ? 1 : args_.intermediate;  // from a gate row to its up row
    if (args_.interleaved) rows.row_stride *= 2;
    const Operand gate = rows.at(columns.begin);
    Operand up = gate;
    up.data += apart * args_.gate_up.row_stride;
    if (rows.d_stride == layer_.size || args_.hidden <= 1)
      return {gate.data, up.data, columns.count, rows.row_stride, nullptr};

    const int64_t row_bytes = args_.hidden * layer_.size;
    char* const copy = scratch(Scratch::weights, columns.count * args_.halves() * row_bytes);
    copy_rows(gate, columns.count, args_.hidden, layer_.size, copy);
    char* const up_copy = copy + columns.count * row_bytes;
    if (args_.gated()) copy_rows(up, columns.count, args_.hidden, layer_.size, up_copy);
    return {copy, up_copy, columns.count, row_bytes, nullptr};
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
    char* const activated = scratch(Scratch::row, columns.count * layer_.size);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t row = block.begin + r;
      const char* const gate = acc + r * width * layer_.sum_size;
      const char* const up = args_.gated() ? gate + columns.count * layer_.sum_size : nullptr;
      const bool weighted = args_.placement == WeightPlacement::activation;
      activate_row(args_.activation, gate, up, weighted ? layer_.weight_of_row(row) : nullptr, activated,
                   columns.count);
      const Block& target = layer_.down_blocks[size_t(layer_.down_block_of_row[size_t(row)])];
      Panel(layer_.gemm, target.rows, args_.intermediate)
          .pack(layer_.activation_panel(target), row - target.begin, activated, columns.begin, columns.count);
    }
  }

  const Layer& layer_;
  const ExpertsArguments& args_;
  const Block* gathered_ = nullptr;
  char* panel_ = nullptr;
};

// The owner of a block of output columns.
class DownCombine {
 public:
  explicit DownCombine(const Layer& layer) : layer_(layer), args_(layer.args) {}

  void run(const Columns& columns) const {
    const int64_t total = layer_.plan.offsets[args_.experts];
    char* const sums = scratch(Scratch::accumulators, total * columns.count * layer_.sum_size);
    const std::vector<Block>& blocks = layer_.down_blocks;
    int64_t repacked_expert = -1;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Block& block = blocks[i];
      WeightRows weights{rows_of(block.expert, columns).data, nullptr, columns.count, args_.down.row_stride, nullptr};
      if (args_.down.d_stride != layer_.size && args_.intermediate > 1)
        repack(block.expert, columns, repacked_expert, weights);
      else if (i + 1 < blocks.size())
        weights.next = rows_of(blocks[i + 1].expert, columns).data;
      char* const acc = sums + block.begin * columns.count * layer_.sum_size;
      layer_.gemm.multiply(layer_.activation_panel(block), block.rows, weights, columns.count, args_.intermediate, acc,
                           columns.count);
      if (args_.down_bias)
        add_bias(layer_,
                 args_.down_bias + (block.expert * args_.hidden + columns.begin) * size_of(args_.down_bias_dtype),
                 args_.down_bias_dtype, acc, block.rows, columns.count, columns.count);
    }
    combine(columns, sums);
  }

 private:
  Operand rows_of(int64_t expert, const Columns& columns) const {
    Operand rows = args_.down;
    rows.data += expert * args_.down_expert_stride;
    return rows.at(columns.begin);
  }

  void repack(int64_t expert, const Columns& columns, int64_t& repacked_expert, WeightRows& weights) const {
    const int64_t row_bytes = args_.intermediate * layer_.size;
    char* const copy = scratch(Scratch::weights, columns.count * row_bytes);
    if (repacked_expert != expert)
      copy_rows(rows_of(expert, columns), columns.count, args_.intermediate, layer_.size, copy);
    repacked_expert = expert;
    weights.first = copy;
    weights.stride = row_bytes;
  }

  void combine(const Columns& columns, const char* sums) const {
    const Dtype wide = args_.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
    const auto combine_row = layer_.table.rows->combine_row[int(wide)][int(args_.dtype)];
    const bool weighted = args_.placement == WeightPlacement::output;
    std::vector<const void*> rows(size_t(args_.slots));
    std::unique_ptr<char[]> weights(new char[size_t(args_.slots * layer_.sum_size)]);
    for (int64_t t = 0; t < args_.tokens; ++t) {
      int count = 0;
      for (int64_t slot = t * args_.slots; slot < (t + 1) * args_.slots; ++slot) {
        const int64_t row = layer_.plan.slot_row[slot];
        if (row < 0) continue;
        rows[size_t(count)] = sums + row * columns.count * layer_.sum_size;
        std::copy_n(args_.weights + slot * layer_.sum_size, layer_.sum_size, weights.get() + count * layer_.sum_size);
        ++count;
      }
      combine_row(rows.data(), weighted ? weights.get() : nullptr, count,
                  args_.out + (t * args_.hidden + columns.begin) * layer_.size, columns.count);
    }
  }

  const Layer& layer_;
  const ExpertsArguments& args_;
};

void gate_up_phase(const Layer& layer, int threads) {
  const ExpertsArguments& args = layer.args;
  const int64_t limit = block_rows(Panel::row_bytes(layer.gemm, args.hidden), cache_sizes().l2);
  const std::vector<Block> blocks = cut_rows(layer.plan.offsets, args.experts, limit);
  // Whole steps, because a task packs its columns of the activation on its own.
  constexpr int64_t kTarget = 192;
  const int64_t columns = task_columns(args.intermediate, layer.gemm.step, kTarget, int64_t(blocks.size()), threads);
  const int64_t parts = ceil_div(args.intermediate, columns);

  DynamicTasks queue(int64_t(blocks.size()) * parts);
  parallel_region(int(std::min<int64_t>(threads, int64_t(blocks.size()) * parts)), [&](int) {
    GateUp worker(layer);
    for (Range task = queue.next(); !task.empty(); task = queue.next()) {
      const int64_t begin = task.begin % parts * columns;
      worker.run(blocks[size_t(task.begin / parts)], {begin, std::min(columns, args.intermediate - begin)});
    }
  });
}

void down_combine_phase(const Layer& layer, int threads) {
  const ExpertsArguments& args = layer.args;
  // Wide, to read long stretches of weights, as far as the owner's buffer, which has a row for every slot, stays small.
  constexpr int64_t kUnit = 8, kMinTarget = 48, kMaxTarget = 192, kBufferBytes = 1 << 20;
  const int64_t rows = std::max<int64_t>(layer.plan.offsets[args.experts], 1);
  const int64_t target = std::clamp(kBufferBytes / (rows * layer.sum_size), kMinTarget, kMaxTarget);
  const int64_t columns = task_columns(args.hidden, kUnit, target, 1, threads);
  const int64_t parts = ceil_div(args.hidden, columns);

  DynamicTasks queue(parts);
  parallel_region(int(std::min<int64_t>(threads, parts)), [&](int) {
    const DownCombine worker(layer);
    for (Range task = queue.next(); !task.empty(); task = queue.next()) {
      const int64_t begin = task.begin * columns;
      worker.run({begin, std::min(columns, args.hidden - begin)});
    }
  });
}

}  // namespace

void run_experts(const ExpertsArguments& args, const ChunkPlan& plan) {
  const LevelTable& table = level_table(args.dtype);
  const DenseGemm& gemm = *table.dense_gemm->by_dtype[int(args.dtype)];
  const int64_t total = plan.offsets[args.experts];
  const int threads = num_threads();

  Layer layer{args, plan, table, gemm, size_of(args.dtype), accumulator_size(args.dtype), {}, {}, nullptr};
  const int64_t row_bytes = layer.activation_row_bytes();
  layer.down_blocks = cut_rows(plan.offsets, args.experts, block_rows(row_bytes, cache_sizes().l2));
  layer.down_block_of_row.resize(size_t(total));
  for (size_t i = 0; i < layer.down_blocks.size(); ++i)
    std::fill_n(layer.down_block_of_row.begin() + layer.down_blocks[i].begin, layer.down_blocks[i].rows, int64_t(i));
  std::unique_ptr<char, decltype(&std::free)> activations(
      static_cast<char*>(std::aligned_alloc(64, size_t(ceil_div(total * row_bytes, 64) * 64 + 64))), std::free);
  if (!activations) throw std::bad_alloc();
  layer.activations = activations.get();

  gate_up_phase(layer, threads);
  down_combine_phase(layer, threads);
}

}  // namespace polymoe
