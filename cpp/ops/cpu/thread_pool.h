// ThreadPool: one spinning worker per core for loops of microseconds; knows ranges, not tensors.
//
// The caller is worker 0. A loop is published by one atomic store; workers spin for it for a short while (a decode step
// runs some 300 such loops back to back), then sleep on a futex. The caller waits for workers that have entered its
// loop, never for one that sleeps or has lost its core: an oversubscribed machine costs speed-up, not time slices.
// Results never depend on the number of threads: a body must write only what its indices own.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace hybrid::cpu {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return num_threads_; }

  // Calls body(begin, end) on disjoint ranges that cover [0, n); ranges are handed out in pieces of `grain`, in order.
  // Returns when all are done. While another caller's loop runs (or from inside a body) the caller does it all alone.
  // A body must not throw.
  template <class Body>
  void parallel_for(int64_t n, int64_t grain, const Body& body) {
    if (n <= 0) return;
    if (num_threads_ == 1 || n <= grain) return body(int64_t{0}, n);
    run(
        n, grain,
        [](const void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
        &body);
  }

 private:
  using Call = void (*)(const void*, int64_t, int64_t);
  struct Job {
    Call call;
    const void* context;
    int64_t n, grain;
  };
  void run(int64_t n, int64_t grain, Call call, const void* context);
  void work(const Job& job);
  void worker_loop();
  uint32_t next_state(uint32_t seen) const;

  int num_threads_;
  Job job_{};  // written by the caller while the loop is closed and empty, read by workers that have entered
  // Bits 0-11: workers inside the loop. Bits 12-31: odd while a loop is open; +1 when one opens and when it closes.
  // Workers enter by compare-and-swap, hence only an open loop; in one word, closing and entering cannot miss each
  // other.
  alignas(64) std::atomic<uint32_t> state_{0};
  alignas(64) std::atomic<int64_t> next_{0};  // first index not handed out
  alignas(64) std::atomic<bool> busy_{false};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> threads_;
};

// The process's pool. set_num_threads(0) takes the number of cores this process may use. Not while a loop runs.
ThreadPool& pool();
void set_num_threads(int n);
int num_threads();

// Grain of an elementwise loop over rows: one piece is worth some 4 us, less would not pay for waking a worker.
constexpr int64_t rows_per_piece(int64_t elements_per_row) {
  constexpr int64_t elements_per_piece = 16384;
  return elements_per_row >= elements_per_piece ? 1
                                                : elements_per_piece / (elements_per_row > 0 ? elements_per_row : 1);
}

}  // namespace hybrid::cpu
