// Two batches in flight: the second names tokens that it does not know yet.
#include <cstdlib>
#include <new>

#include "core_harness.h"

namespace {
int64_t num_allocations = 0;
}

// Counts what schedule() and commit() allocate.
[[gnu::noinline]] void* operator new(size_t size) {
  ++num_allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace hybrid::test {
namespace {

Config overlapped() {
  Config config = small_config();
  config.depth = 2;
  return config;
}

TEST(Overlap, the_second_batch_names_the_rows_of_the_first) {
  Machine m(overlapped());
  const auto first = counting(3), second = counting(5, 8);
  m.add(1, first, 4);
  m.add(2, second, 4);
  ASSERT_EQ(m.schedule()->num_sampled, 2);
  const Batch batch = *m.schedule();
  EXPECT_EQ(batch.num_decodes, 2);
  EXPECT_EQ(m.column<int32_t>(batch, Col::token_ids, 2), (std::vector<int32_t>{-1, -2}));
  EXPECT_EQ(m.column<int32_t>(batch, Col::positions, 2), (std::vector<int32_t>{3, 5}));
  EXPECT_EQ(m.schedule(), nullptr) << "two are in flight";
  m.commit();
  EXPECT_EQ(m.schedule()->num_seqs, 2);
  m.run();
}

TEST(Overlap, a_request_is_not_scheduled_past_its_last_token) {
  Machine m(overlapped());
  const auto prompt = counting(3);
  m.add(1, prompt, 1);
  EXPECT_NE(m.schedule(), nullptr);
  EXPECT_EQ(m.schedule(), nullptr);
  m.commit();
  EXPECT_TRUE(m.scheduler.idle());
}

TEST(Overlap, a_request_that_stopped_keeps_its_blocks_until_its_last_batch_is_committed) {
  const auto prompt = counting(3);
  const Config config = overlapped();
  const Token stop = reference({.tokens = prompt}, 0, config).tokens[0];
  Machine m(config);
  m.add({.id = 1, .tokens = prompt, .stop_token_ids = {stop}});
  m.schedule();
  m.schedule();
  EXPECT_EQ(m.commit().finish[0], FinishReason::stop);
  EXPECT_EQ(m.scheduler.stats().blocks_used, 1);
  EXPECT_FALSE(m.scheduler.idle());
  EXPECT_EQ(m.commit().num_rows, 0) << "the row behind the stop token is dropped";
  EXPECT_EQ(m.scheduler.stats().blocks_used, 0);
  EXPECT_TRUE(m.scheduler.idle());
}

TEST(Overlap, penalties_wait_for_the_token_they_depend_on) {
  Machine m(overlapped());
  const auto prompt = counting(3);
  m.add({.id = 1, .tokens = prompt, .max_tokens = 4, .presence_penalty = 1});
  EXPECT_NE(m.schedule(), nullptr);
  EXPECT_EQ(m.schedule(), nullptr);
  m.run();
  EXPECT_EQ(m.results[1].tokens,
            reference({.tokens = prompt, .max_tokens = 4, .presence_penalty = 1}, 0, overlapped()).tokens);
}

TEST(Overlap, the_same_requests_give_the_same_tokens_at_depth_1_and_2_and_in_any_pool) {  // B31, S7
  const auto run = [](int64_t depth, int64_t num_blocks) {
    Config config = small_config();
    config.depth = depth;
    config.num_blocks = num_blocks;
    Machine m(config);
    std::vector<std::vector<Token>> prompts;
    for (int i = 0; i < 8; ++i) prompts.push_back(counting(3 + 4 * i, static_cast<Token>(i % 3)));
    for (RequestId id = 0; id < 8; ++id)
      m.add({.id = 10 * id,
             .tokens = prompts[id],
             .n = 1 + static_cast<int64_t>(id) % 3,
             .max_tokens = 12,
             .stop_token_ids = {3},
             .presence_penalty = id % 2 ? 0.5 : 0});
    m.run();
    std::map<RequestId, std::vector<Token>> tokens;
    for (const auto& [id, result] : m.results) tokens[id] = result.tokens;
    return std::pair(tokens, m.scheduler.stats().num_preemptions);
  };
  const auto [tokens, none] = run(1, 200);
  EXPECT_EQ(none, 0);
  EXPECT_EQ(tokens.size(), 15U);
  EXPECT_EQ(run(2, 200).first, tokens);
  for (const int64_t depth : {1, 2}) {
    const auto [again, num_preemptions] = run(depth, 13);
    EXPECT_EQ(again, tokens);
    EXPECT_GT(num_preemptions, 0);
  }
}

TEST(Overlap, schedule_and_commit_allocate_nothing_in_the_steady_state) {
  for (const int64_t depth : {1, 2}) {
    Config config = small_config();
    config.depth = depth;
    config.max_num_seqs = 16;
    config.num_blocks = 400;
    config.max_model_len = 120;
    const Arenas arenas(config);
    Scheduler scheduler(config, arenas.pointers());
    const auto prompt = counting(5);
    for (RequestId id = 0; id < 16; ++id) scheduler.add({.id = id, .tokens = prompt, .max_tokens = 100});
    const std::vector<Token> picked(16, 7);
    int64_t before = 0;
    Batch flying[2];
    int64_t scheduled = 0, committed = 0;
    while (committed < 90) {
      if (committed == 10) before = num_allocations;
      while (const Batch* batch = scheduler.schedule()) flying[scheduled++ % 2] = *batch;
      const Batch& batch = flying[committed++ % 2];
      scheduler.commit(batch.step, std::span(picked).first(static_cast<size_t>(batch.num_sampled)));
    }
    EXPECT_EQ(num_allocations, before) << "depth " << depth;
  }
}

}  // namespace
}  // namespace hybrid::test
