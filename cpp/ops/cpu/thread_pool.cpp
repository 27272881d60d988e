#include "ops/cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <memory>

#include "common/check.h"

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

// How often the caller looks for its workers before it offers them its own core: about 20 us. Yielding earlier would
// lose the core to other processes in every loop.
constexpr int spins_before_yield = 1024;

constexpr uint32_t one_phase = 1u << 12, inside = one_phase - 1;
constexpr int max_threads = 1024;

constexpr bool is_open(uint32_t state) { return (state & one_phase) != 0; }

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::clamp(CPU_COUNT(&set), 1, max_threads);
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, max_threads);
}

std::unique_ptr<ThreadPool>& pool_slot() {
  static std::unique_ptr<ThreadPool> slot = std::make_unique<ThreadPool>(usable_cores());
  return slot;
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads) {
  require(num_threads >= 1 && num_threads <= max_threads, "num_threads is ", num_threads, ", expected 1 to ",
          max_threads);
  threads_.reserve(static_cast<size_t>(num_threads_ - 1));
  for (int i = 1; i < num_threads_; ++i) threads_.emplace_back([this] { worker_loop(); });
}

ThreadPool::~ThreadPool() {
  stopping_.store(true, std::memory_order_relaxed);
  state_.fetch_add(one_phase);
  state_.notify_all();
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
  if (busy_.exchange(true, std::memory_order_acquire)) return call(context, 0, n);
  job_ = Job{call, context, n, std::max<int64_t>(1, grain)};
  next_.store(0, std::memory_order_relaxed);
  // Sequentially consistent, so that a worker about to sleep either sees the new state or is seen by notify_all.
  state_.fetch_add(one_phase);
  state_.notify_all();  // a plain load when nobody sleeps
  work(job_);
  uint32_t state = state_.fetch_add(one_phase, std::memory_order_acq_rel);
  for (int spins = 0; (state & inside) != 0; ++spins) {
    if (spins < spins_before_yield)
      pause_cpu();
    else
      std::this_thread::yield();
    state = state_.load(std::memory_order_acquire);
  }
  busy_.store(false, std::memory_order_release);
}

// Waits until a loop other than the one `seen` is open (or the pool stops).
uint32_t ThreadPool::next_state(uint32_t seen) const {
  const auto changed = [seen](uint32_t state) { return is_open(state) && (state & ~inside) != (seen & ~inside); };
  auto start = std::chrono::steady_clock::now();
  for (int spins = 1;; ++spins) {
    const uint32_t state = state_.load(std::memory_order_acquire);
    if (changed(state) || stopping_.load(std::memory_order_relaxed)) return state;
    pause_cpu();
    if (spins % 256 != 0 || std::chrono::steady_clock::now() - start < spin_time) continue;
    state_.wait(state);
    start = std::chrono::steady_clock::now();
  }
}

void ThreadPool::worker_loop() {
  uint32_t seen = 0;
  for (;;) {
    uint32_t state = next_state(seen);
    if (stopping_.load(std::memory_order_relaxed)) return;
    if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
    seen = state;
    work(job_);
    state_.fetch_sub(1, std::memory_order_release);
  }
}

ThreadPool& pool() { return *pool_slot(); }

void set_num_threads(int n) {
  require(n >= 0, "num_threads is ", n, ", expected 0 (one per usable core) or more");
  const int threads = n > 0 ? n : usable_cores();
  if (threads != pool().size()) pool_slot() = std::make_unique<ThreadPool>(threads);
}

int num_threads() { return pool().size(); }

}  // namespace hybrid::cpu
