#include "threads.h"

#include <ATen/Parallel.h>
#include <pthread.h>

#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace polymoe {
namespace {

std::atomic<bool> forked_child{false};

[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forked_child.store(true, std::memory_order_relaxed); });

#if defined(POLYMOE_STD_THREADS)
// For ThreadSanitizer, which cannot see the synchronisation inside an uninstrumented OpenMP runtime.
thread_local bool inside_region = false;

bool in_region() { return inside_region; }

void run_on_pool(int tasks, TaskRef fn) {
  DynamicTasks numbers(tasks);
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&] {
    inside_region = true;
    try {
      for (Range r = numbers.next(); !r.empty(); r = numbers.next()) fn(static_cast<int>(r.begin));
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
    inside_region = false;
  };
  std::vector<std::thread> helpers(std::min(tasks, at::get_num_threads()) - 1);
  for (std::thread& helper : helpers) helper = std::thread(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}
#else
bool in_region() { return at::in_parallel_region(); }

void run_on_pool(int tasks, TaskRef fn) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) fn(static_cast<int>(task));
  });
}
#endif

}  // namespace

bool in_forked_child() { return forked_child.load(std::memory_order_relaxed); }

int num_threads() { return in_forked_child() || in_region() ? 1 : at::get_num_threads(); }

void parallel_region(int tasks, TaskRef fn) {
  if (tasks > 1 && num_threads() > 1) return run_on_pool(tasks, fn);
  for (int task = 0; task < tasks; ++task) fn(task);
}

}  // namespace polymoe
