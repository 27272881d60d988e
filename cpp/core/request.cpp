#include "core/request.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"

namespace hybrid {

namespace {

std::vector<Token> sorted(std::vector<Token> ids) {
  std::ranges::sort(ids);
  ids.erase(std::ranges::unique(ids).begin(), ids.end());
  return ids;
}

void in_vocab(const char* field, std::span<const Token> ids, int64_t vocab_size) {
  for (const Token id : ids)
    require(0 <= id && id < vocab_size, field, " contains ", id, ", must be in [0, ", vocab_size, ")");
}

void in_range(const char* field, double value, double low, double high) {
  require(std::isfinite(value) && low <= value && value <= high, field, " is ", value, ", must be in [", low, ", ",
          high, "]");
}

void validate_lengths(const RequestSpec& spec, const Config& config) {
  const auto num_prompt = static_cast<int64_t>(spec.tokens.size());
  require(num_prompt > 0, "the prompt is empty");
  require(num_prompt < config.max_model_len, "This model's maximum context length is ", config.max_model_len,
          " tokens, of which at least one is for the reply; the prompt contains ", num_prompt, " tokens");
  require(num_prompt < config.pool_tokens(), "the prompt contains ", num_prompt,
          " tokens and needs room for one more, but the KV cache holds ", config.pool_tokens(), " tokens");
  require(spec.max_tokens >= 1, "max_tokens is ", spec.max_tokens, ", must be at least 1");
  require(0 <= spec.min_tokens && spec.min_tokens <= spec.max_tokens, "min_tokens is ", spec.min_tokens,
          ", must be in [0, max_tokens = ", spec.max_tokens, "]");
  require(1 <= spec.n && spec.n <= config.max_num_seqs, "n is ", spec.n, ", must be in [1, ", config.max_num_seqs, "]");
  require(spec.generated.empty() || spec.n == 1, spec.generated.size(), " tokens are generated already, and n is ",
          spec.n, ": one choice goes on at a time");
  const int64_t room = std::min(config.max_model_len, config.pool_tokens()) - num_prompt;
  require(std::ssize(spec.generated) < std::min(spec.max_tokens, room), spec.generated.size(),
          " tokens are generated already, max_tokens is ", spec.max_tokens, ", and there is room for ", room);
  require(spec.first_choice >= 0, "first_choice is ", spec.first_choice, ", must be at least 0");
  require(0 <= spec.client && spec.client < config.num_clients, "client is ", spec.client, ", must be in [0, ",
          config.num_clients, ")");
}

void validate_sampling(const SamplingRow& sampling, const Config& config) {
  const double inf = std::numeric_limits<double>::infinity();
  // The batch carries f32: what is finite as f64 may not be.
  const auto as_float = [](double value) { return static_cast<double>(static_cast<float>(value)); };
  in_range("temperature", as_float(sampling.temperature), 0, inf);
  in_range("top_p", sampling.top_p, 0, 1);
  require(as_float(sampling.top_p) > 0, "top_p is ", sampling.top_p, ", must be larger than 0");
  in_range("min_p", sampling.min_p, 0, 1);
  in_range("repetition_penalty", as_float(sampling.repetition_penalty), 0, inf);
  require(as_float(sampling.repetition_penalty) > 0, "repetition_penalty is ", sampling.repetition_penalty,
          ", must be larger than 0");
  require(sampling.top_k >= -1, "top_k is ", sampling.top_k, ", must be at least -1");
  require(-1 <= sampling.num_logprobs && sampling.num_logprobs <= config.vocab_size, "num_logprobs is ",
          sampling.num_logprobs, ", must be in [-1, ", config.vocab_size, "]");
}

// Some token must remain that can be picked, also while the stop ids may not.
void validate_choice_of_tokens(const RequestSpec& spec, const Config& config) {
  std::vector<Token> excluded = spec.banned_token_ids;
  if (spec.min_tokens > 0) excluded.insert(excluded.end(), spec.stop_token_ids.begin(), spec.stop_token_ids.end());
  excluded = sorted(std::move(excluded));
  auto num_left = config.vocab_size - static_cast<int64_t>(excluded.size());
  if (!spec.allowed_token_ids.empty())
    num_left = std::ranges::count_if(spec.allowed_token_ids,
                                     [&](Token id) { return !std::ranges::binary_search(excluded, id); });
  require(num_left > 0, "banned_token_ids (", spec.banned_token_ids.size(), " ids)",
          spec.min_tokens > 0 ? ", and the stop ids while min_tokens lasts," : "", " leave no token to pick");
}

void validate_ids(const RequestSpec& spec, const Config& config) {
  in_vocab("the prompt", spec.tokens, config.vocab_size);
  in_vocab("what was generated", spec.generated, config.vocab_size);
  in_vocab("stop_token_ids", spec.stop_token_ids, config.vocab_size);
  in_vocab("allowed_token_ids", spec.allowed_token_ids, config.vocab_size);
  in_vocab("banned_token_ids", spec.banned_token_ids, config.vocab_size);
  for (const auto& [id, bias] : spec.logit_bias) {
    in_vocab("logit_bias", {&id, 1}, config.vocab_size);
    require(std::isfinite(bias), "logit_bias of token ", id, " is ", bias, ", must be finite");
  }
  in_range("frequency_penalty", spec.frequency_penalty, -2, 2);
  in_range("presence_penalty", spec.presence_penalty, -2, 2);
  validate_choice_of_tokens(spec, config);
  // An upper bound of what one row can ever need, so that it always fits a batch of its own.
  auto entries = static_cast<int64_t>(spec.allowed_token_ids.size());
  if (entries == 0) {
    entries = static_cast<int64_t>(spec.logit_bias.size() + spec.banned_token_ids.size());
    if (spec.min_tokens > 0) entries += static_cast<int64_t>(spec.stop_token_ids.size());
    if (spec.sampling.repetition_penalty != 1) entries += static_cast<int64_t>(spec.tokens.size());
    if (spec.sampling.repetition_penalty != 1 || spec.frequency_penalty != 0 || spec.presence_penalty != 0)
      entries += std::min(spec.max_tokens, config.vocab_size);
  }
  entries = std::min(entries, config.vocab_size);
  require(entries <= config.max_adjustments, "the request may adjust ", entries, " logits a step, a batch holds ",
          config.max_adjustments, " (max_adjustments)");
}

}  // namespace

void RequestSpec::validate(const Config& config) const {
  validate_lengths(*this, config);
  validate_sampling(sampling, config);
  validate_ids(*this, config);
}

uint64_t seed_of_choice(uint64_t seed, int64_t i) {
  if (i == 0) return seed;
  uint64_t z = seed + static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

namespace {

SamplingRow sampling_of_choice(SamplingRow sampling, int64_t choice) {
  sampling.seed = seed_of_choice(sampling.seed, choice);
  return sampling;
}

int64_t length_limit(const RequestSpec& spec, const Config& config) {
  const auto num_prompt = static_cast<int64_t>(spec.tokens.size());
  const int64_t room = std::min(config.max_model_len, config.pool_tokens()) - num_prompt;
  return num_prompt + std::min(spec.max_tokens, room);
}

Hash128 root_hash(const RequestSpec& spec, const Config& config) {
  const auto* salt = reinterpret_cast<const uint8_t*>(spec.cache_salt.data());
  return SipHash128(config.hash_key).finish({salt, spec.cache_salt.size()});
}

}  // namespace

Request::Request(const RequestSpec& spec, int64_t choice, int64_t arrival_, const Config& config, BlockPool& pool,
                 BlockPool& host_pool)
    : id(spec.id + static_cast<RequestId>(choice)),
      client(static_cast<int32_t>(spec.client)),
      priority(spec.priority),
      arrival(arrival_),
      num_prompt(static_cast<int64_t>(spec.tokens.size())),
      length_limit(hybrid::length_limit(spec, config)),
      min_tokens(spec.min_tokens),
      stop_token_ids(sorted(spec.stop_token_ids)),
      sampling(sampling_of_choice(spec.sampling, spec.first_choice + choice)),
      state(choice == 0 ? State::waiting : State::held),
      tokens(spec.tokens.begin(), spec.tokens.end()),
      adjustments(spec),
      waits_since(spec.now),
      kv(pool),
      host(host_pool),
      root_hash(hybrid::root_hash(spec, config)) {
  tokens.insert(tokens.end(), spec.generated.begin(), spec.generated.end());
  for (const Token token : spec.generated) adjustments.observe(token);
}

void Request::move_to(State next) {
  const bool exists = next == State::finished  ? state != State::finished
                      : next == State::waiting ? state == State::held || state == State::running
                      : next == State::running ? state == State::waiting
                                               : false;
  invariant(exists, "a request makes an impossible transition");
  state = next;
}

FinishReason Request::append(Token token) {
  tokens.push_back(token);
  adjustments.observe(token);
  const auto length = static_cast<int64_t>(tokens.size());
  if (length - num_prompt > min_tokens && std::ranges::binary_search(stop_token_ids, token)) return FinishReason::stop;
  return length >= length_limit ? FinishReason::length : FinishReason::none;
}

}  // namespace hybrid
