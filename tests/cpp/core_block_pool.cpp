#include <array>
#include <list>
#include <random>

#include "common/siphash.h"
#include "core_harness.h"

namespace hybrid::test {
namespace {

std::string hex(const Hash128& hash) {
  std::string text;
  for (const uint64_t word : {hash.lo, hash.hi})
    for (int byte = 0; byte < 8; ++byte) {
      char digits[3];
      std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned>(word >> (8 * byte)) & 0xff);
      text += digits;
    }
  return text;
}

TEST(SipHash128, equals_the_vectors_of_its_authors) {
  SipHash128::Key key;
  std::vector<uint8_t> message(63);
  for (size_t i = 0; i < 63; ++i) message[i] = static_cast<uint8_t>(i);
  for (size_t i = 0; i < 16; ++i) key[i] = static_cast<uint8_t>(i);
  const auto of = [&](size_t n) { return hex(SipHash128(key).finish(std::span(message).first(n))); };
  EXPECT_EQ(of(0), "a3817f04ba25a8e66df67214c7550293");
  EXPECT_EQ(of(1), "da87c1d86b99af44347659119b22fc45");
  EXPECT_EQ(of(8), "3b62a9ba6258f5610f83e264f31497b4");
  EXPECT_EQ(of(15), "5493e99933b0a8117e08ec0f97cfc3d9");
  EXPECT_EQ(of(63), "5150d1772f50834a503e069a973fbd7c");
}

TEST(SipHash128, words_count_as_their_eight_bytes) {
  const std::array<uint8_t, 11> message{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  SipHash128 words({});
  words.word(0x0807060504030201);
  EXPECT_EQ(hex(words.finish(std::span(message).subspan(8))), hex(SipHash128({}).finish(message)));
}

Hash128 hash_of(uint64_t i) { return {mix(i, 1), mix(i, 2)}; }

TEST(BlockPool, allocates_all_or_nothing) {
  BlockPool pool(4);
  std::vector<BlockId> blocks;
  EXPECT_FALSE(pool.allocate(5, blocks));
  EXPECT_TRUE(blocks.empty());
  EXPECT_TRUE(pool.allocate(4, blocks));
  EXPECT_EQ(blocks, (std::vector<BlockId>{0, 1, 2, 3}));
  EXPECT_EQ(pool.num_free(), 0);
  EXPECT_FALSE(pool.allocate(1, blocks));
}

TEST(BlockPool, evicts_blocks_without_content_first_then_the_least_recently_used_tail_first) {  // I6
  BlockPool pool(6);
  std::vector<BlockId> blocks, next;
  ASSERT_TRUE(pool.allocate(6, blocks));
  for (const BlockId block : {0, 1, 2, 3}) pool.publish(block, hash_of(static_cast<uint64_t>(block)));
  pool.release(std::array<BlockId, 2>{2, 3});     // used longest ago; 3 is the tail
  pool.release(std::array<BlockId, 3>{0, 1, 4});  // 4 has no content
  pool.release(std::array<BlockId, 1>{5});
  ASSERT_TRUE(pool.allocate(6, next));
  EXPECT_EQ(next, (std::vector<BlockId>{5, 4, 3, 2, 1, 0}));
  EXPECT_EQ(pool.find(hash_of(0)), BlockPool::none) << "a reused block is still found";
}

TEST(BlockPool, a_free_block_that_is_found_again_is_shared_not_evicted) {
  BlockPool pool(2);
  std::vector<BlockId> blocks, next;
  ASSERT_TRUE(pool.allocate(1, blocks));
  pool.publish(0, hash_of(7));
  pool.release(blocks);
  ASSERT_EQ(pool.find(hash_of(7)), 0);
  pool.share(0);
  pool.share(0);
  EXPECT_EQ(pool.references(0), 2);
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_FALSE(pool.allocate(2, next));
}

TEST(BlockPool, of_two_blocks_with_one_content_the_first_is_found) {
  BlockPool pool(2);
  std::vector<BlockId> blocks;
  ASSERT_TRUE(pool.allocate(2, blocks));
  pool.publish(1, hash_of(7));
  pool.publish(0, hash_of(7));
  EXPECT_EQ(pool.find(hash_of(7)), 1);
  EXPECT_FALSE(pool.published(0));
  pool.check_invariants(std::array<int32_t, 2>{1, 1});
}

TEST(BlockPool, forgetting_hashes_finds_nothing_and_frees_nothing) {
  BlockPool pool(2);
  std::vector<BlockId> blocks;
  ASSERT_TRUE(pool.allocate(2, blocks));
  pool.publish(0, hash_of(7));
  pool.forget_hashes();
  EXPECT_EQ(pool.find(hash_of(7)), BlockPool::none);
  pool.check_invariants(std::array<int32_t, 2>{1, 1});
}

TEST(BlockPool, misuse_is_an_internal_error) {
  BlockPool pool(2);
  std::vector<BlockId> blocks;
  ASSERT_TRUE(pool.allocate(1, blocks));
  pool.release(blocks);
  EXPECT_THROW(pool.release(blocks), InternalError) << "released twice";
  EXPECT_THROW(pool.publish(0, hash_of(1)), InternalError) << "published while free";
  EXPECT_THROW(pool.share(2), InternalError) << "no such block";
  EXPECT_THROW(pool.share(-1), InternalError);
  pool.share(0);
  pool.publish(0, hash_of(1));
  EXPECT_THROW(pool.publish(0, hash_of(2)), InternalError) << "another content";
  EXPECT_THROW(pool.check_invariants(std::array<int32_t, 2>{0, 0}), InternalError) << "a reference nobody holds";
}

TEST(BlockPool, random_operations_equal_a_naive_model) {  // F-21, I1 to I6
  std::mt19937_64 random(1);
  constexpr BlockId num_blocks = 12;
  BlockPool pool(num_blocks);
  std::list<BlockId> free_blocks;  // next to be reused first
  std::vector<int32_t> references(num_blocks);
  std::map<BlockId, uint64_t> content;
  for (BlockId block = 0; block < num_blocks; ++block) free_blocks.push_back(block);
  const auto holder = [&](uint64_t c) {
    const auto found = std::ranges::find_if(content, [&](const auto& item) { return item.second == c; });
    return found == content.end() ? BlockPool::none : found->first;
  };
  for (int i = 0; i < 200'000; ++i) {
    const auto block = static_cast<BlockId>(random() % num_blocks);
    const uint64_t c = random() % 20;
    switch (random() % 4) {
      case 0: {
        std::vector<BlockId> got;
        ASSERT_EQ(pool.allocate(1, got), !free_blocks.empty());
        if (got.empty()) break;
        ASSERT_EQ(got[0], free_blocks.front());
        free_blocks.pop_front();
        content.erase(got[0]);
        references[static_cast<size_t>(got[0])] = 1;
        break;
      }
      case 1:
        if (references[static_cast<size_t>(block)] == 0) break;
        pool.release({&block, 1});
        if (--references[static_cast<size_t>(block)] > 0) break;
        content.contains(block) ? free_blocks.push_back(block) : free_blocks.push_front(block);
        break;
      case 2:
        if (references[static_cast<size_t>(block)] == 0 || content.contains(block)) break;
        pool.publish(block, hash_of(c));
        if (holder(c) == BlockPool::none) content[block] = c;
        break;
      case 3:
        ASSERT_EQ(pool.find(hash_of(c)), holder(c));
        if (holder(c) == BlockPool::none) break;
        if (references[static_cast<size_t>(holder(c))]++ == 0) free_blocks.remove(holder(c));
        pool.share(holder(c));
        break;
    }
    ASSERT_EQ(pool.num_free(), std::ssize(free_blocks));
    pool.check_invariants(references);
  }
}

}  // namespace
}  // namespace hybrid::test
