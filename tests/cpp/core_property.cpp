// Random operations on tiny pools, every invariant after every one (F-21, F-22), every token against the reference.
//
// HYBRID_PROPERTY_OPS sets the number of operations a seed. The default is the full 10^6 in every optimised build, with
// sanitizers too (some 5 s a seed); an unoptimised one does less.
#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <unordered_map>

#include "core/replay.h"
#include "core_harness.h"

namespace hybrid::test {
namespace {

int64_t num_operations() {
  if (const char* text = std::getenv("HYBRID_PROPERTY_OPS")) return std::atoll(text);
#ifdef __SANITIZE_ADDRESS__
  return 250'000;
#elif defined(NDEBUG)
  return 1'000'000;
#else
  return 30'000;
#endif
}

// The same operations for the same seed, whatever ids the requests have.
class RandomSession {
 public:
  RandomSession(uint64_t seed, RequestId first_id)
      : random_(seed),
        config_(random_config()),
        arenas_(config_),
        executor_(config_, arenas_),
        scheduler_(config_, arenas_.pointers()),
        next_id_(first_id) {}

  void step() {
    const int64_t dice = below(1000);
    if (dice < 120 && choices_.size() < 12) {
      add();
    } else if (dice < 160) {
      abort();
    } else if (dice < 580) {
      schedule();
    } else if (dice < 990) {
      commit();
    } else if (dice < 998) {
      max_running_ = 1 + below(config_.max_num_seqs);
      scheduler_.limit_running(max_running_);
    } else {
      scheduler_.forget_prefixes();
    }
    scheduler_.check_invariants();
    check_empty_slots();
  }

  // S6: everything that was admitted ends after a bounded number of steps, and all blocks come back (S8).
  void drain() {
    for (int64_t rounds = 0; !scheduler_.idle(); ++rounds) {
      invariant(rounds < 5000, "S6: the scheduler makes no progress");
      schedule();
      while (!in_flight_.empty()) commit();
      scheduler_.check_invariants();
    }
    invariant(choices_.empty(), "S9: a choice never ended");
    invariant(scheduler_.stats().blocks_used == 0, "S8: blocks leaked");
    invariant(scheduler_.stats().host_blocks_used == 0 && scheduler_.stats().num_swapped == 0, "S8: blocks leaked");
  }

  // The last `num_steps` steps, in so many words.
  void record(int64_t num_steps, size_t num_words) {
    memory_.assign(num_words, 0);
    scheduler_.record(memory_, num_steps);
  }
  const std::vector<int64_t>& memory() const { return memory_; }

  uint64_t decisions() const { return decisions_; }
  int64_t num_finished() const { return num_finished_; }
  Stats stats() const { return scheduler_.stats(); }
  int64_t num_copies() const { return num_copies_; }

 private:
  // Statistics count by request; here each block is looked at once.
  void check_empty_slots() {
    std::map<BlockId, int64_t> filled;
    for (const auto& [id, request] : SchedulerTest::requests(scheduler_))
      for (int64_t i = 0; i < request->kv.size(); ++i) {
        int64_t& most = filled[request->kv.blocks()[static_cast<size_t>(i)]];
        most =
            std::max(most, std::clamp<int64_t>(request->num_computed - i * config_.block_size, 0, config_.block_size));
      }
    const auto blocks = std::ssize(filled);
    int64_t empty = blocks * config_.block_size;
    for (const auto& [block, tokens] : filled) empty -= tokens;
    invariant(scheduler_.stats().empty_slots == empty, "empty slots are miscounted");
    invariant(scheduler_.stats().blocks_used == blocks, "a used block is nobody's");
  }

  struct Choice {
    Expected expected;
    size_t num_before = 0;  // picked by an earlier engine
    size_t num_given = num_before;
  };

  int64_t below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  bool chance(int64_t percent) { return below(100) < percent; }

  Config random_config() {
    Config config;
    config.block_size = 1 + below(4);
    config.num_blocks = 4 + below(12);
    config.max_num_seqs = 1 + below(5);
    config.max_num_batched_tokens = config.max_num_seqs + below(8);
    config.max_model_len = 8 + below(24);
    config.vocab_size = 8;
    config.num_clients = 1 + below(3);
    config.depth = 1 + below(2);
    config.enable_prefix_caching = chance(80);
    config.num_host_blocks = chance(60) ? below(2 * config.num_blocks) : 0;
    config.swap_cost = chance(70) ? 0 : below(2 * config.block_size);
    config.max_adjustments = 8 + below(16);
    config.min_shared_tokens = below(6);
    if (below(2) == 0) config.decode_sizes = config.mixed_seq_sizes = {1 + below(config.max_num_seqs)};
    config.mixed_token_sizes = {config.max_num_batched_tokens};
    return config;
  }

  std::vector<Token> random_ids(int64_t most) {
    std::vector<Token> ids(static_cast<size_t>(below(most + 1)));
    for (Token& id : ids) id = static_cast<Token>(below(config_.vocab_size));
    return ids;
  }

  RequestSpec random_spec() {
    RequestSpec spec;
    // Few beginnings, so that prefixes are shared; sometimes too long, so that some are refused.
    prompt_.clear();
    const int64_t length = 1 + below(std::min(config_.max_model_len, config_.pool_tokens()) + 1), family = below(3);
    for (int64_t i = 0; i < length; ++i)
      prompt_.push_back(static_cast<Token>((family * 3 + i * (family + 1)) % config_.vocab_size));
    if (chance(50)) prompt_.back() = static_cast<Token>(below(config_.vocab_size));
    spec.id = next_id_;
    spec.tokens = prompt_;
    spec.client = below(config_.num_clients);
    spec.n = chance(25) ? 1 + below(config_.max_num_seqs) : 1;
    spec.priority = chance(20) ? below(3) - 1 : 0;
    spec.max_tokens = 1 + below(12);
    spec.min_tokens = chance(20) ? below(spec.max_tokens + 1) : 0;
    spec.stop_token_ids = random_ids(2);
    spec.sampling.seed = random_();
    if (chance(10)) spec.sampling.repetition_penalty = chance(50) ? 2 : 0.5;
    if (chance(10)) spec.frequency_penalty = 0.5;
    if (chance(10)) spec.presence_penalty = 1;
    if (chance(10)) spec.logit_bias = {{static_cast<Token>(below(8)), 2.5}, {static_cast<Token>(below(8)), -400}};
    if (chance(5)) spec.allowed_token_ids = random_ids(6);
    if (chance(5)) spec.banned_token_ids = random_ids(3);
    if (chance(10)) spec.cache_salt = "other";
    if (spec.logit_bias.size() == 2 && spec.logit_bias[0].first == spec.logit_bias[1].first) spec.logit_bias.pop_back();
    return spec;
  }

  void add() {
    RequestSpec spec = random_spec();
    try {
      spec.validate(config_);
    } catch (const std::invalid_argument&) {
      return;
    }
    if (spec.n == 1 && chance(20)) begin_elsewhere(spec);
    scheduler_.add(spec);
    for (int64_t i = 0; i < spec.n; ++i)
      choices_[next_id_ + static_cast<RequestId>(i)] = {.expected = reference(spec, spec.first_choice + i, config_),
                                                        .num_before = spec.generated.size()};
    next_id_ += static_cast<RequestId>(spec.n);
  }

  // As after an engine's death: some choice, with some of its tokens.
  void begin_elsewhere(RequestSpec& spec) {
    spec.first_choice = below(3);
    generated_ = reference(spec, spec.first_choice, config_).tokens;
    generated_.resize(static_cast<size_t>(below(std::ssize(generated_))));
    spec.generated = generated_;
  }

  void abort() {
    std::vector<RequestId> ids{next_id_ - static_cast<RequestId>(below(20)), next_id_ + 5};
    const auto num_live = static_cast<int64_t>(choices_.erase(ids[0]));
    invariant(scheduler_.abort(ids) == num_live, "I8: abort counts differently");
    invariant(scheduler_.abort(ids) == 0, "I8: abort is not idempotent");
  }

  void schedule() {
    const std::vector<Request*> ran = SchedulerTest::running(scheduler_);
    const bool must = in_flight_.empty() && !scheduler_.idle();
    const Batch* batch = scheduler_.schedule();
    invariant(batch || !must, "S6: nothing in flight, not idle, and no batch");
    if (!batch) return;
    invariant(static_cast<int64_t>(in_flight_.size()) < config_.depth, "more batches in flight than depth");
    num_copies_ += batch->num_copies;
    invariant(batch->num_seqs <= max_running_ && scheduler_.stats().num_running <= max_running_,
              "S2: more than may run");
    const auto& waiting = SchedulerTest::waiting(scheduler_);
    for (const Request* request : SchedulerTest::running(scheduler_))
      if (!waiting.empty() && std::ranges::find(ran, request) == ran.end())
        invariant(ServedBefore{}(request, &waiting.head()), "S5: a newcomer overtakes a waiting request");
    const auto* bytes = arenas_.column<uint8_t>(*batch, Col::token_ids);
    for (int64_t i = 0; i < batch->num_tokens * 4; ++i) decisions_ = mix(decisions_, bytes[i]);
    const auto* slots = arenas_.column<int64_t>(*batch, Col::slots);
    for (int64_t i = 0; i < batch->num_tokens; ++i) decisions_ = mix(decisions_, static_cast<uint64_t>(slots[i]));
    in_flight_.push_back(*batch);
  }

  void commit() {
    if (in_flight_.empty()) return;
    const Batch batch = in_flight_.front();
    in_flight_.pop_front();
    const Outputs& outputs = scheduler_.commit(batch.step, executor_.run(batch));
    invariant(outputs.step == batch.step && outputs.num_rows <= batch.num_sampled, "outputs of another step");
    invariant(outputs.client_start.back() == outputs.num_rows, "rows of no client");
    for (size_t i = 0; i < static_cast<size_t>(outputs.num_rows); ++i) {
      const auto found = choices_.find(outputs.ids[i]);
      invariant(found != choices_.end(), "S9: output of a choice that is gone");
      Choice& choice = found->second;
      invariant((outputs.cached_tokens[i] >= 0) == (choice.num_given == choice.num_before),
                "cached_tokens is not on the first row alone");
      invariant((outputs.scheduled_at[i] >= 0) == (choice.num_given == choice.num_before),
                "scheduled_at is not on the first row alone");
      invariant(choice.num_given < choice.expected.tokens.size(), "S9: more tokens than expected");
      invariant(outputs.tokens[i] == choice.expected.tokens[choice.num_given++],
                "S7: a token differs from the reference");
      const bool last = choice.num_given == choice.expected.tokens.size();
      invariant(outputs.finish[i] == (last ? choice.expected.finish : FinishReason::none),
                "S9: ends at the wrong token");
      if (last) choices_.erase(found);
      num_finished_ += last;
    }
  }

  std::mt19937_64 random_;
  Config config_;
  Arenas arenas_;
  FakeExecutor executor_;
  Scheduler scheduler_;
  int64_t max_running_ = config_.max_num_seqs;
  RequestId next_id_;
  std::vector<Token> prompt_, generated_;
  std::vector<int64_t> memory_;
  std::unordered_map<RequestId, Choice> choices_;
  std::deque<Batch> in_flight_;
  uint64_t decisions_ = 0;
  int64_t num_finished_ = 0, num_copies_ = 0;
};

class Property : public testing::TestWithParam<uint64_t> {};

TEST_P(Property, random_operations_keep_every_invariant_and_give_the_reference_tokens) {
  // Many short sessions, each of another configuration, cover more than a long one.
  constexpr int64_t session_length = 2000;
  int64_t num_finished = 0, num_preemptions = 0, num_hits = 0, num_copies = 0, num_swapped_in = 0;
  for (int64_t done = 0; done < num_operations(); done += session_length) {
    const uint64_t seed = mix(GetParam(), static_cast<uint64_t>(done));
    RandomSession session(seed, 1000);
    int64_t i = 0;
    try {
      for (; i < session_length; ++i) session.step();
      session.drain();
    } catch (const std::exception& error) {
      FAIL() << "session " << seed << ", operation " << i << ": " << error.what();
    }
    num_finished += session.num_finished();
    num_preemptions += session.stats().num_preemptions;
    num_hits += session.stats().prefix_hits;
    num_copies += session.num_copies();
    num_swapped_in += session.stats().blocks_swapped_in;
  }
  // The test means something only if all of it happened.
  EXPECT_GT(num_finished, num_operations() / 100);
  EXPECT_GT(num_preemptions, num_operations() / 1000);
  EXPECT_GT(num_hits, num_operations() / 1000);
  EXPECT_GT(num_copies, num_operations() / 10000);
  EXPECT_GT(num_swapped_in, num_operations() / 10000);
}

INSTANTIATE_TEST_SUITE_P(Seeds, Property, testing::Range<uint64_t>(0, 10));

TEST(Replay, decisions_depend_on_the_calls_alone_not_on_ids_or_addresses) {  // S10, I10
  for (uint64_t seed = 0; seed < 20; ++seed) {
    RandomSession one(seed, 1000), other(seed, uint64_t{3} << 48);
    for (int i = 0; i < 2000; ++i) {
      one.step();
      other.step();
    }
    EXPECT_EQ(one.decisions(), other.decisions()) << "seed " << seed;
    EXPECT_GT(one.num_finished(), 0);
  }
}

// What memory that a recorder wrote holds, oldest first.
std::vector<int64_t> events_of(const std::vector<int64_t>& memory) {
  const auto half = [&](int64_t which) {
    const auto* begin = memory.data() + Recorder::header_words + which * memory[Recorder::half_words];
    return std::span(begin, static_cast<size_t>(memory[static_cast<size_t>(Recorder::end_0 + which)]));
  };
  const int64_t current = (memory[Recorder::turns] - 1) % 2;
  std::vector<int64_t> events;
  if (memory[static_cast<size_t>(Recorder::joined_0 + current)]) {
    const auto before = half(1 - current);
    events.assign(before.begin(), before.end());
  }
  const auto last = half(current);
  events.insert(events.end(), last.begin(), last.end());
  return events;
}

int64_t num_steps_of(std::span<const int64_t> events) {
  int64_t steps = 0;
  for (size_t at = 0; at < events.size(); at += 1 + static_cast<size_t>(events[at] >> 8))
    steps += static_cast<Event>(events[at] & 0xff) == Event::step;
  return steps;
}

TEST(Replay, a_recording_gives_the_same_decisions_from_any_moment_on) {  // F-23, P25
  int64_t num_replays = 0, num_short = 0;
  for (uint64_t seed = 0; seed < 120; ++seed) {
    RandomSession session(seed, 1000);
    // Some with too little room for the steps that they should have, or for a state.
    const int64_t num_steps = 5 + static_cast<int64_t>(seed % 40);
    session.record(num_steps, seed % 3 == 0 ? 1500 : 100'000);
    for (int i = 0; i < 1000; ++i) {
      session.step();
      if (i % 90 != 89 || session.memory()[Recorder::mark] == 0) continue;
      const auto events = events_of(session.memory());
      Replay replay(std::span(session.memory()).subspan(Recorder::config), events);
      replay.run();
      ASSERT_EQ(replay.failure(), "") << "seed " << seed << ", operation " << i;
      ASSERT_EQ(replay.decisions(), Replay::decisions_of(events)) << "seed " << seed << ", operation " << i;
      ++num_replays;
      const bool is_full = session.memory()[Recorder::turns] > 1;
      if (is_full && num_steps_of(events) < num_steps) {
        EXPECT_EQ(seed % 3, 0) << "seed " << seed << ": steps are lost, although there is room";
        ++num_short;
      }
    }
  }
  EXPECT_GT(num_replays, 800);
  EXPECT_GT(num_short, 0);
}

TEST(Replay, a_recording_that_lost_a_word_is_refused_or_differs_and_harms_nobody) {  // ADV-06
  int64_t num_noticed = 0;
  for (uint64_t seed = 0; seed < 150; ++seed) {
    RandomSession session(seed % 30, 1000);
    session.record(20, 100'000);
    for (int i = 0; i < 400; ++i) session.step();
    auto events = events_of(session.memory());
    std::mt19937_64 random(seed);
    events[random() % events.size()] = static_cast<int64_t>(random() % 7) - 2;
    try {
      Replay replay(std::span(session.memory()).subspan(Recorder::config), events);
      replay.run();
      num_noticed += !replay.failure().empty() || replay.decisions() != Replay::decisions_of(events);
    } catch (const std::invalid_argument&) {
      ++num_noticed;
    }
  }
  EXPECT_GT(num_noticed, 30);
}

}  // namespace
}  // namespace hybrid::test
