// Checks of csrc/threads.cpp that need C++: exits 0 when all hold, else names the first that does not.
#include "threads.h"

#include <ATen/Parallel.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

using polymoe::DynamicTasks;
using polymoe::GuidedTasks;
using polymoe::num_threads;
using polymoe::parallel_region;
using polymoe::Range;

#define REQUIRE(condition)                                                \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::fprintf(stderr, "threads.cpp:%d: %s\n", __LINE__, #condition); \
      std::_Exit(1);                                                      \
    }                                                                     \
  } while (false)

// How often each task ran, and on how many threads they ran altogether.
struct Record {
  std::vector<int> runs;
  std::set<std::thread::id> threads;
};

Record run(int tasks) {
  Record record;
  record.runs.assign(tasks, 0);
  std::mutex mutex;
  std::atomic<int> started{0};
  const int parallel = std::min(tasks, num_threads());
  parallel_region(tasks, [&](int task) {
    // The first tasks wait until as many run at once as can: a pool that runs them one by one would never pass.
    if (started.fetch_add(1) < parallel)
      for (int patience = 0; started.load() < parallel && patience < 10000; ++patience)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const std::lock_guard<std::mutex> lock(mutex);
    ++record.runs[task];
    record.threads.insert(std::this_thread::get_id());
  });
  return record;
}

void every_task_runs_once() {
  for (int threads : {1, 2, 3, 4}) {
    at::set_num_threads(threads);
    REQUIRE(num_threads() == threads);
    for (int tasks : {0, 1, 2, 3, 4, 7, 12, 100}) {
      const Record record = run(tasks);
      for (int runs : record.runs) REQUIRE(runs == 1);
      REQUIRE(static_cast<int>(record.threads.size()) <= threads);
    }
    REQUIRE(static_cast<int>(run(threads).threads.size()) == threads);
  }
}

void nested_regions_are_serial() {
  at::set_num_threads(2);
  std::atomic<int> wrong{0}, inner{0};
  parallel_region(2, [&](int) {
    const std::thread::id outer = std::this_thread::get_id();
    if (num_threads() != 1) ++wrong;
    int expected = 0;
    parallel_region(3, [&](int task) {
      ++inner;
      if (std::this_thread::get_id() != outer || task != expected++) ++wrong;
    });
  });
  REQUIRE(wrong == 0);
  REQUIRE(inner == 6);
  REQUIRE(num_threads() == 2);
}

void exceptions_reach_the_caller() {
  for (int threads : {1, 2}) {
    at::set_num_threads(threads);
    for (int thrower : {0, 1}) {
      bool caught = false;
      try {
        parallel_region(2, [&](int task) {
          if (task == thrower) throw std::runtime_error("expected");
        });
      } catch (const std::runtime_error&) {
        caught = true;
      }
      REQUIRE(caught);
      REQUIRE(num_threads() == threads);
    }
  }
}

void dynamic_tasks_cover_the_range() {
  at::set_num_threads(4);
  for (int64_t chunk : {1, 3, 64}) {
    std::vector<std::atomic<int>> seen(1000);
    DynamicTasks tasks(static_cast<int64_t>(seen.size()));
    parallel_region(4, [&](int) {
      for (Range r = tasks.next(chunk); !r.empty(); r = tasks.next(chunk))
        for (int64_t i = r.begin; i < r.end; ++i) ++seen[i];
    });
    for (const std::atomic<int>& count : seen) REQUIRE(count == 1);
    REQUIRE(tasks.next(chunk).empty());
  }
  REQUIRE(DynamicTasks(0).next().empty());
}

void guided_tasks_cover_the_range() {
  for (int threads : {1, 2, 3, 4}) {
    at::set_num_threads(threads);
    for (size_t count : {1, 2, 5, 16, 1000}) {
      std::vector<std::atomic<int>> seen(count);
      GuidedTasks tasks(static_cast<int64_t>(count), threads);
      parallel_region(threads, [&](int) {
        for (Range r = tasks.next(); !r.empty(); r = tasks.next())
          for (int64_t i = r.begin; i < r.end; ++i) ++seen[i];
      });
      for (const std::atomic<int>& times : seen) REQUIRE(times == 1);
      REQUIRE(tasks.next().empty());
    }
    REQUIRE(GuidedTasks(0, threads).next().empty());
  }
}

void guided_tasks_know_the_one_after() {
  for (int threads : {1, 2, 4}) {
    at::set_num_threads(threads);
    for (size_t count : {0, 1, 2, 5, 16, 1000}) {
      std::vector<std::atomic<int>> seen(count);
      GuidedTasks tasks(static_cast<int64_t>(count), threads);
      parallel_region(threads, [&](int) {
        int64_t expected = -1;
        tasks.run([&](int64_t task, int64_t after) {
          REQUIRE(expected < 0 || task == expected);
          REQUIRE(after < 0 || after > task);
          ++seen[size_t(task)];
          expected = after;
        });
        REQUIRE(expected < 0);  // nothing that was announced is left out
      });
      for (const std::atomic<int>& times : seen) REQUIRE(times == 1);
    }
  }
}

void guided_tasks_shrink() {
  GuidedTasks tasks(1000, 2);
  int64_t end = 0, size = 1000;
  for (Range r = tasks.next(); !r.empty(); r = tasks.next()) {
    REQUIRE(r.begin == end);
    REQUIRE(r.end - r.begin <= size);
    end = r.end;
    size = r.end - r.begin;
  }
  REQUIRE(end == 1000);
  REQUIRE(size == 1);  // the last ones are handed out one by one, so that all threads finish together
}

void concurrent_callers_do_not_mix() {
  at::set_num_threads(2);
  std::vector<std::thread> callers;
  std::atomic<int> total{0};
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) parallel_region(5, [&](int) { ++total; });
    });
  for (std::thread& caller : callers) caller.join();
  REQUIRE(total == 4 * 50 * 5);
}

void forked_child_runs_serially() {
  at::set_num_threads(2);
  run(2);  // the pool's threads exist now, and the child will not have them
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    int count = 0;
    parallel_region(4, [&](int) { ++count; });
    std::_Exit(polymoe::in_forked_child() && num_threads() == 1 && count == 4 ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  REQUIRE(!polymoe::in_forked_child() && num_threads() == 2);
}

int main() {
  every_task_runs_once();
  nested_regions_are_serial();
  exceptions_reach_the_caller();
  dynamic_tasks_cover_the_range();
  guided_tasks_cover_the_range();
  guided_tasks_know_the_one_after();
  guided_tasks_shrink();
  concurrent_callers_do_not_mix();
  forked_child_runs_serially();
}
