// Parallel work on torch's intra-op thread pool, so that torch.set_num_threads is honoured.
//
//   DynamicTasks blocks(count);
//   parallel_region(num_threads(), [&](int task) {
//     for (Range r = blocks.next(4); !r.empty(); r = blocks.next(4))
//       for (int64_t i = r.begin; i < r.end; ++i) ...
//   });
//
// Which thread computes what may vary between runs, so a result must not depend on it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace polymoe {

// A reference to a callable void(int), valid while the callable lives: no allocation, unlike std::function.
class TaskRef {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, TaskRef>>>
  TaskRef(F&& callable)  // NOLINT: implicit, so that a lambda can be passed
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(callable)))),
        call_([](void* object, int task) { (*static_cast<std::remove_reference_t<F>*>(object))(task); }) {}
  void operator()(int task) const { call_(object_, task); }

 private:
  void* object_;
  void (*call_)(void*, int);
};

// Threads a parallel_region started here can use: torch.get_num_threads(), but 1 inside a parallel region and in a
// forked child.
int num_threads();

// True in a process forked from one that had loaded this library. Torch's pool does not survive a fork and would
// wait for its lost threads for ever, so parallel_region runs serially there.
bool in_forked_child();

// Calls fn(task) once for each task in [0, tasks), at most num_threads() at a time, and returns when all are done.
// Tasks must not wait for one another: with fewer threads than tasks some run one after the other. Within a region,
// and in a forked child, tasks run serially in ascending order. The first exception is rethrown here.
void parallel_region(int tasks, TaskRef fn);

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// Hands out [0, count) in ascending chunks to whichever thread asks.
class DynamicTasks {
 public:
  explicit DynamicTasks(int64_t count) : count_(count) {}
  // The next at most `chunk` indices; empty when none is left.
  Range next(int64_t chunk = 1) {
    const int64_t begin = next_.fetch_add(chunk, std::memory_order_relaxed);
    return {std::min(begin, count_), std::min(begin + chunk, count_)};
  }

 private:
  // A cache line of its own: threads write it all the time.
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) int64_t count_;
};

// Hands out [0, count) in ascending chunks that shrink as the end comes near: a thread works on long runs of
// neighbours, and all finish together.
class GuidedTasks {
 public:
  GuidedTasks(int64_t count, int threads) : count_(count), shares_(4 * threads) {}
  // f(task, the task after it on this thread, or -1) until nothing is left. A range is taken before the last task of
  // the one before is done, so that what it needs can be fetched meanwhile.
  template <class F>
  void run(F&& f) {
    for (Range range = next(), after; !range.empty(); range = after) {
      for (int64_t task = range.begin; task + 1 < range.end; ++task) f(task, task + 1);
      after = next();
      f(range.end - 1, after.empty() ? -1 : after.begin);
    }
  }

  // Empty when nothing is left.
  Range next() {
    int64_t begin = next_.load(std::memory_order_relaxed), end;
    do {
      end = begin + (count_ - begin + shares_ - 1) / shares_;
    } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return {begin, end};
  }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) int64_t count_;
  int64_t shares_;
};

}  // namespace polymoe
