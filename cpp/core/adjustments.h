// Adjustments: what one request changes about its logits, as entries sorted by token id (see Sample in ops/ops.h).
// Knows token ids and counts; not the logits, not the sampler. Empty, and free of cost, for a request that changes
// none.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "common/types.h"

namespace hybrid {

struct RequestSpec;

// An entry as a batch has it: the token's id, the bits of the f32 that is added to its logit, flags.
using AdjustmentEntry = std::array<int32_t, 3>;

class Adjustments {
 public:
  static constexpr int32_t seen = 1, allowed = 2;  // flags of an entry

  Adjustments() = default;
  explicit Adjustments(const RequestSpec& spec);
  // As many as those that were recorded, of ids that mean nothing: any token but 0 adds one where `traits` allow it.
  Adjustments(int64_t size, int64_t recorded_traits);

  bool empty() const { return entries_.empty(); }
  int64_t size() const { return static_cast<int64_t>(entries_.size()); }  // at most this many entries are written
  // They depend on every token so far, hence none may be unknown.
  bool needs_tokens() const { return penalises_; }
  int64_t traits() const { return penalises_ + 2 * allow_list_; }  // what besides the size says how they grow

  void observe(Token token);  // a token of the output
  // Writes the entries for picking the token after `num_generated` ones, at most size(); returns how many.
  int64_t write(int64_t num_generated, AdjustmentEntry* out) const;

 private:
  struct Entry {
    Token id;
    int32_t flags = 0;
    int32_t count = 0;   // in the output
    float bias = 0;      // -inf: banned
    bool stops = false;  // banned until min_tokens are there
  };

  std::vector<Entry> entries_;  // sorted by id
  float frequency_penalty_ = 0, presence_penalty_ = 0;
  bool repetition_ = false, penalises_ = false, allow_list_ = false;
  int64_t min_tokens_ = 0;
};

}  // namespace hybrid
