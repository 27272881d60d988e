#include "core/decode_order.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace hybrid {

void DecodeOrder::add(Request& request) {
  if (std::exchange(request.is_ordered, true)) return;
  has_all_ = false;
  const auto before = [](const Request* a, const Place& b) {
    return begins_before(a->kv.blocks(), b.request->kv.blocks());
  };
  const auto at = places_.insert(std::upper_bound(places_.begin(), places_.end(), &request, before), {&request, 0});
  if (at != places_.begin()) at->common = common_beginning((at - 1)->request->kv.blocks(), request.kv.blocks());
  if (const auto next = at + 1; next != places_.end())
    next->common = common_beginning(request.kv.blocks(), next->request->kv.blocks());
}

void DecodeOrder::remove(Request& request) {
  if (!std::exchange(request.is_ordered, false)) return;
  has_all_ = false;
  const auto at = std::ranges::find(places_, &request, &Place::request);
  const int64_t common = at->common;
  if (const auto next = places_.erase(at); next != places_.end()) next->common = std::min(common, next->common);
}

std::span<Request* const> DecodeOrder::decodes_of(int64_t step, int64_t num_decodes) {
  if (has_all_ && num_decodes == size()) return decodes_;
  has_all_ = num_decodes == size();
  decodes_.clear();
  common_.clear();
  int64_t common = 0;  // of those since the last one of the batch, which are in none
  for (const Place& place : places_) {
    common = std::min(common, place.common);
    if (place.request->planned_for != step) continue;
    decodes_.push_back(place.request);
    common_.push_back(common);
    common = std::numeric_limits<int64_t>::max();
  }
  if (common_ != last_common_) {
    groups_ = group_prefixes(common_, min_blocks_);
    last_common_.swap(common_);
  }
  return decodes_;
}

}  // namespace hybrid
