// A machine for tests of the core: arenas, and an executor whose "KV" is a chained hash of the tokens, whose "logits"
// are a pseudo-random function of that hash. A wrong block, copy, position or order changes the tokens that come out;
// reference() says which tokens must come out, from the request alone.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/check.h"
#include "core/scheduler.h"

namespace hybrid {

// Friend of Scheduler: what a test may look at, and break.
struct SchedulerTest {
  static const std::vector<Request*>& running(const Scheduler& s) { return s.running_; }
  static const auto& requests(const Scheduler& s) { return s.requests_; }
  static const WaitingQueue& waiting(const Scheduler& s) { return s.waiting_; }
  static BlockPool& pool(Scheduler& s) { return s.kv_.pool(); }
  static Request* find(Scheduler& s, RequestId id) {
    const auto found = s.requests_.find(id);
    return found == s.requests_.end() ? nullptr : found->second.get();
  }
  static BlockPool& host_pool(Scheduler& s) { return s.kv_.host_pool(); }
  static void lose(Scheduler& s) { s.running_.pop_back(); }
};

namespace test {

inline uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t z = (a ^ (b + 0x9e3779b97f4a7c15 + (a << 6))) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 29)) * 0x94d049bb133111eb;
  return z ^ (z >> 32);
}

inline Config small_config() {
  Config config;
  config.num_blocks = 16;
  config.block_size = 4;
  config.max_num_seqs = 4;
  config.max_num_batched_tokens = 16;
  config.max_model_len = 48;
  config.vocab_size = 32;
  config.max_adjustments = 128;
  return config;
}

inline std::vector<Token> counting(int64_t n, Token from = 0) {
  std::vector<Token> tokens(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) tokens[static_cast<size_t>(i)] = static_cast<Token>((from + i) % 32);
  return tokens;
}

// KV of position p of a sequence: depends on every token up to p.
inline uint64_t kv_value(uint64_t previous, Token token) { return mix(previous, static_cast<uint64_t>(token)); }

// Quarters, so that float sums are exact.
inline float logit(uint64_t kv, int64_t seed, int64_t position, Token id) {
  const uint64_t h =
      mix(mix(kv, static_cast<uint64_t>(seed)), mix(static_cast<uint64_t>(position), static_cast<uint64_t>(id)));
  return static_cast<float>(h % 64) / 4 - 8;
}

inline Token argmax(const std::vector<float>& logits) {
  Token best = 0;
  for (size_t id = 1; id < logits.size(); ++id)
    if (logits[id] > logits[static_cast<size_t>(best)]) best = static_cast<Token>(id);
  return best;
}

// The tokens that choice `choice` of a request must give, with its finish reason, by the documented meaning of every
// field.
struct Expected {
  std::vector<Token> tokens;
  FinishReason finish = FinishReason::none;
};

inline Expected reference(const RequestSpec& spec, int64_t choice, const Config& config) {
  Expected expected;
  const auto seed = static_cast<int64_t>(seed_of_choice(spec.sampling.seed, choice));
  const float inf = std::numeric_limits<float>::infinity();
  uint64_t kv = 0;
  std::vector<bool> seen(static_cast<size_t>(config.vocab_size));
  std::vector<int> count(static_cast<size_t>(config.vocab_size));
  for (const Token token : spec.tokens) {
    kv = kv_value(kv, token);
    seen[static_cast<size_t>(token)] = true;
  }
  const auto has = [](const std::vector<Token>& ids, Token id) { return std::ranges::find(ids, id) != ids.end(); };
  const auto num_prompt = static_cast<int64_t>(spec.tokens.size());
  const int64_t most =
      std::min({spec.max_tokens, config.max_model_len - num_prompt, config.pool_tokens() - num_prompt});
  while (expected.finish == FinishReason::none) {
    const auto generated = static_cast<int64_t>(expected.tokens.size());
    std::vector<float> logits(static_cast<size_t>(config.vocab_size));
    for (Token id = 0; id < config.vocab_size; ++id) {
      float& l = logits[static_cast<size_t>(id)];
      l = logit(kv, seed, num_prompt + generated, id);
      const auto penalty = static_cast<float>(spec.sampling.repetition_penalty);
      if (seen[static_cast<size_t>(id)]) l = l > 0 ? l / penalty : l * penalty;
      for (const auto& [biased, bias] : spec.logit_bias)
        if (biased == id) l += static_cast<float>(std::clamp(bias, -100.0, 100.0));
      const int c = count[static_cast<size_t>(id)];
      if (c > 0) l -= static_cast<float>(spec.frequency_penalty * c + spec.presence_penalty);
      if (has(spec.banned_token_ids, id)) l = -inf;
      if (generated < spec.min_tokens && has(spec.stop_token_ids, id)) l = -inf;
      if (!spec.allowed_token_ids.empty() && !has(spec.allowed_token_ids, id)) l = -inf;
    }
    const Token token = argmax(logits);
    expected.tokens.push_back(token);
    kv = kv_value(kv, token);
    seen[static_cast<size_t>(token)] = true;
    ++count[static_cast<size_t>(token)];
    if (generated + 1 > spec.min_tokens && has(spec.stop_token_ids, token))
      expected.finish = FinishReason::stop;
    else if (generated + 1 == most)
      expected.finish = FinishReason::length;
  }
  return expected;
}

class Arenas {
 public:
  explicit Arenas(const Config& config) : layout_(config) {
    for (int64_t i = 0; i <= config.depth; ++i) {
      memory_.emplace_back(static_cast<size_t>(layout_.bytes() / 8), uint64_t{0xabababababababab});
      pointers_.push_back(reinterpret_cast<std::byte*>(memory_.back().data()));
    }
  }
  std::span<std::byte* const> pointers() const { return pointers_; }
  template <class T>
  const T* column(const Batch& batch, Col which) const {
    return reinterpret_cast<const T*>(pointers_[static_cast<size_t>(batch.arena)] + layout_[which].offset);
  }

 private:
  BatchLayout layout_;
  std::vector<std::vector<uint64_t>> memory_;
  std::vector<std::byte*> pointers_;
};

class FakeExecutor {
 public:
  FakeExecutor(const Config& config, const Arenas& arenas)
      : config_(config),
        arenas_(arenas),
        kv_(static_cast<size_t>(config.pool_tokens())),
        host_(static_cast<size_t>(config.num_host_blocks * config.block_size)) {}

  // Runs a batch; batches must come in order. Checks what every reader of a batch relies on.
  const std::vector<Token>& run(const Batch& batch) {
    check_header(batch);
    swap_blocks(batch);
    copy_blocks(batch);
    write_kv(batch);
    attend(batch);
    sampled_.clear();
    for (int64_t row = 0; row < batch.num_sampled; ++row) sampled_.push_back(sample(batch, row));
    return sampled_;
  }

 private:
  struct Entry {
    uint64_t value = 0;
    int32_t position = -1;
    Token token = -1;
  };
  template <class T>
  const T* at(const Batch& batch, Col which) const {
    return arenas_.column<T>(batch, which);
  }

  void check_header(const Batch& batch) const {
    const auto* header = at<int64_t>(batch, Col::header);
    const int64_t expected[] = {
        batch.step,          batch.num_tokens,  batch.num_seqs,      batch.num_decodes,     batch.num_sampled,
        batch.max_query_len, batch.max_seq_len, batch.num_copies,    batch.num_adjustments, batch.bytes_used,
        batch.padded_tokens, batch.padded_seqs, batch.num_swap_outs, batch.num_swap_ins,    batch.num_prefixes};
    invariant(std::equal(std::begin(expected), std::end(expected), header), "the header differs from the batch");
    invariant(batch.num_tokens <= config_.max_num_batched_tokens && batch.num_seqs <= config_.max_num_seqs, "S1, S2");
    invariant(batch.num_tokens > 0 && at<int32_t>(batch, Col::query_start)[batch.num_seqs] == batch.num_tokens,
              "no rows");
    const auto* start = at<int32_t>(batch, Col::query_start);
    for (int64_t seq = 0; seq < batch.num_seqs; ++seq)
      invariant(seq >= batch.num_decodes || start[seq + 1] - start[seq] == 1, "a decode with other than one row");
    check_padding(batch);
    if (config_.min_shared_tokens > 0 || batch.num_prefixes > 0) check_kept_order(batch);
  }

  // Order and groups, which the scheduler keeps from batch to batch, are those that this batch's blocks alone give.
  void check_kept_order(const Batch& batch) const {
    const auto *kv_start = at<int32_t>(batch, Col::kv_start), *blocks = at<int32_t>(batch, Col::kv_blocks);
    std::vector<BlockList> lists;
    for (int64_t seq = 0; seq < batch.num_decodes; ++seq)
      lists.emplace_back(blocks + kv_start[seq], blocks + kv_start[seq + 1]);
    invariant(batch.num_prefixes == 0 || std::ranges::is_sorted(lists, begins_before), "decodes are out of order");
    std::ranges::sort(lists, begins_before);
    std::vector<int64_t> common(lists.size());
    for (size_t i = 1; i < lists.size(); ++i) common[i] = common_beginning(lists[i - 1], lists[i]);
    std::vector<PrefixGroup> groups;
    const auto *start = at<int32_t>(batch, Col::prefix_start), *lens = at<int32_t>(batch, Col::prefix_lens);
    for (int64_t g = 0; g < batch.num_prefixes; ++g) {
      groups.push_back({start[g + 1] - start[g], lens[g] / config_.block_size});
      for (int64_t seq = start[g]; seq < start[g + 1]; ++seq)
        invariant(lens[g] < at<int32_t>(batch, Col::seq_lens)[seq], "a beginning that this step fills");
    }
    invariant(groups == group_prefixes(common, config_.blocks_for(config_.min_shared_tokens)), "other groups");
  }

  // What runs with the padded sizes must not store, attend or read anything for the rows beyond the batch's own.
  void check_padding(const Batch& batch) const {
    invariant(batch.padded_tokens >= batch.num_tokens && batch.padded_seqs >= batch.num_seqs, "padded to less");
    for (int64_t row = batch.num_tokens; row < batch.padded_tokens; ++row)
      invariant(at<int64_t>(batch, Col::slots)[row] == -1 && at<int32_t>(batch, Col::token_ids)[row] == 0 &&
                    at<int32_t>(batch, Col::positions)[row] == 0,
                "a padding token is somebody's");
    for (int64_t seq = batch.num_seqs; seq < batch.padded_seqs; ++seq)
      invariant(at<int32_t>(batch, Col::query_start)[seq + 1] == batch.num_tokens &&
                    at<int32_t>(batch, Col::kv_start)[seq + 1] == at<int32_t>(batch, Col::kv_start)[batch.num_seqs] &&
                    at<int32_t>(batch, Col::seq_lens)[seq] == 0,
                "a padding sequence owns something");
    for (int64_t row = batch.num_sampled; row < batch.padded_seqs; ++row)
      invariant(at<int32_t>(batch, Col::sample_rows)[row] == 0 && at<float>(batch, Col::temperature)[row] == 0 &&
                    at<int32_t>(batch, Col::num_logprobs)[row] == -1 &&
                    at<int32_t>(batch, Col::adjust_start)[row + 1] ==
                        at<int32_t>(batch, Col::adjust_start)[batch.num_sampled],
                "a padding row asks for something");
  }

  void copy_blocks(const Batch& batch) {
    const auto *src = at<int32_t>(batch, Col::copy_src), *dst = at<int32_t>(batch, Col::copy_dst);
    for (int64_t i = 0; i < batch.num_copies; ++i) {
      for (int64_t j = 0; j < batch.num_copies; ++j) invariant(src[i] != dst[j], "a copy's source is a destination");
      for (int64_t k = 0; k < config_.block_size; ++k) slot(dst[i], k) = slot(src[i], k);
    }
  }

  void swap_blocks(const Batch& batch) {
    const auto *src = at<int32_t>(batch, Col::swap_src), *dst = at<int32_t>(batch, Col::swap_dst);
    for (int64_t i = 0; i < batch.num_swap_outs + batch.num_swap_ins; ++i) {
      const bool out = i < batch.num_swap_outs;
      for (int64_t k = 0; k < config_.block_size; ++k) {
        Entry& host = host_.at(static_cast<size_t>((out ? dst[i] : src[i]) * config_.block_size + k));
        (out ? host : slot(dst[i], k)) = out ? slot(src[i], k) : host;
      }
    }
  }

  Entry& slot(int64_t block, int64_t offset) { return kv_[static_cast<size_t>(block * config_.block_size + offset)]; }
  Entry& entry(const Batch& batch, int64_t seq, int64_t position) {
    const int32_t first = at<int32_t>(batch, Col::kv_start)[seq];
    invariant(first + position / config_.block_size < at<int32_t>(batch, Col::kv_start)[seq + 1],
              "a position has no block");
    return slot(at<int32_t>(batch, Col::kv_blocks)[first + position / config_.block_size],
                position % config_.block_size);
  }

  void write_kv(const Batch& batch) {
    const auto* start = at<int32_t>(batch, Col::query_start);
    struct Row {
      int32_t position, row;
      int64_t seq;
    };
    std::vector<Row> rows;
    for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
      const int32_t length = at<int32_t>(batch, Col::seq_lens)[seq];
      for (int32_t row = start[seq]; row < start[seq + 1]; ++row) {
        rows.push_back({at<int32_t>(batch, Col::positions)[row], row, seq});
        invariant(rows.back().position == length - (start[seq + 1] - row),
                  "positions do not end at the sequence's length");
      }
    }
    // Sequences of one step may share blocks that the step itself fills: a value follows from the one before it.
    std::ranges::sort(rows, {}, &Row::position);
    for (const auto& [position, row, seq] : rows) {
      Entry& own = entry(batch, seq, position);
      invariant(&own == &kv_[static_cast<size_t>(at<int64_t>(batch, Col::slots)[row])],
                "a slot is not of the block list");
      Token token = at<int32_t>(batch, Col::token_ids)[row];
      if (token < 0) token = sampled_.at(static_cast<size_t>(-token - 1));
      own = {kv_value(position == 0 ? 0 : entry(batch, seq, position - 1).value, token), position, token};
    }
  }

  // Reads all of every sequence, as attention does: each entry must follow from the one before.
  void attend(const Batch& batch) {
    for (int64_t seq = 0; seq < batch.num_seqs; ++seq) {
      uint64_t value = 0;
      for (int64_t position = 0; position < at<int32_t>(batch, Col::seq_lens)[seq]; ++position) {
        Entry& own = entry(batch, seq, position);
        invariant(own.position == position, "KV of another position");
        value = kv_value(value, own.token);
        invariant(own.value == value, "KV of another sequence, or overwritten");
      }
    }
  }

  Token sample(const Batch& batch, int64_t row) {
    const int32_t token_row = at<int32_t>(batch, Col::sample_rows)[row];
    const int64_t position = at<int32_t>(batch, Col::positions)[token_row] + 1;
    invariant(position == at<int32_t>(batch, Col::sample_positions)[row], "the sampled position is not the next one");
    const uint64_t kv = kv_[static_cast<size_t>(at<int64_t>(batch, Col::slots)[token_row])].value;
    std::vector<float>& logits = logits_;
    logits.resize(static_cast<size_t>(config_.vocab_size));
    for (Token id = 0; id < config_.vocab_size; ++id)
      logits[static_cast<size_t>(id)] = logit(kv, at<int64_t>(batch, Col::seeds)[row], position, id);
    adjust(batch, row, logits);
    return argmax(logits);
  }

  // What Sample in ops/ops.h says about adjustments.
  void adjust(const Batch& batch, int64_t row, std::vector<float>& logits) const {
    const int32_t begin = at<int32_t>(batch, Col::adjust_start)[row],
                  end = at<int32_t>(batch, Col::adjust_start)[row + 1];
    const float penalty = at<float>(batch, Col::repetition_penalty)[row];
    bool only_allowed = false;
    const auto* entries = at<AdjustmentEntry>(batch, Col::adjustments);
    for (int32_t i = begin; i < end; ++i) only_allowed |= (entries[i][2] & 2) != 0;
    std::vector<bool> may(logits.size(), !only_allowed);
    for (int32_t i = begin; i < end; ++i) {
      const auto [id, add, flags] = entries[i];
      invariant(i == begin || entries[i - 1][0] < id, "adjustments are not sorted by id");
      float& l = logits[static_cast<size_t>(id)];
      if (flags & 1) l = l > 0 ? l / penalty : l * penalty;
      l += std::bit_cast<float>(add);
      if (flags & 2) may[static_cast<size_t>(id)] = true;
    }
    for (size_t id = 0; id < logits.size(); ++id)
      if (!may[id]) logits[id] = -std::numeric_limits<float>::infinity();
  }

  const Config config_;
  const Arenas& arenas_;
  std::vector<Entry> kv_, host_;
  std::vector<Token> sampled_;  // of the last batch
  std::vector<float> logits_;
};

// A scheduler with its machine, and what every request got.
class Machine {
 public:
  struct Result {
    std::vector<Token> tokens;
    FinishReason finish = FinishReason::none;
    int32_t cached_tokens = -1;
  };

  explicit Machine(Config config) : arenas(config), executor(config, arenas), scheduler(config, arenas.pointers()) {}

  void add(RequestId id, std::span<const Token> tokens, int64_t max_tokens = 8) {
    add({.id = id, .tokens = tokens, .max_tokens = max_tokens});
  }
  void add(const RequestSpec& spec) { scheduler.add(spec); }

  const Batch* schedule() {
    const Batch* batch = scheduler.schedule();
    if (batch) in_flight.push_back(*batch);
    scheduler.check_invariants();
    return batch;
  }
  const Outputs& commit() {
    const Batch batch = in_flight.front();
    in_flight.pop_front();
    const Outputs& outputs = scheduler.commit(batch.step, executor.run(batch));
    for (size_t i = 0; i < static_cast<size_t>(outputs.num_rows); ++i) {
      Result& result = results[outputs.ids[i]];
      result.tokens.push_back(outputs.tokens[i]);
      result.finish = outputs.finish[i];
      if (outputs.cached_tokens[i] >= 0) result.cached_tokens = outputs.cached_tokens[i];
    }
    scheduler.check_invariants();
    return outputs;
  }
  // The batch that was committed.
  Batch step() {
    invariant(schedule() != nullptr, "nothing to schedule");
    const Batch batch = in_flight.front();
    commit();
    return batch;
  }
  // Until idle, with as many batches in flight as there may be.
  void run() {
    for (int rounds = 0; !scheduler.idle(); ++rounds) {
      invariant(rounds < 10000, "the scheduler makes no progress");
      while (schedule()) {
      }
      commit();
    }
  }

  template <class T>
  std::vector<T> column(const Batch& batch, Col which, int64_t n) const {
    const T* begin = arenas.column<T>(batch, which);
    return {begin, begin + n};
  }
  Request* find(RequestId id) { return SchedulerTest::find(scheduler, id); }

  Arenas arenas;
  FakeExecutor executor;
  Scheduler scheduler;
  std::deque<Batch> in_flight;
  std::map<RequestId, Result> results;
};

}  // namespace test
}  // namespace hybrid
