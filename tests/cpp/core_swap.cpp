// What a preempted request has computed waits on the host and comes back (S47, P17).
#include "core_harness.h"

namespace hybrid::test {
namespace {

Config tight_config() {
  Config config = small_config();
  config.num_blocks = 8;
  config.max_model_len = 32;
  config.num_host_blocks = 64;
  return config;
}

// Long requests that cannot all stay: prompts of 8, sampled or n = 2 here and there.
std::vector<RequestSpec> crowd(const std::vector<std::vector<Token>>& prompts) {
  std::vector<RequestSpec> specs;
  for (size_t i = 0; i < prompts.size(); ++i) {
    RequestSpec spec{.id = 10 * (i + 1), .tokens = prompts[i], .n = i % 3 == 2 ? 2 : 1, .max_tokens = 20};
    spec.sampling.seed = i;
    specs.push_back(spec);
  }
  return specs;
}

std::vector<std::vector<Token>> different_prompts(size_t count) {
  std::vector<std::vector<Token>> prompts;
  for (size_t i = 0; i < count; ++i) prompts.push_back(counting(8, static_cast<Token>(3 * i)));
  return prompts;
}

void expect_the_reference(Machine& m, const std::vector<RequestSpec>& specs, const Config& config) {
  for (const RequestSpec& spec : specs)
    for (int64_t choice = 0; choice < spec.n; ++choice)
      EXPECT_EQ(m.results[spec.id + static_cast<RequestId>(choice)].tokens, reference(spec, choice, config).tokens)
          << "request " << spec.id << ", choice " << choice;
}

TEST(Swap, every_token_is_the_references_in_a_pool_of_8_blocks_whatever_the_depth) {  // F-19, S47
  for (const int64_t depth : {1, 2}) {
    for (const bool prefixes : {true, false}) {
      Config config = tight_config();
      config.depth = depth;
      config.enable_prefix_caching = prefixes;
      const auto prompts = different_prompts(32);
      const auto specs = crowd(prompts);
      Machine m(config);
      for (const RequestSpec& spec : specs) m.add(spec);
      m.run();
      expect_the_reference(m, specs, config);
      const Stats stats = m.scheduler.stats();
      EXPECT_GT(stats.num_preemptions, 10);
      EXPECT_GT(stats.blocks_swapped_out, 20);
      EXPECT_GT(stats.blocks_swapped_in, 20);
      EXPECT_EQ(stats.host_blocks_used, 0);
      EXPECT_EQ(stats.blocks_used, 0);
    }
  }
}

TEST(Swap, no_token_is_computed_twice_with_room_on_the_host) {
  for (const int64_t depth : {1, 2}) {
    Config config = tight_config();
    config.depth = depth;
    config.enable_prefix_caching = false;
    const auto prompts = different_prompts(6);
    int64_t tokens[2];
    for (const bool swaps : {false, true}) {
      config.num_host_blocks = swaps ? 64 : 0;
      Machine m(config);
      for (size_t i = 0; i < prompts.size(); ++i) m.add(i + 1, prompts[i], 20);
      m.run();
      EXPECT_GT(m.scheduler.stats().num_preemptions, 0);
      tokens[swaps] = m.scheduler.stats().step_tokens;
    }
    EXPECT_EQ(tokens[true], std::ssize(prompts) * (8 + 20 - 1));  // the last token is picked, not computed
    EXPECT_GT(tokens[false], tokens[true]);
  }
}

TEST(Swap, goes_out_before_the_blocks_are_written_again_and_comes_back_where_new_ones_are) {
  Machine m(tight_config());
  const auto first = counting(12), second = counting(12, 5);
  m.add(1, first, 20);
  m.add(2, second, 20);
  Batch batch = m.step();
  while (batch.num_swap_outs == 0) batch = m.step();
  EXPECT_EQ(batch.num_swap_ins, 0);
  EXPECT_EQ(m.scheduler.stats().num_swapped, 1);
  EXPECT_EQ(m.scheduler.stats().host_blocks_used, batch.num_swap_outs);
  const auto out = m.column<int32_t>(batch, Col::swap_src, batch.num_swap_outs);
  const auto slots = m.column<int64_t>(batch, Col::slots, batch.num_tokens);
  EXPECT_TRUE(std::ranges::any_of(slots, [&](int64_t slot) {
    return std::ranges::find(out, static_cast<int32_t>(slot / 4)) != out.end();
  })) << "the one that stays writes a block that the other one leaves, in this very batch";
  while (batch.num_swap_ins == 0) batch = m.step();
  EXPECT_EQ(batch.num_swap_outs, 0);
  EXPECT_EQ(m.scheduler.stats().num_swapped, 0);
  m.run();
}

TEST(Swap, what_others_hold_at_the_beginning_stays_behind) {
  Config config = tight_config();
  config.max_num_seqs = 2;
  Machine m(config);
  const auto prompt = counting(9);  // two blocks that both share
  m.add(1, prompt, 20);
  m.step();
  m.add(2, prompt, 20);
  Batch batch = m.step();
  while (batch.num_swap_outs == 0) batch = m.step();
  const Request& away = *m.find(2);
  EXPECT_EQ(away.first_on_host, 2);
  EXPECT_EQ(batch.num_swap_outs, config.blocks_for(away.num_on_host) - 2);
  m.run();
  EXPECT_EQ(m.results[2].tokens, reference({.id = 2, .tokens = prompt, .max_tokens = 20}, 0, config).tokens);
}

TEST(Swap, is_not_used_where_computing_again_costs_less_or_the_host_is_full) {
  for (const bool dear : {true, false}) {
    Config config = tight_config();
    config.swap_cost = dear ? config.block_size : 0;
    config.num_host_blocks = dear ? 64 : 1;
    const auto prompts = different_prompts(8);
    const auto specs = crowd(prompts);
    Machine m(config);
    for (const RequestSpec& spec : specs) m.add(spec);
    m.run();
    expect_the_reference(m, specs, config);
    EXPECT_GT(m.scheduler.stats().num_preemptions, 0);
    EXPECT_EQ(m.scheduler.stats().blocks_swapped_out, 0);
  }
}

TEST(Swap, a_request_that_is_aborted_on_the_host_gives_its_blocks_back) {
  Machine m(tight_config());
  const auto first = counting(12), second = counting(12, 5);
  m.add(1, first, 20);
  m.add(2, second, 20);
  while (m.scheduler.stats().num_swapped == 0) m.step();
  const RequestId id = 2;
  EXPECT_EQ(m.scheduler.abort({&id, 1}), 1);
  EXPECT_EQ(m.scheduler.stats().host_blocks_used, 0);
  m.scheduler.check_invariants();
  m.run();
}

TEST(Swap, kv_of_before_forget_prefixes_comes_back_but_is_found_by_nobody) {  // S15
  Machine m(tight_config());
  const auto first = counting(12), second = counting(12, 5);
  m.add(1, first, 20);
  m.add(2, second, 20);
  while (m.scheduler.stats().num_swapped == 0) m.step();
  m.scheduler.forget_prefixes();
  while (m.scheduler.stats().blocks_swapped_in == 0) m.step();
  EXPECT_FALSE(m.find(2)->may_publish);
  EXPECT_EQ(m.find(2)->num_published, 0);
  m.run();
  EXPECT_EQ(m.results[2].tokens, reference({.id = 2, .tokens = second, .max_tokens = 20}, 0, tight_config()).tokens);
}

TEST(Swap, blocks_on_the_host_are_accounted_for) {
  Machine m(tight_config());
  std::vector<BlockId> stray;
  SchedulerTest::host_pool(m.scheduler).allocate(1, stray);
  EXPECT_THROW(m.scheduler.check_invariants(), InternalError);
}

}  // namespace
}  // namespace hybrid::test
