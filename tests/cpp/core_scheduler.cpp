// The policy, as sentences.
#include "core_harness.h"

namespace hybrid::test {
namespace {

std::vector<Token> expected(const RequestSpec& spec, const Config& config, int64_t choice = 0) {
  return reference(spec, choice, config).tokens;
}

TEST(Scheduler, a_prompt_longer_than_the_budget_is_computed_in_chunks) {  // B2
  Machine m(small_config());
  const auto prompt = counting(40);
  m.add(1, prompt, 2);
  Batch batch = m.step();
  EXPECT_EQ(batch.num_tokens, 16);
  EXPECT_EQ(batch.num_sampled, 0);
  EXPECT_EQ(m.step().num_tokens, 16);
  batch = m.step();
  EXPECT_EQ(batch.num_tokens, 8);
  EXPECT_EQ(batch.num_sampled, 1);
  EXPECT_EQ(batch.max_seq_len, 40);
  EXPECT_EQ(m.step().num_decodes, 1);
  EXPECT_TRUE(m.scheduler.idle());
  EXPECT_EQ(m.results[1].tokens, expected({.tokens = prompt, .max_tokens = 2}, small_config()));
  EXPECT_EQ(m.results[1].finish, FinishReason::length);
}

TEST(Scheduler, a_long_prompt_does_not_stop_those_that_decode) {  // B2
  Config config = small_config();
  Machine m(config);
  const auto quick = counting(3), slow = counting(40, 9);
  m.add(1, quick, 20);
  m.step();
  m.add(2, slow, 2);
  for (int i = 0; i < 3; ++i) {
    const Batch batch = m.step();
    EXPECT_EQ(batch.num_decodes, 1);
    EXPECT_EQ(batch.num_seqs, 2);
  }
  EXPECT_EQ(m.results[1].tokens.size(), 4U);
}

TEST(Scheduler, a_prompt_of_high_priority_does_not_stop_those_that_decode_either) {
  Machine m(small_config());
  const auto quick = counting(3), slow = counting(40, 9);
  m.add(1, quick, 20);
  m.step();
  m.add({.id = 2, .tokens = slow, .priority = -1, .max_tokens = 2});
  for (int i = 0; i < 3; ++i) EXPECT_EQ(m.step().num_decodes, 1);
}

TEST(Scheduler, who_comes_before_a_prompt_that_is_under_way_does_not_wait_for_its_end) {  // F-45
  Config config = small_config();
  config.max_num_batched_tokens = 8;
  Machine m(config);
  const auto slow = counting(40), short_prompt = counting(3, 50);
  m.add(1, slow, 1);
  m.step();
  m.add({.id = 2, .tokens = short_prompt, .priority = -1, .max_tokens = 2});
  m.add({.id = 3, .tokens = short_prompt, .priority = 1, .max_tokens = 1});
  const Batch batch = m.step();
  EXPECT_EQ(m.column<int32_t>(batch, Col::seq_lens, 2), (std::vector<int32_t>{3, 13}))
      << "it, then the prompt's next 5";
  EXPECT_EQ(m.results[2].tokens.size(), 1U);
  EXPECT_EQ(m.scheduler.stats().num_waiting, 1) << "number 3 comes after it";
}

TEST(Scheduler, rows_are_ordered_decodes_first) {
  Machine m(small_config());
  const auto short_prompt = counting(1, 5), long_prompt = counting(20);
  m.add({.id = 1, .tokens = short_prompt, .max_tokens = 4});
  m.step();
  m.add({.id = 2, .tokens = long_prompt, .priority = -1, .max_tokens = 4});  // runs before the other one
  m.step();
  const Batch batch = m.step();
  EXPECT_EQ(batch.num_decodes, 1);
  EXPECT_EQ(m.column<int32_t>(batch, Col::seq_lens, 2), (std::vector<int32_t>{3, 20}));
  EXPECT_EQ(m.column<int32_t>(batch, Col::query_start, 3), (std::vector<int32_t>{0, 1, 6}));
}

TEST(Scheduler, lower_priority_numbers_run_first_and_equal_ones_in_order_of_arrival) {  // S48, S5
  Config config = small_config();
  config.max_num_seqs = 1;
  Machine m(config);
  const auto prompt = counting(3);
  std::vector<RequestId> order;
  m.add({.id = 9, .tokens = prompt, .max_tokens = 1});
  m.add({.id = 3, .tokens = prompt, .max_tokens = 1});
  m.add({.id = 5, .tokens = prompt, .priority = -1, .max_tokens = 1});
  while (m.schedule()) order.push_back(m.commit().ids[0]);
  EXPECT_EQ(order, (std::vector<RequestId>{5, 9, 3}));
}

TEST(Scheduler, a_lower_limit_holds_from_the_next_batch_on_and_costs_no_token) {  // P19
  Config config = small_config();
  config.num_blocks = 64;
  Machine m(config);
  const std::vector<std::vector<Token>> prompts{counting(3), counting(3, 8), counting(3, 16), counting(3, 24)};
  for (RequestId id = 0; id < 4; ++id) m.add(id, prompts[id], 12);
  m.step();
  EXPECT_EQ(m.step().num_seqs, 4);
  m.scheduler.limit_running(2);
  EXPECT_EQ(m.step().num_seqs, 2);
  EXPECT_EQ(m.scheduler.stats().num_waiting, 2);
  EXPECT_EQ(m.results[0].tokens.size(), 3U);  // the first ones go on
  EXPECT_EQ(m.results[3].tokens.size(), 2U);
  m.scheduler.limit_running(4);
  m.step();
  EXPECT_EQ(m.scheduler.stats().num_running, 4);
  m.run();
  for (RequestId id = 0; id < 4; ++id)
    EXPECT_EQ(m.results[id].tokens, expected({.tokens = prompts[id], .max_tokens = 12}, config)) << id;
  for (const int64_t wrong : {0, 5, -1}) EXPECT_THROW(m.scheduler.limit_running(wrong), std::invalid_argument);
}

TEST(Scheduler, statistics_say_since_when_the_one_has_waited_that_has_waited_longest) {
  Config config = small_config();
  config.max_num_seqs = 1;
  Machine m(config);
  const auto prompt = counting(3);
  EXPECT_EQ(m.scheduler.stats().waiting_since, -1);
  m.add({.id = 1, .tokens = prompt, .max_tokens = 1, .now = 100});
  EXPECT_EQ(m.scheduler.stats().waiting_since, 100);
  m.add({.id = 2, .tokens = prompt, .max_tokens = 1, .now = 200});
  m.add({.id = 3, .tokens = prompt, .priority = -1, .max_tokens = 1, .now = 300});
  EXPECT_EQ(m.step().num_seqs, 1);
  EXPECT_EQ(m.scheduler.stats().waiting_since, 100) << "number 3 ran first";
  m.step();
  EXPECT_EQ(m.scheduler.stats().waiting_since, 200);
  m.step();
  EXPECT_EQ(m.scheduler.stats().waiting_since, -1);
}

TEST(Scheduler, who_loses_its_blocks_waits_from_then_on) {
  Machine m(small_config());
  const auto first = counting(5), second = counting(5, 8);
  m.add({.id = 1, .tokens = first, .max_tokens = 8, .now = 10});
  m.add({.id = 2, .tokens = second, .max_tokens = 8, .now = 20});
  m.step();
  EXPECT_EQ(m.scheduler.stats().waiting_since, -1);
  m.scheduler.limit_running(1);
  const Batch* batch = m.scheduler.schedule(50);
  ASSERT_NE(batch, nullptr);
  EXPECT_EQ(batch->num_seqs, 1);
  EXPECT_EQ(m.scheduler.stats().waiting_since, 50);
}

TEST(Scheduler, empty_slots_are_what_is_left_of_last_blocks) {
  Machine m(small_config());  // blocks of 4
  const auto five = counting(5), eight = counting(8, 16);
  m.add(1, five, 3);
  m.add(2, eight, 3);
  EXPECT_EQ(m.scheduler.stats().empty_slots, 0);
  m.step();
  EXPECT_EQ(m.scheduler.stats().empty_slots, 3);
  m.step();
  EXPECT_EQ(m.scheduler.stats().empty_slots, 2 + 3);
  m.run();
  EXPECT_EQ(m.scheduler.stats().empty_slots, 0);
}

TEST(Scheduler, nobody_overtakes_a_head_that_does_not_fit) {
  Config config = small_config();
  config.num_blocks = 8;
  Machine m(config);
  const auto big = counting(16), other = counting(16, 5), small = counting(2, 20);
  m.add(1, big, 12);
  m.add(2, other, 12);
  m.add(3, small, 2);
  m.step();
  m.step();
  EXPECT_EQ(m.scheduler.stats().num_running, 1);
  EXPECT_EQ(m.scheduler.stats().num_waiting, 2);
}

TEST(Scheduler, who_cannot_grow_preempts_the_last_one_which_loses_no_token) {  // S7
  Config config = small_config();
  config.num_blocks = 10;
  Machine m(config);
  const std::vector<std::vector<Token>> prompts{counting(7), counting(7, 8), counting(7, 16)};
  for (RequestId id = 0; id < 3; ++id) m.add(id, prompts[id], 20);
  m.run();
  EXPECT_GT(m.scheduler.stats().num_preemptions, 0);
  for (RequestId id = 0; id < 3; ++id)
    EXPECT_EQ(m.results[id].tokens, expected({.tokens = prompts[id], .max_tokens = 20}, config)) << id;
  EXPECT_EQ(m.scheduler.stats().blocks_used, 0);
}

TEST(Scheduler, every_token_is_computed_once_without_preemption) {
  Config config = small_config();
  config.num_blocks = 64;
  config.enable_prefix_caching = false;
  Machine m(config);
  const auto prompt = counting(11);
  for (RequestId id = 0; id < 6; ++id) m.add(id, prompt, 5);
  m.run();
  EXPECT_EQ(m.scheduler.stats().step_tokens, 6 * (11 + 5 - 1));
}

TEST(Scheduler, an_equal_beginning_is_computed_once) {  // B1
  Machine m(small_config());
  const auto prompt = counting(13);
  m.add(1, prompt, 4);
  m.run();
  m.add(2, prompt, 4);
  m.run();
  EXPECT_EQ(m.results[1].cached_tokens, 0);
  EXPECT_EQ(m.results[2].cached_tokens, 12);
  EXPECT_EQ(m.results[1].tokens, m.results[2].tokens);
  EXPECT_EQ(m.scheduler.stats().prefix_queries, 26);
  EXPECT_EQ(m.scheduler.stats().prefix_hits, 12);
}

TEST(Scheduler, the_last_prompt_token_is_always_computed) {  // B1
  Machine m(small_config());
  const auto prompt = counting(12);
  m.add(1, prompt, 4);
  m.run();
  m.add(2, prompt, 4);
  m.run();
  EXPECT_EQ(m.results[2].cached_tokens, 8);
}

TEST(Scheduler, what_a_reply_computed_is_found_by_the_next_turn) {  // B1
  Machine m(small_config());
  auto turn = counting(6);
  m.add(1, turn, 8);
  m.run();
  turn.insert(turn.end(), m.results[1].tokens.begin(), m.results[1].tokens.end());
  turn.push_back(3);
  m.add(2, turn, 2);
  m.run();
  EXPECT_EQ(m.results[2].cached_tokens, 12) << "13 tokens were computed: the last one picked was not";
}

TEST(Scheduler, another_salt_or_another_beginning_finds_nothing) {  // B1
  Machine m(small_config());
  const auto prompt = counting(13);
  auto other = prompt;
  other[0] = 9;
  m.add(1, prompt, 4);
  m.add({.id = 2, .tokens = prompt, .cache_salt = "tenant"});
  m.add(3, other, 4);
  m.run();
  EXPECT_EQ(m.results[2].cached_tokens, 0);
  EXPECT_EQ(m.results[3].cached_tokens, 0) << "equal later blocks behind another beginning";
  m.add({.id = 4, .tokens = prompt, .cache_salt = "tenant"});
  m.run();
  EXPECT_EQ(m.results[4].cached_tokens, 12);
}

TEST(Scheduler, requests_that_come_together_compute_their_common_prompt_once) {
  Machine m(small_config());
  const auto prompt = counting(9);
  m.add(1, prompt, 2);
  m.add(2, prompt, 2);
  const Batch batch = m.step();  // runs and checks what it attends to
  EXPECT_EQ(batch.num_tokens, 9 + 1);
  EXPECT_EQ(batch.num_sampled, 2);
  EXPECT_EQ(m.scheduler.stats().prefix_hits, 8);
}

TEST(Scheduler, prefix_caching_can_be_switched_off) {
  Config config = small_config();
  config.enable_prefix_caching = false;
  Machine m(config);
  const auto prompt = counting(13);
  m.add(1, prompt, 4);
  m.run();
  m.add(2, prompt, 4);
  m.run();
  EXPECT_EQ(m.results[2].cached_tokens, 0);
}

TEST(Scheduler, forgotten_prefixes_are_not_found_even_if_their_request_still_runs) {
  Machine m(small_config());
  const auto prompt = counting(13);
  m.add(1, prompt, 12);
  m.step();
  EXPECT_FALSE(m.scheduler.forget_prefixes()) << "blocks are in use";
  m.run();
  m.add(2, prompt, 4);
  m.run();
  EXPECT_EQ(m.results[2].cached_tokens, 0);
  EXPECT_TRUE(m.scheduler.forget_prefixes());
}

TEST(Scheduler, stops_at_a_stop_token_which_is_part_of_the_output) {
  const Config config = small_config();
  const auto prompt = counting(5);
  const auto free = expected({.tokens = prompt, .max_tokens = 8}, config);
  Machine m(config);
  m.add({.id = 1, .tokens = prompt, .max_tokens = 8, .stop_token_ids = {free[2]}});
  m.run();
  EXPECT_EQ(m.results[1].tokens, (std::vector<Token>{free[0], free[1], free[2]}));
  EXPECT_EQ(m.results[1].finish, FinishReason::stop);
}

TEST(Scheduler, a_stop_token_cannot_be_picked_before_min_tokens) {
  const Config config = small_config();
  const auto prompt = counting(5);
  const auto free = expected({.tokens = prompt, .max_tokens = 8}, config);
  const RequestSpec spec{
      .id = 1, .tokens = prompt, .max_tokens = 8, .min_tokens = 4, .stop_token_ids = {free[0], free[2]}};
  Machine m(config);
  m.add(spec);
  m.run();
  EXPECT_GT(m.results[1].tokens.size(), 4U);
  EXPECT_EQ(m.results[1].tokens, expected(spec, config));
}

TEST(Scheduler, max_tokens_beyond_the_room_is_cut_to_the_context_or_the_pool) {  // F-20
  Machine m(small_config());
  const auto prompt = counting(40);
  m.add(1, prompt, std::numeric_limits<int64_t>::max());
  m.run();
  EXPECT_EQ(m.results[1].tokens.size(), 8U);
  EXPECT_EQ(m.results[1].finish, FinishReason::length);
  Config config = small_config();
  config.max_model_len = 1000;
  Machine pool(config);
  pool.add(1, prompt, 500);
  pool.run();
  EXPECT_EQ(pool.results[1].tokens.size(), 24U);
  EXPECT_EQ(pool.results[1].finish, FinishReason::length);
}

TEST(Scheduler, an_aborted_request_gives_nothing_more_and_keeps_its_blocks_while_in_flight) {  // B11, S8
  Machine m(small_config());
  const auto prompt = counting(9);
  m.add(1, prompt, 8);
  m.schedule();
  const std::vector<RequestId> ids{1, 77};
  EXPECT_EQ(m.scheduler.abort(ids), 1);
  EXPECT_EQ(m.scheduler.abort(ids), 0);
  EXPECT_EQ(m.scheduler.stats().blocks_used, 3);
  EXPECT_FALSE(m.scheduler.idle());
  EXPECT_EQ(m.commit().num_rows, 0);
  EXPECT_EQ(m.scheduler.stats().blocks_used, 0);
  EXPECT_TRUE(m.scheduler.idle());
}

TEST(Scheduler, outputs_are_grouped_by_client) {
  Config config = small_config();
  config.num_clients = 3;
  Machine m(config);
  const auto prompt = counting(2);
  for (const auto& [id, client] : {std::pair{1, 2}, {2, 0}, {3, 2}, {4, 0}})
    m.add({.id = static_cast<RequestId>(id), .tokens = prompt, .client = client});
  m.schedule();
  const Outputs& outputs = m.commit();
  EXPECT_EQ(outputs.client_start, (std::vector<int32_t>{0, 2, 2, 4}));
  EXPECT_EQ(outputs.ids, (std::vector<RequestId>{2, 4, 1, 3}));
  EXPECT_EQ(outputs.rows, (std::vector<int32_t>{1, 3, 0, 2}));
}

TEST(Scheduler, a_row_whose_adjustments_do_not_fit_waits_for_a_later_batch) {
  Config config = small_config();
  config.max_adjustments = 6;
  Machine m(config);
  const auto prompt = counting(3);
  std::map<RequestId, RequestSpec> specs;
  for (RequestId id = 0; id < 3; ++id) {
    specs[id] = {
        .id = id, .tokens = prompt, .max_tokens = 4, .banned_token_ids = counting(4, static_cast<Token>(4 * id))};
    m.add(specs[id]);
  }
  const Batch batch = m.step();
  EXPECT_EQ(batch.num_adjustments, 4);
  EXPECT_EQ(batch.num_seqs, 1);
  m.run();
  for (RequestId id = 0; id < 3; ++id) EXPECT_EQ(m.results[id].tokens, expected(specs[id], config)) << id;
}

TEST(Scheduler, commit_refuses_what_was_not_asked) {
  Machine m(small_config());
  const auto prompt = counting(3);
  const std::vector<Token> one{1}, two{1, 2}, bad{32};
  EXPECT_THROW(m.scheduler.commit(0, one), std::invalid_argument);
  m.add(1, prompt);
  m.schedule();
  EXPECT_THROW(m.scheduler.commit(1, one), std::invalid_argument);
  EXPECT_THROW(m.scheduler.commit(0, two), std::invalid_argument);
  EXPECT_THROW(m.scheduler.commit(0, bad), std::invalid_argument);
  EXPECT_EQ(m.scheduler.commit(0, one).num_rows, 1) << "a refused commit must change nothing";
}

TEST(Scheduler, add_refuses_an_id_in_use_and_adds_none_of_the_choices) {
  Machine m(small_config());
  const auto prompt = counting(3);
  m.add(5, prompt);
  EXPECT_THROW(m.add({.id = 3, .tokens = prompt, .n = 3}), std::invalid_argument);
  EXPECT_EQ(m.scheduler.stats().num_waiting, 1);
}

TEST(Invariants, planted_faults_are_found) {
  const auto prompt = counting(9);
  const auto broken = [&](auto plant) {
    Machine m(small_config());
    m.add(1, prompt, 8);
    m.add(2, prompt, 8);
    m.step();
    plant(m);
    EXPECT_THROW(m.scheduler.check_invariants(), InternalError);
  };
  broken([](Machine& m) { m.find(1)->num_computed += 9; });
  broken([](Machine& m) { m.find(1)->num_unknown = 1; });
  broken([](Machine& m) { m.find(1)->in_flight = 1; });
  broken([](Machine& m) { m.find(1)->state = Request::State::waiting; });
  broken([](Machine& m) { m.find(1)->tokens[2] = 31; });
  broken([](Machine& m) { m.find(1)->tokens.resize(4); });
  broken([](Machine& m) { SchedulerTest::lose(m.scheduler); });
  broken([](Machine& m) { SchedulerTest::pool(m.scheduler).share(0); });
  broken([](Machine& m) { m.find(2)->kv.share(m.find(1)->kv.blocks()[2]); });
}

}  // namespace
}  // namespace hybrid::test
