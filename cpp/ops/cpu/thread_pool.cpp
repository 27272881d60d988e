#include "ops/cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>

namespace hybrid::cpu {

namespace {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// How long a worker spins for the next loop before it sleeps: longer than the gaps inside a decode step (Python between
// two ops, some 20 us), short enough that an idle server costs nothing.
constexpr auto spin_time = std::chrono::microseconds(200);

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

std::unique_ptr<ThreadPool>& pool_slot() {
  static std::unique_ptr<ThreadPool> slot = std::make_unique<ThreadPool>(usable_cores());
  return slot;
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(std::max(1, num_threads)) {
  threads_.reserve(static_cast<size_t>(num_threads_ - 1));
  for (int i = 1; i < num_threads_; ++i) threads_.emplace_back([this] { worker_loop(); });
}

ThreadPool::~ThreadPool() {
  stopping_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void ThreadPool::work(const Job& job) {
  for (;;) {
    const int64_t begin = next_.fetch_add(job.grain, std::memory_order_relaxed);
    if (begin >= job.n) return;
    job.call(job.context, begin, std::min(begin + job.grain, job.n));
  }
}

void ThreadPool::run(int64_t n, int64_t grain, Call call, const void* context) {
  job_ = Job{call, context, n, std::max<int64_t>(1, grain)};
  next_.store(0, std::memory_order_relaxed);
  active_.store(num_threads_ - 1, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();  // a plain load when nobody sleeps
  work(job_);
  // Every worker must have left the job before its memory may change. A worker that the system has descheduled would be
  // waited for in vain by spinning alone, so give the core away after a while.
  for (int spins = 0; active_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < 4096)
      pause_cpu();
    else
      std::this_thread::yield();
  }
}

void ThreadPool::worker_loop() {
  uint32_t seen = 0;
  for (;;) {
    const auto start = std::chrono::steady_clock::now();
    for (int spins = 0; generation_.load(std::memory_order_acquire) == seen; ++spins) {
      pause_cpu();
      if (spins % 256 == 255 && std::chrono::steady_clock::now() - start > spin_time) generation_.wait(seen);
    }
    seen = generation_.load(std::memory_order_acquire);
    if (stopping_.load(std::memory_order_relaxed)) return;
    work(job_);
    active_.fetch_sub(1, std::memory_order_release);
  }
}

ThreadPool& pool() { return *pool_slot(); }
void set_num_threads(int n) { pool_slot() = std::make_unique<ThreadPool>(n > 0 ? n : usable_cores()); }
int num_threads() { return pool().size(); }

}  // namespace hybrid::cpu
