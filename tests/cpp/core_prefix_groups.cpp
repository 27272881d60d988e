// Decodes that begin alike: which are grouped, and what a batch says of them.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "core/prefix_groups.h"
#include "core_harness.h"

namespace hybrid::test {
namespace {

using Lists = std::vector<std::vector<BlockId>>;

std::vector<PrefixGroup> groups_of(const Lists& lists, int64_t min_blocks) {
  std::vector<int64_t> common(lists.size());
  for (size_t i = 1; i < lists.size(); ++i) common[i] = common_beginning(lists[i - 1], lists[i]);
  return group_prefixes(common, min_blocks);
}
int64_t spared(const std::vector<PrefixGroup>& groups) {
  int64_t blocks = 0;
  for (const PrefixGroup& group : groups) blocks += (group.decodes - 1) * group.blocks;
  return blocks;
}

Config sharing_config() {
  Config config;
  config.num_blocks = 64, config.block_size = 2, config.max_num_seqs = 8, config.max_num_batched_tokens = 64;
  config.max_model_len = 32, config.vocab_size = 100;
  config.validate();
  return config;
}

TEST(PrefixGroups, one_group_where_all_begin_alike) {
  EXPECT_EQ(groups_of({{1, 2, 3, 4}, {1, 2, 3, 5}, {1, 2, 3}}, 1), (std::vector<PrefixGroup>{{3, 3}}));
}

TEST(PrefixGroups, none_where_too_little_is_spared) {
  EXPECT_EQ(groups_of({{1, 2, 3}, {1, 2, 4}}, 3), std::vector<PrefixGroup>{});
  EXPECT_EQ(groups_of({{1, 2, 3}, {1, 2, 4}}, 2), (std::vector<PrefixGroup>{{2, 2}}));
  EXPECT_EQ(groups_of({{1}, {2}, {3}}, 1), std::vector<PrefixGroup>{});
  EXPECT_EQ(groups_of({{1, 2, 3}}, 1), std::vector<PrefixGroup>{});
  EXPECT_EQ(groups_of({}, 1), std::vector<PrefixGroup>{});
}

TEST(PrefixGroups, families_are_cut_where_that_spares_more_and_loners_are_one_group_of_nothing) {
  const std::vector<BlockId> a{1, 2, 3, 4, 5}, b{1, 9, 9, 9, 9};
  EXPECT_EQ(groups_of({a, a, a, b, b, b, {7}, {8}, {9}}, 1), (std::vector<PrefixGroup>{{3, 5}, {3, 5}, {3, 0}}));
  EXPECT_EQ(groups_of({{1, 2, 3}, {1, 2, 4}, {1, 2, 5}, {1, 2, 6}}, 1), (std::vector<PrefixGroup>{{4, 2}}));
}

TEST(PrefixGroups, a_group_that_spares_next_to_nothing_is_left_alone) {
  const std::vector<BlockId> small{1, 2};
  std::vector<BlockId> large(100, 5);
  EXPECT_EQ(groups_of({small, small, large, large}, 64), (std::vector<PrefixGroup>{{2, 0}, {2, 100}}));
}

// Against all ways to cut.
TEST(PrefixGroups, spare_as_much_as_any_cut_along_the_order) {
  std::mt19937 rng(5);
  for (int again = 0; again < 300; ++again) {
    Lists lists(1 + rng() % 9);
    for (auto& list : lists)
      for (size_t n = rng() % 6; list.size() < n;) list.push_back(static_cast<BlockId>(rng() % 2));
    std::ranges::sort(lists, [](const auto& a, const auto& b) { return begins_before(a, b); });
    int64_t best = 0;
    for (unsigned cuts = 0; cuts < 1u << (lists.size() - 1); ++cuts) {
      int64_t blocks = 0;
      for (size_t first = 0, i = 0; i < lists.size(); ++i)
        if (i + 1 == lists.size() || cuts >> i & 1) {
          const auto [a, b] = std::ranges::mismatch(lists[first], lists[i]);
          blocks += (a - lists[first].begin()) * static_cast<int64_t>(i - first);
          first = i + 1;
        }
      best = std::max(best, blocks);
    }
    const auto groups = groups_of(lists, 1);
    EXPECT_EQ(spared(groups), best) << "round " << again;
    int64_t decodes = 0;
    for (const PrefixGroup& group : groups) decodes += group.decodes;
    EXPECT_TRUE(groups.empty() || decodes == std::ssize(lists));
  }
}

TEST(PrefixGroups, a_batch_lists_its_decodes_by_group_whatever_order_they_came_in) {
  Config config = sharing_config();
  config.min_shared_tokens = 4;
  Machine m(config);
  for (int id = 0; id < 6; ++id) {
    std::vector<Token> prompt(9, id % 2 == 0 ? 3 : 4);  // two families by turns
    prompt.back() = 10 + id;
    m.add(static_cast<RequestId>(id), prompt, 4);
  }
  EXPECT_EQ(m.step().num_prefixes, 0) << "prompts";
  const Batch batch = m.step();
  ASSERT_EQ(batch.num_decodes, 6);
  ASSERT_EQ(batch.num_prefixes, 2);
  EXPECT_EQ(m.column<int32_t>(batch, Col::prefix_start, 3), (std::vector<int32_t>{0, 3, 6}));
  EXPECT_EQ(m.column<int32_t>(batch, Col::prefix_lens, 2), (std::vector<int32_t>{8, 8}));
}

// What is kept from step to step is what the batch's blocks give (check_kept_order of the harness), whoever comes,
// ends, is preempted, forks, or waits for a token.
TEST(PrefixGroups, groups_that_are_kept_are_those_that_would_be_found_anew) {
  int64_t num_grouped = 0, num_preempted = 0, num_kept = 0;
  for (uint32_t seed = 0; seed < 60; ++seed) {
    std::mt19937 rng(seed);
    Config config = sharing_config();
    config.depth = 1 + seed % 2, config.min_shared_tokens = 1 + static_cast<int64_t>(rng() % 6);
    config.num_blocks = 24 + static_cast<int64_t>(rng() % 40), config.max_num_batched_tokens = 24;
    Machine m(config);
    RequestId next = 0;
    std::vector<int32_t> last;
    for (int round = 0; round < 120; ++round) {
      if (rng() % 3 == 0 && next < 90) {
        std::vector<Token> prompt(2 + rng() % 14, static_cast<Token>(rng() % 2));  // of two families, and branches
        if (prompt.size() > 6 && rng() % 2) prompt[6] = 5;
        RequestSpec spec{.id = next, .tokens = prompt, .n = 1 + static_cast<int64_t>(rng() % 3)};
        spec.max_tokens = 2 + static_cast<int64_t>(rng() % 16);
        spec.priority = static_cast<int64_t>(rng() % 2);
        if (rng() % 5 == 0) spec.presence_penalty = 1;  // is not in every batch at depth 2
        m.add(spec);
        next += 3;
      }
      if (rng() % 16 == 0) {
        const RequestId gone[] = {rng() % (next + 1)};
        m.scheduler.abort(gone);
      }
      if (rng() % 24 == 0) m.scheduler.limit_running(1 + static_cast<int64_t>(rng() % 8));
      if (const Batch* batch = m.schedule(); batch != nullptr && batch->num_prefixes > 0) {
        ++num_grouped;
        const auto groups = m.column<int32_t>(*batch, Col::prefix_start, batch->num_prefixes + 1);
        num_kept += groups == last;
        last = groups;
      }
      if (!m.in_flight.empty() && (rng() % 4 > 0 || std::ssize(m.in_flight) == config.depth)) m.commit();
    }
    m.run();
    num_preempted += m.scheduler.stats().num_preemptions;
  }
  EXPECT_GT(num_grouped, 1000);
  EXPECT_GT(num_preempted, 100);
  EXPECT_GT(num_kept, 100);
}

TEST(PrefixGroups, a_batch_lists_none_unless_it_is_told_to) {
  Machine m(sharing_config());
  for (int id = 0; id < 4; ++id) m.add(static_cast<RequestId>(id), std::vector<Token>(9, 3), 4);
  m.step();
  const Batch batch = m.step();
  EXPECT_EQ(batch.num_decodes, 4);
  EXPECT_EQ(batch.num_prefixes, 0);
}

}  // namespace
}  // namespace hybrid::test
