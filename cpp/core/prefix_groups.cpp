#include "core/prefix_groups.h"

#include <algorithm>
#include <cstring>

namespace hybrid {

namespace {

// The cut that spares most.
std::vector<PrefixGroup> best_cut(std::span<const int64_t> common) {
  const size_t count = common.size();
  const auto [least, most] = std::minmax_element(common.begin() + 1, common.end());
  if (*least == *most) return {{static_cast<int64_t>(count), *least}};
  struct Best {
    int64_t spared = -1;
    size_t first = 0;  // of the last group
    int64_t blocks = 0;
  };
  std::vector<Best> best(count + 1);  // of the decodes ahead of each
  best[0].spared = 0;
  for (size_t last = 0; last < count; ++last) {
    int64_t blocks = 0;
    for (size_t first = last + 1; first-- > 0;) {
      // Of the decodes from first to last.
      if (first < last) blocks = first + 1 == last ? common[last] : std::min(blocks, common[first + 1]);
      const int64_t spared = best[first].spared + blocks * static_cast<int64_t>(last - first);
      if (spared > best[last + 1].spared) best[last + 1] = {spared, first, blocks};
      // Groups that begin earlier have no more in common, and no more is spared ahead of them.
      if (first < last && best[first].spared + blocks * static_cast<int64_t>(last) <= best[last + 1].spared) break;
    }
  }
  std::vector<PrefixGroup> groups;
  for (size_t end = count; end > 0; end = best[end].first)
    groups.push_back({static_cast<int64_t>(end - best[end].first), best[end].blocks});
  std::ranges::reverse(groups);
  return groups;
}

}  // namespace

bool begins_before(BlockList a, BlockList b) {
  const size_t bytes = std::min(a.size_bytes(), b.size_bytes());
  const int order = bytes == 0 ? 0 : std::memcmp(a.data(), b.data(), bytes);  // empty lists may have no address
  return order != 0 ? order < 0 : a.size() < b.size();
}

int64_t common_beginning(BlockList a, BlockList b) { return std::ranges::mismatch(a, b).in1 - a.begin(); }

std::vector<PrefixGroup> group_prefixes(std::span<const int64_t> common, int64_t min_blocks) {
  if (common.size() < 2) return {};
  const std::vector<PrefixGroup> cut = best_cut(common);
  int64_t spared = 0;
  for (const PrefixGroup& group : cut) spared += group.blocks * (group.decodes - 1);
  if (spared < std::max<int64_t>(min_blocks, 1)) return {};
  std::vector<PrefixGroup> groups;
  for (PrefixGroup group : cut) {
    if (group.blocks * (group.decodes - 1) * 16 < min_blocks) group.blocks = 0;
    if (group.blocks == 0 && !groups.empty() && groups.back().blocks == 0)
      groups.back().decodes += group.decodes;
    else
      groups.push_back(group);
  }
  return groups;
}

}  // namespace hybrid
