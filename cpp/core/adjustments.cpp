#include "core/adjustments.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "core/request.h"

namespace hybrid {

Adjustments::Adjustments(const RequestSpec& spec)
    : frequency_penalty_(static_cast<float>(spec.frequency_penalty)),
      presence_penalty_(static_cast<float>(spec.presence_penalty)),
      repetition_(spec.sampling.repetition_penalty != 1),
      penalises_(repetition_ || spec.frequency_penalty != 0 || spec.presence_penalty != 0),
      allow_list_(!spec.allowed_token_ids.empty()),
      min_tokens_(spec.min_tokens) {
  // Collected first and sorted once: inserting a long allowed list or prompt in place would be quadratic.
  const float banned = -std::numeric_limits<float>::infinity();
  for (const Token id : spec.allowed_token_ids) entries_.push_back({.id = id, .flags = allowed});
  for (const auto& [id, bias] : spec.logit_bias)
    entries_.push_back({.id = id, .bias = static_cast<float>(std::clamp(bias, -100.0, 100.0))});
  for (const Token id : spec.banned_token_ids) entries_.push_back({.id = id, .bias = banned});
  if (min_tokens_ > 0)
    for (const Token id : spec.stop_token_ids) entries_.push_back({.id = id, .stops = true});
  if (repetition_)
    for (const Token id : spec.tokens) entries_.push_back({.id = id, .flags = seen});
  std::ranges::stable_sort(entries_, {}, &Entry::id);
  size_t last = 0;
  for (size_t i = 1; i < entries_.size(); ++i) {
    if (entries_[i].id != entries_[last].id) {
      entries_[++last] = entries_[i];
      continue;
    }
    entries_[last].flags |= entries_[i].flags;
    entries_[last].stops |= entries_[i].stops;
    if (entries_[i].bias != 0) entries_[last].bias = entries_[i].bias;  // the last one wins; a ban comes last
  }
  if (!entries_.empty()) entries_.resize(last + 1);
  // Within an allowed list only its members can be picked: what is said about others has no effect.
  if (allow_list_) std::erase_if(entries_, [](const Entry& e) { return !(e.flags & allowed); });
}

Adjustments::Adjustments(int64_t size, int64_t recorded_traits)
    : penalises_((recorded_traits & 1) != 0), allow_list_((recorded_traits & 2) != 0) {
  for (int64_t i = 0; i < size; ++i) entries_.push_back({.id = static_cast<Token>(i + 1 - size)});
}

void Adjustments::observe(Token token) {
  if (!penalises_) return;
  const auto at = std::ranges::lower_bound(entries_, token, {}, &Entry::id);
  const bool found = at != entries_.end() && at->id == token;
  if (!found && allow_list_) return;
  Entry& entry = found ? *at : *entries_.insert(at, Entry{.id = token});
  ++entry.count;
  if (repetition_) entry.flags |= seen;
}

int64_t Adjustments::write(int64_t num_generated, AdjustmentEntry* out) const {
  int64_t n = 0;
  for (const Entry& entry : entries_) {
    float add = entry.bias;
    if (entry.count > 0) add -= frequency_penalty_ * static_cast<float>(entry.count) + presence_penalty_;
    if (entry.stops && num_generated < min_tokens_) add = -std::numeric_limits<float>::infinity();
    if (add == 0 && entry.flags == 0) continue;
    out[n++] = {entry.id, std::bit_cast<int32_t>(add), entry.flags};
  }
  return n;
}

}  // namespace hybrid
