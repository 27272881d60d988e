#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "ops/cpu/thread_pool.h"

namespace hybrid::cpu {
namespace {

// Adds 1 to each index of the loop; the vector belongs to one loop, so a late worker of the loop before would be seen.
void expect_each_index_once(ThreadPool& pool, int64_t n, int64_t grain) {
  std::vector<int> visits(static_cast<size_t>(n), 0);
  pool.parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
  });
  for (int64_t i = 0; i < n; ++i) ASSERT_EQ(visits[static_cast<size_t>(i)], 1) << "index " << i << " of " << n;
}

TEST(ThreadPool, visits_every_index_exactly_once) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    for (int64_t n : {0, 1, 2, 7, 64, 1000})
      for (int64_t grain : {1, 3, 64, 5000}) expect_each_index_once(pool, n, grain);
  }
}

// More threads than cores: workers lose their core between any two instructions, many wake for a loop that has ended.
TEST(ThreadPool, survives_many_short_loops_with_more_threads_than_cores) {
  ThreadPool pool(8);
  for (int i = 0; i < 5000; ++i) expect_each_index_once(pool, 2 + i % 17, 1);
}

TEST(ThreadPool, hands_out_pieces_of_at_most_the_grain) {
  ThreadPool pool(3);
  std::atomic<int64_t> longest{0};
  pool.parallel_for(100, 7, [&](int64_t begin, int64_t end) {
    int64_t seen = longest.load();
    while (end - begin > seen && !longest.compare_exchange_weak(seen, end - begin)) {
    }
  });
  EXPECT_EQ(longest.load(), 7);
}

TEST(ThreadPool, uses_its_workers) {
  ThreadPool pool(2);
  std::atomic<bool> other_came{false};
  const auto caller = std::this_thread::get_id();
  // The caller stays in its piece until the worker has taken one: without a worker this would not end.
  pool.parallel_for(2, 1, [&](int64_t, int64_t) {
    if (std::this_thread::get_id() != caller) other_came = true;
    while (!other_came) std::this_thread::yield();
  });
  EXPECT_TRUE(other_came);
}

TEST(ThreadPool, runs_a_loop_inside_a_loop_on_the_thread_it_is_called_from) {
  ThreadPool pool(2);
  std::atomic<int64_t> sum{0};
  std::atomic<bool> moved{false};
  pool.parallel_for(8, 1, [&](int64_t, int64_t) {
    const auto outer = std::this_thread::get_id();
    pool.parallel_for(10, 1, [&](int64_t begin, int64_t end) {
      moved = moved || std::this_thread::get_id() != outer;
      sum += end - begin;
    });
  });
  EXPECT_EQ(sum, 80);
  EXPECT_FALSE(moved);
}

TEST(ThreadPool, serves_several_callers_at_once) {
  ThreadPool pool(2);
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i)
    callers.emplace_back([&] {
      for (int j = 0; j < 500; ++j) expect_each_index_once(pool, 20, 1);
    });
  for (auto& caller : callers) caller.join();
}

TEST(ThreadPool, wakes_workers_that_have_gone_to_sleep) {
  ThreadPool pool(2);
  for (int i = 0; i < 3; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // past the workers' spinning: the state under test
    std::atomic<bool> other_came{false};
    const auto caller = std::this_thread::get_id();
    pool.parallel_for(2, 1, [&](int64_t, int64_t) {
      if (std::this_thread::get_id() != caller) other_came = true;
      while (!other_came) std::this_thread::yield();
    });
  }
}

TEST(ThreadPool, changes_its_number_of_threads_and_refuses_nonsense) {
  set_num_threads(3);
  EXPECT_EQ(num_threads(), 3);
  set_num_threads(0);
  EXPECT_GE(num_threads(), 1);
  EXPECT_THROW(set_num_threads(-1), std::invalid_argument);
  EXPECT_THROW(ThreadPool(0), std::invalid_argument);
}

}  // namespace
}  // namespace hybrid::cpu
