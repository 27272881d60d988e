// n > 1: choices of one prompt (B7).
#include "core_harness.h"

namespace hybrid::test {
namespace {

void expect_reference(Machine& m, const RequestSpec& spec, const Config& config) {
  for (int64_t i = 0; i < spec.n; ++i)
    EXPECT_EQ(m.results[spec.id + static_cast<RequestId>(i)].tokens, reference(spec, i, config).tokens)
        << "choice " << i;
}

TEST(Fork, choices_share_all_prompt_blocks_and_copy_the_partial_one) {
  const Config config = small_config();
  Machine m(config);
  const auto prompt = counting(10);
  const RequestSpec spec{.id = 1, .tokens = prompt, .n = 3, .max_tokens = 8};
  m.add(spec);
  EXPECT_EQ(m.scheduler.stats().num_waiting, 3);
  EXPECT_EQ(m.step().num_seqs, 1) << "the others wait for the prompt";
  EXPECT_EQ(m.scheduler.stats().blocks_used, 3);
  const Batch batch = m.step();
  EXPECT_EQ(batch.num_seqs, 3);
  EXPECT_EQ(batch.num_tokens, 3) << "a choice computes the last prompt token alone";
  EXPECT_EQ(batch.num_copies, 2);
  EXPECT_EQ(m.scheduler.stats().blocks_used, 5);
  EXPECT_EQ(m.column<int32_t>(batch, Col::copy_src, 2), (std::vector<int32_t>{2, 2}));
  EXPECT_EQ(m.column<int32_t>(batch, Col::positions, 3), (std::vector<int32_t>{10, 9, 9}));
  m.run();
  expect_reference(m, spec, config);
  EXPECT_EQ(m.results[2].cached_tokens, 9);
  EXPECT_NE(m.results[1].tokens, m.results[2].tokens) << "choices have seeds of their own";
  EXPECT_NE(m.results[2].tokens, m.results[3].tokens);
}

TEST(Fork, a_prompt_that_fills_its_blocks_is_copied_too_and_one_token_more_needs_no_copy) {
  for (const int64_t length : {8, 9}) {
    const Config config = small_config();
    Machine m(config);
    const auto prompt = counting(length);
    const RequestSpec spec{.id = 1, .tokens = prompt, .n = 2, .max_tokens = 6};
    m.add(spec);
    m.step();
    EXPECT_EQ(m.step().num_copies, length == 8);
    m.run();
    expect_reference(m, spec, config);
  }
}

TEST(Fork, works_without_prefix_caching) {
  Config config = small_config();
  config.enable_prefix_caching = false;
  Machine m(config);
  const auto prompt = counting(10);
  const RequestSpec spec{.id = 1, .tokens = prompt, .n = 4, .max_tokens = 8};
  m.add(spec);
  m.run();
  expect_reference(m, spec, config);
  EXPECT_EQ(m.results[4].cached_tokens, 9);
}

TEST(Fork, more_choices_than_fit_at_once_follow_later) {
  Config config = small_config();
  config.max_num_seqs = 4;
  config.num_blocks = 5;
  Machine m(config);
  const auto prompt = counting(6);
  const RequestSpec spec{.id = 1, .tokens = prompt, .n = 4, .max_tokens = 9};
  m.add(spec);
  m.run();
  expect_reference(m, spec, config);
}

TEST(Fork, the_others_run_when_the_first_is_aborted_before_during_or_after_its_prompt) {  // S8
  const std::vector<RequestId> first{1};
  for (int when = 0; when < 4; ++when) {
    const Config config = small_config();
    Machine m(config);
    const auto prompt = counting(30);
    const RequestSpec spec{.id = 1, .tokens = prompt, .n = 3, .max_tokens = 4};
    m.add(spec);
    if (when == 1) m.step();
    if (when == 2) m.schedule();
    if (when == 3) m.step(), m.step();
    m.scheduler.abort(first);
    m.scheduler.check_invariants();
    if (when == 2) m.commit();
    m.run();
    for (int64_t i = 1; i < 3; ++i)
      EXPECT_EQ(m.results[1 + static_cast<RequestId>(i)].tokens, reference(spec, i, config).tokens)
          << when << ", choice " << i;
  }
}

TEST(Fork, the_others_run_when_the_first_needs_one_token_only) {
  const Config config = small_config();
  Machine m(config);
  const auto prompt = counting(10);
  const RequestSpec spec{.id = 1, .tokens = prompt, .n = 3, .max_tokens = 1};
  m.add(spec);
  m.run();
  expect_reference(m, spec, config);
  EXPECT_EQ(m.results[2].cached_tokens, 8) << "the first one is gone, its full blocks are in the cache";
}

TEST(Fork, a_choice_can_be_aborted_while_it_is_held) {
  const Config config = small_config();
  Machine m(config);
  const auto prompt = counting(10);
  m.add({.id = 1, .tokens = prompt, .n = 3, .max_tokens = 4});
  const std::vector<RequestId> second{2};
  EXPECT_EQ(m.scheduler.abort(second), 1);
  m.run();
  EXPECT_EQ(m.results.count(2), 0U);
  EXPECT_EQ(m.results[3].tokens.size(), 4U);
}

TEST(Fork, choices_of_a_preempted_first_one_find_its_blocks_in_the_cache) {
  Config config = small_config();
  config.num_blocks = 8;
  config.max_num_seqs = 2;
  Machine m(config);
  const auto prompt = counting(9), rival = counting(9, 16);
  m.add({.id = 9, .tokens = rival, .priority = -1, .max_tokens = 20});
  const RequestSpec spec{.id = 1, .tokens = prompt, .n = 2, .max_tokens = 12};
  m.add(spec);
  m.run();
  EXPECT_GT(m.scheduler.stats().num_preemptions, 0);
  expect_reference(m, spec, config);
}

// The first choice comes back in the step in which another request computes the very prefix that it then finds: what
// the others would copy from it is not there yet.
TEST(Fork, a_choice_that_follows_a_returning_first_one_copies_nothing_that_is_still_being_computed) {
  Config config = small_config();
  config.num_blocks = 64;
  Machine m(config);
  const auto prompt = counting(6), other = counting(3, 20);
  const RequestSpec two{.id = 1, .tokens = prompt, .n = 2, .max_tokens = 8};
  m.scheduler.limit_running(1);
  m.add(two);
  for (int i = 0; i < 3; ++i) m.step();
  m.scheduler.limit_running(2);
  m.add({.id = 5, .tokens = other, .priority = -1, .max_tokens = 2});
  m.step();
  m.scheduler.limit_running(1);  // preempts the first choice; the second one has not run yet
  m.step();
  EXPECT_EQ(m.scheduler.stats().num_running, 0);
  EXPECT_TRUE(m.scheduler.forget_prefixes());
  m.scheduler.limit_running(4);
  const auto first = reference(two, 0, config).tokens;
  auto same = prompt;
  same.insert(same.end(), first.begin(), first.begin() + 4);
  const RequestSpec ahead{.id = 7, .tokens = same, .priority = -1, .max_tokens = 3};
  m.add(ahead);
  const Batch batch = m.step();
  EXPECT_EQ(batch.num_seqs, 3);
  EXPECT_LT(batch.num_tokens, 10 + 10 + 6);  // the first choice found what the request ahead of it computes
  m.run();
  EXPECT_EQ(m.results[7].tokens, reference(ahead, 0, config).tokens);
  for (int64_t choice : {0, 1})
    EXPECT_EQ(m.results[1 + static_cast<RequestId>(choice)].tokens, reference(two, choice, config).tokens) << choice;
}

}  // namespace
}  // namespace hybrid::test
