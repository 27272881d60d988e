// RequestSpec: what a client asks for. Request: what one sequence is and how far it got; knows neither queues nor
// batches.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "common/siphash.h"
#include "common/types.h"
#include "core/adjustments.h"
#include "core/config.h"
#include "core/kv_allocation.h"

namespace hybrid {

// How a token is picked, as the batch carries it.
struct SamplingRow {
  double temperature = 1, top_p = 1, min_p = 0, repetition_penalty = 1;
  int64_t top_k = 0;          // 0 or -1: off
  int64_t num_logprobs = -1;  // -1: none
  uint64_t seed = 0;
};

// `= {}` lets a caller name some fields only, without a warning.
struct RequestSpec {
  RequestId id = 0;                    // of the first choice; the others follow
  std::span<const Token> tokens = {};  // the prompt
  // Picked by an earlier engine, which is gone: the request goes on behind them as if it had picked them itself. They
  // count for max_tokens, min_tokens and the penalties, and are not given out again. Only with n = 1.
  std::span<const Token> generated = {};
  int64_t client = 0;
  int64_t n = 1;
  int64_t first_choice = 0;  // of the request that this was a part of: whose seed choice 0 takes
  int64_t priority = 0;      // lower runs first
  int64_t max_tokens = 16;
  int64_t min_tokens = 0;
  std::vector<Token> stop_token_ids = {};
  SamplingRow sampling = {};
  double frequency_penalty = 0, presence_penalty = 0;
  std::vector<std::pair<Token, double>> logit_bias = {};
  std::vector<Token> allowed_token_ids = {};  // empty: all
  std::vector<Token> banned_token_ids = {};
  std::string_view cache_salt = {};
  int64_t now = 0;  // of the caller's clock, see Stats::waiting_since

  // Throws std::invalid_argument, with the numbers, for what can never run.
  void validate(const Config& config) const;
};

// The seed of choice i of a request: its own for i = 0, else the i-th output of SplitMix64 started there.
uint64_t seed_of_choice(uint64_t seed, int64_t i);

class Request {
 public:
  // held: a further choice that waits until the first one's prompt is computed, then shares its blocks.
  enum class State : uint8_t { held, waiting, running, finished };

  // Choice `choice` of a valid spec. `arrival` orders requests of one priority.
  Request(const RequestSpec& spec, int64_t choice, int64_t arrival, const Config& config, BlockPool& pool,
          BlockPool& host_pool);

  // Tokens known or picked by a batch in flight; and those of them that no batch has computed yet.
  int64_t num_tokens() const { return static_cast<int64_t>(tokens.size()) + num_unknown; }
  int64_t num_missing() const { return num_tokens() - num_computed; }
  int64_t num_generated() const { return num_tokens() - num_prompt; }
  // Whether its next `num_new` tokens are the one that was picked last, not a piece of the prompt or of what has to be
  // computed again.
  bool is_decode(int64_t num_new) const { return num_new == 1 && num_missing() == 1 && num_computed >= num_prompt; }
  // False while what comes next depends on a token that is still in flight.
  bool ready() const { return num_unknown == 0 || (num_tokens() < length_limit && !adjustments.needs_tokens()); }

  void move_to(State next);  // throws InternalError for a transition that does not exist
  FinishReason append(Token token);

  const RequestId id;
  const int32_t client;
  const int64_t priority, arrival;
  const int64_t num_prompt;
  const int64_t length_limit;  // tokens, prompt included: max_tokens, max_model_len and the pool allow no more
  const int64_t min_tokens;
  const std::vector<Token> stop_token_ids;  // sorted
  const SamplingRow sampling;

  State state = State::waiting;
  std::vector<Token> tokens;
  Adjustments adjustments;
  int64_t num_computed = 0;  // tokens whose KV is in `kv`, by the end of the last batch scheduled
  int32_t num_unknown = 0;   // tokens picked by a batch in flight
  int32_t in_flight = 0;     // batches in flight that hold a row of it
  int32_t sampled_row = -1;  // in the last batch that picked a token of it
  int64_t num_preemptions = 0;
  int64_t cached_tokens = -1;  // found in the cache when it first ran; -1 before that and once told
  int64_t waits_since;         // while it waits: since it came, or lost its blocks, by the caller's clock
  int64_t scheduled_at = -1;   // the caller's clock when it first ran; -1 before that and once told

  KVAllocation kv;
  int64_t num_published = 0;   // blocks of kv whose hash the pool was told
  bool just_admitted = false;  // by the batch being planned, which may still compute what is in its blocks
  bool is_ordered = false;     // in the scheduler's DecodeOrder
  int64_t planned_for = -1;    // the last step that had it as a decode, where decodes are ordered
  bool may_publish = true;     // false for KV computed before forget_prefixes()
  // While it waits: the KV of its first `num_on_host` tokens, from block `first_on_host` on.
  KVAllocation host;
  int64_t first_on_host = 0, num_on_host = 0;
  bool may_publish_host = true;
  Hash128 root_hash;                // parent of the first block's hash
  std::vector<Hash128> hashes;      // of the blocks that tokens fill, as far as they were needed
  Request* leader = nullptr;        // the first choice, while it lives and this one has not started
  std::vector<Request*> followers;  // the further choices that have not started
};

}  // namespace hybrid
