// What is refused, with which numbers; adjustments; limits.
#include <bit>
#include <set>
#include <tuple>

#include "core_harness.h"

namespace hybrid::test {
namespace {

std::string refusal(const RequestSpec& spec, Config config = small_config()) {
  config.validate();
  try {
    spec.validate(config);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

// The refusal of a good request after one change.
template <class Change>
std::string refused(Change change) {
  const std::vector<Token> tokens = counting(5);
  RequestSpec spec{.id = 1, .tokens = tokens};
  change(spec);
  return refusal(spec);
}

TEST(Config, names_the_field_and_its_value) {
  const auto error = [](auto change) {
    Config config = small_config();
    change(config);
    try {
      config.validate();
    } catch (const std::invalid_argument& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(error([](Config&) {}), "accepted");
  EXPECT_EQ(error([](Config& c) { c.num_blocks = 0; }), "num_blocks is 0, must be in [1, 2147483646]");
  EXPECT_EQ(error([](Config& c) { c.block_size = -4; }), "block_size is -4, must be in [1, 65536]");
  EXPECT_EQ(error([](Config& c) { c.depth = 3; }), "depth is 3, must be in [1, 2]");
  EXPECT_EQ(error([](Config& c) { c.vocab_size = 0; }), "vocab_size is 0, must be in [1, 268435456]");
  EXPECT_NE(error([](Config& c) { c.max_num_batched_tokens = 3; }).find("3, must be at least max_num_seqs, 4"),
            std::string::npos);
  EXPECT_NE(
      error([](Config& c) { c.num_blocks = c.max_model_len = 1 << 30, c.block_size = 1; }).find("1073741824 blocks"),
      std::string::npos);
}

TEST(RequestSpec, refuses_prompts_that_can_never_run_with_both_numbers) {  // F-20, S29
  EXPECT_EQ(refused([](RequestSpec&) {}), "accepted");
  EXPECT_EQ(refused([](RequestSpec& s) { s.tokens = {}; }), "the prompt is empty");
  const std::vector<Token> longest = counting(47), too_long = counting(48), large = counting(63), larger = counting(64);
  EXPECT_EQ(refusal({.tokens = longest}), "accepted");
  const std::string message = refusal({.tokens = too_long});
  EXPECT_NE(message.find("maximum context length is 48 tokens"), std::string::npos) << message;
  EXPECT_NE(message.find("prompt contains 48 tokens"), std::string::npos) << message;
  Config config = small_config();
  config.max_model_len = 1000;
  EXPECT_EQ(refusal({.tokens = large}, config), "accepted");
  EXPECT_EQ(refusal({.tokens = larger}, config),
            "the prompt contains 64 tokens and needs room for one more, but the KV cache holds 64 tokens");
}

TEST(RequestSpec, refuses_token_ids_outside_the_vocabulary) {  // ADV-25
  for (const Token bad : {-1, 32, 33, std::numeric_limits<Token>::max(), std::numeric_limits<Token>::min()}) {
    const std::vector<Token> tokens{1, bad, 2};
    EXPECT_EQ(refusal({.tokens = tokens}), concat("the prompt contains ", bad, ", must be in [0, 32)"));
    EXPECT_NE(refused([&](RequestSpec& s) { s.stop_token_ids = {bad}; }).find("stop_token_ids contains"),
              std::string::npos);
    EXPECT_NE(refused([&](RequestSpec& s) { s.allowed_token_ids = {bad}; }).find("allowed_token_ids contains"),
              std::string::npos);
    EXPECT_NE(refused([&](RequestSpec& s) { s.banned_token_ids = {bad}; }).find("banned_token_ids contains"),
              std::string::npos);
    EXPECT_NE(refused([&](RequestSpec& s) { s.logit_bias = {{bad, 1}}; }).find("logit_bias contains"),
              std::string::npos);
  }
}

TEST(RequestSpec, refuses_numbers_that_are_not_finite_or_out_of_range) {  // ADV-22
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  for (const double bad : {nan, inf, -inf, -0.1, 1e300}) {
    EXPECT_NE(refused([&](RequestSpec& s) { s.sampling.temperature = bad; }), "accepted") << bad;
    EXPECT_NE(refused([&](RequestSpec& s) { s.sampling.top_p = bad; }), "accepted") << bad;
    EXPECT_NE(refused([&](RequestSpec& s) { s.sampling.min_p = bad; }), "accepted") << bad;
    EXPECT_NE(refused([&](RequestSpec& s) { s.sampling.repetition_penalty = bad; }), "accepted") << bad;
  }
  for (const double bad : {nan, inf, -inf, 2.1, -2.1}) {
    EXPECT_NE(refused([&](RequestSpec& s) { s.frequency_penalty = bad; }), "accepted") << bad;
    EXPECT_NE(refused([&](RequestSpec& s) { s.presence_penalty = bad; }), "accepted") << bad;
  }
  for (const double bad : {nan, inf, -inf})
    EXPECT_NE(refused([&](RequestSpec& s) { s.logit_bias = {{1, bad}}; }), "accepted") << bad;
  EXPECT_NE(refused([](RequestSpec& s) { s.sampling.top_p = 0; }), "accepted");
  EXPECT_NE(refused([](RequestSpec& s) { s.sampling.top_p = 1e-320; }), "accepted");
  EXPECT_NE(refused([](RequestSpec& s) { s.sampling.repetition_penalty = 0; }), "accepted");
  EXPECT_EQ(refused([](RequestSpec& s) { s.sampling.temperature = -0.0; }), "accepted");
  EXPECT_EQ(refused([](RequestSpec& s) { s.sampling.top_k = -1; }), "accepted");
  EXPECT_EQ(refused([](RequestSpec& s) { s.sampling.top_k = -2; }), "top_k is -2, must be at least -1");
  EXPECT_EQ(refused([](RequestSpec& s) { s.sampling.num_logprobs = 33; }), "num_logprobs is 33, must be in [-1, 32]");
}

TEST(RequestSpec, refuses_counts_out_of_range) {  // ADV-24
  EXPECT_EQ(refused([](RequestSpec& s) { s.n = 0; }), "n is 0, must be in [1, 4]");
  EXPECT_EQ(refused([](RequestSpec& s) { s.n = 5; }), "n is 5, must be in [1, 4]");
  EXPECT_EQ(refused([](RequestSpec& s) { s.max_tokens = 0; }), "max_tokens is 0, must be at least 1");
  EXPECT_EQ(refused([](RequestSpec& s) { s.min_tokens = 17; }), "min_tokens is 17, must be in [0, max_tokens = 16]");
  EXPECT_EQ(refused([](RequestSpec& s) { s.min_tokens = -1; }), "min_tokens is -1, must be in [0, max_tokens = 16]");
  EXPECT_EQ(refused([](RequestSpec& s) { s.client = 1; }), "client is 1, must be in [0, 1)");
  EXPECT_EQ(refused([](RequestSpec& s) { s.max_tokens = std::numeric_limits<int64_t>::max(); }), "accepted");
}

TEST(RequestSpec, refuses_to_exclude_every_token) {
  EXPECT_NE(refused([](RequestSpec& s) { s.banned_token_ids = counting(32); }), "accepted");
  EXPECT_EQ(refused([](RequestSpec& s) { s.banned_token_ids = counting(31); }), "accepted");
  EXPECT_NE(refused([](RequestSpec& s) { s.allowed_token_ids = {3}, s.banned_token_ids = {3}; }), "accepted");
  EXPECT_EQ(refused([](RequestSpec& s) { s.allowed_token_ids = {3}, s.stop_token_ids = {3}; }), "accepted");
  EXPECT_NE(refused([](RequestSpec& s) { s.allowed_token_ids = {3}, s.stop_token_ids = {3}, s.min_tokens = 1; }),
            "accepted");
}

TEST(RequestSpec, refuses_more_adjustments_than_a_batch_holds) {
  Config config = small_config();
  config.max_adjustments = 8;
  const std::vector<Token> tokens = counting(5);
  EXPECT_EQ(refusal({.tokens = tokens, .banned_token_ids = counting(8)}, config), "accepted");
  EXPECT_EQ(refusal({.tokens = tokens, .banned_token_ids = counting(9)}, config),
            "the request may adjust 9 logits a step, a batch holds 8 (max_adjustments)");
  EXPECT_EQ(refusal({.tokens = tokens, .max_tokens = 8, .presence_penalty = 1}, config), "accepted");
  EXPECT_NE(refusal({.tokens = tokens, .max_tokens = 9, .presence_penalty = 1}, config), "accepted");
}

TEST(Request, the_first_choice_keeps_the_seed_and_the_others_differ) {
  std::set<uint64_t> seeds;
  for (uint64_t seed = 0; seed < 8; ++seed)
    for (int64_t i = 0; i < 8; ++i) seeds.insert(seed_of_choice(seed, i));
  EXPECT_EQ(seeds.size(), 64U);
  EXPECT_EQ(seed_of_choice(123, 0), 123U);
}

TEST(Request, an_impossible_transition_is_an_internal_error) {
  Config config = small_config();
  BlockPool pool(4);
  const std::vector<Token> tokens = counting(5);
  Request request({.tokens = tokens}, 0, 0, config, pool, pool);
  EXPECT_THROW(request.move_to(Request::State::waiting), InternalError);
  request.move_to(Request::State::running);
  request.move_to(Request::State::finished);
  EXPECT_THROW(request.move_to(Request::State::running), InternalError);
  EXPECT_THROW(request.move_to(Request::State::finished), InternalError);
}

using Entry = std::tuple<Token, float, int32_t>;

std::vector<Entry> written(const Adjustments& adjustments, int64_t num_generated) {
  std::vector<AdjustmentEntry> columns(64);
  columns.resize(static_cast<size_t>(adjustments.write(num_generated, columns.data())));
  std::vector<Entry> entries;
  for (const auto& [id, add, flags] : columns) entries.emplace_back(id, std::bit_cast<float>(add), flags);
  return entries;
}

TEST(Adjustments, a_plain_request_has_none) {
  const std::vector<Token> tokens = counting(5);
  Adjustments adjustments({.tokens = tokens, .stop_token_ids = {3}});
  adjustments.observe(4);
  EXPECT_TRUE(adjustments.empty());
  EXPECT_FALSE(adjustments.needs_tokens());
}

TEST(Adjustments, are_one_list_sorted_by_id) {  // B9
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<Token> tokens{7, 5, 7};
  RequestSpec spec{
      .tokens = tokens, .min_tokens = 2, .stop_token_ids = {9}, .frequency_penalty = 0.5, .presence_penalty = 0.25};
  spec.sampling.repetition_penalty = 1.5;
  spec.logit_bias = {{8, 300}, {5, -1}, {1, 2}};
  spec.banned_token_ids = {1};
  Adjustments adjustments(spec);
  EXPECT_TRUE(adjustments.needs_tokens());
  EXPECT_EQ(written(adjustments, 0),
            (std::vector<Entry>{{1, -inf, 0}, {5, -1, 1}, {7, 0, 1}, {8, 100, 0}, {9, -inf, 0}}));
  adjustments.observe(5);
  adjustments.observe(5);
  adjustments.observe(6);
  EXPECT_EQ(written(adjustments, 3),
            (std::vector<Entry>{{1, -inf, 0}, {5, -2.25, 1}, {6, -0.75, 1}, {7, 0, 1}, {8, 100, 0}}));
}

TEST(Adjustments, an_allowed_list_drops_what_is_said_about_others) {
  const std::vector<Token> tokens = counting(5);
  RequestSpec spec{
      .tokens = tokens, .presence_penalty = 1, .logit_bias = {{4, 1}, {9, 1}}, .allowed_token_ids = {9, 2, 9}};
  Adjustments adjustments(spec);
  EXPECT_EQ(written(adjustments, 0), (std::vector<Entry>{{2, 0, 2}, {9, 1, 2}}));
  adjustments.observe(4);
  adjustments.observe(2);
  EXPECT_EQ(written(adjustments, 2), (std::vector<Entry>{{2, -1, 2}, {9, 1, 2}}));
}

}  // namespace
}  // namespace hybrid::test
