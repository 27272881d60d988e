// A request that an earlier engine began goes on as if that one had lived (P1, F-01).
#include "core_harness.h"

namespace hybrid::test {
namespace {

// Everything that looks back at what was picked.
RequestSpec demanding(std::span<const Token> prompt) {
  RequestSpec spec{.id = 7, .tokens = prompt, .max_tokens = 14, .min_tokens = 9};
  spec.stop_token_ids = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  spec.sampling.seed = 42;
  spec.sampling.repetition_penalty = 1.5;
  spec.frequency_penalty = 0.75;
  spec.presence_penalty = 0.5;
  return spec;
}

TEST(Resume, gives_the_rest_of_the_tokens_from_wherever_it_was_cut) {
  for (const int64_t depth : {1, 2}) {
    for (const int64_t choice : {0, 2}) {
      Config config = small_config();
      config.depth = depth;
      const auto prompt = counting(10);
      RequestSpec spec = demanding(prompt);
      const Expected whole = reference(spec, choice, config);
      ASSERT_GE(std::ssize(whole.tokens), 9);
      for (size_t cut = 0; cut < whole.tokens.size(); ++cut) {
        spec.generated = std::span(whole.tokens).first(cut);
        spec.first_choice = choice;
        Machine m(config);
        m.add(spec);
        m.run();
        EXPECT_EQ(m.results[7].tokens, std::vector<Token>(whole.tokens.begin() + cut, whole.tokens.end()))
            << "depth " << depth << ", choice " << choice << ", cut at " << cut;
        EXPECT_EQ(m.results[7].finish, whole.finish);
      }
    }
  }
}

TEST(Resume, a_preempted_one_comes_back_with_all_of_its_tokens) {
  Config config = small_config();
  config.num_blocks = 8;
  config.max_model_len = 32;
  Machine m(config);
  const auto prompt = counting(8), other = counting(8, 3);
  RequestSpec first{.id = 1, .tokens = other, .max_tokens = 20}, second{.id = 2, .tokens = prompt, .max_tokens = 20};
  const Expected whole = reference(second, 0, config);
  second.generated = std::span(whole.tokens).first(5);
  m.add(first);
  m.add(second);
  m.run();
  EXPECT_GT(m.scheduler.stats().num_preemptions, 0);
  EXPECT_EQ(m.results[1].tokens, reference(first, 0, config).tokens);
  EXPECT_EQ(m.results[2].tokens, std::vector<Token>(whole.tokens.begin() + 5, whole.tokens.end()));
}

TEST(Resume, refuses_what_would_already_have_ended_or_is_no_single_choice) {
  Config config = small_config();
  config.validate();
  const auto prompt = counting(10), generated = counting(8);
  const auto refusal = [&](auto change) -> std::string {
    RequestSpec spec{.id = 1, .tokens = prompt, .generated = generated, .max_tokens = 9};
    change(spec);
    try {
      spec.validate(config);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(refusal([](RequestSpec&) {}), "accepted");
  EXPECT_EQ(refusal([](RequestSpec& s) { s.max_tokens = 8; }),
            "8 tokens are generated already, max_tokens is 8, and there is room for 38");
  const auto longest = counting(40);
  EXPECT_EQ(refusal([&](RequestSpec& s) { s.tokens = longest; }),
            "8 tokens are generated already, max_tokens is 9, and there is room for 8");
  EXPECT_EQ(refusal([](RequestSpec& s) { s.n = 2; }),
            "8 tokens are generated already, and n is 2: one choice goes on at a time");
  EXPECT_EQ(refusal([](RequestSpec& s) { s.first_choice = -1; }), "first_choice is -1, must be at least 0");
  const std::vector<Token> stranger{99};
  EXPECT_EQ(refusal([&](RequestSpec& s) { s.generated = stranger; }),
            "what was generated contains 99, must be in [0, 32)");
}

TEST(Scheduler, says_which_requests_are_in_flight_each_once) {
  Config config = small_config();
  config.depth = 2;
  Machine m(config);
  const auto prompt = counting(6);
  for (RequestId id = 1; id <= 6; ++id) m.add(id, prompt);
  EXPECT_TRUE(m.scheduler.ids_in_flight().empty());
  m.schedule();
  m.schedule();
  const auto ids = m.scheduler.ids_in_flight();
  EXPECT_EQ(ids, (std::vector<RequestId>{1, 2, 3, 4})) << "the others wait: max_num_seqs is 4";
  m.commit();
  m.commit();
  EXPECT_TRUE(m.scheduler.ids_in_flight().empty());
  m.run();
}

}  // namespace
}  // namespace hybrid::test
