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

// Runs `work` on this many threads, the caller's among them.
template <class Work>
void run_on_threads(int threads, const Work& work) {
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto guarded = [&] {
    inside_region = true;
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
    inside_region = false;
  };
  std::vector<std::thread> helpers(threads - 1);
  for (std::thread& helper : helpers) helper = std::thread(guarded);
  guarded();
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}
#else
bool in_region() { return at::in_parallel_region(); }

template <class Work>
void run_on_threads(int threads, const Work& work) {
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
}
#endif

}  // namespace

bool in_forked_child() { return forked_child.load(std::memory_order_relaxed); }

int num_threads() { return in_forked_child() || in_region() ? 1 : at::get_num_threads(); }

void parallel_region(int tasks, TaskRef fn) {
  const int threads = std::min(tasks, num_threads());
  if (threads <= 1) {
    for (int task = 0; task < tasks; ++task) fn(task);
    return;
  }
  // A thread that wakes late must not hold up the tasks: whoever is there takes the next one.
  DynamicTasks numbers(tasks);
  run_on_threads(threads, [&] {
    for (Range r = numbers.next(); !r.empty(); r = numbers.next()) fn(static_cast<int>(r.begin));
  });
}

}  // namespace polymoe
