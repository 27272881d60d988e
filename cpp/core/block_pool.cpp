#include "core/block_pool.h"

#include <algorithm>
#include <bit>

#include "common/check.h"

namespace hybrid {

BlockPool::BlockPool(int64_t num_blocks)
    : blocks_(static_cast<size_t>(num_blocks) + 1),
      index_(std::bit_ceil(2 * static_cast<size_t>(num_blocks)), none),
      num_free_(0) {
  const auto head = static_cast<BlockId>(num_blocks);
  blocks_[head].prev = blocks_[head].next = head;
  for (BlockId block = 0; block < head; ++block) link_before(block, head);
}

const BlockPool::Block& BlockPool::at(BlockId block) const {
  invariant(0 <= block && block < num_blocks(), "no such block");
  return blocks_[block];
}

bool BlockPool::allocate(int64_t n, std::vector<BlockId>& out) {
  if (n > num_free_) return false;
  for (int64_t i = 0; i < n; ++i) {
    const BlockId block = blocks_.back().next;
    invariant(blocks_[block].references == 0, "a referenced block is in the free list");
    if (blocks_[block].published) drop_hash(block);
    unlink(block);
    blocks_[block].references = 1;
    out.push_back(block);
  }
  return true;
}

void BlockPool::share(BlockId block) {
  if (at(block).references == 0) unlink(block);
  ++blocks_[block].references;
}

void BlockPool::release(std::span<const BlockId> blocks) {
  const auto head = static_cast<BlockId>(num_blocks());
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
    invariant(at(*block).references > 0, "a free block is released");
    if (--blocks_[*block].references == 0) link_before(*block, blocks_[*block].published ? head : blocks_[head].next);
  }
}

BlockId BlockPool::find(const Hash128& hash) const {
  for (size_t i = home(hash); index_[i] != none; i = (i + 1) & (index_.size() - 1))
    if (blocks_[index_[i]].hash == hash) return index_[i];
  return none;
}

void BlockPool::publish(BlockId block, const Hash128& hash) {
  invariant(at(block).references > 0, "a free block is published");
  if (blocks_[block].published) return invariant(blocks_[block].hash == hash, "a block's content changed");
  if (find(hash) != none) return;
  put_hash(block, hash);
}

void BlockPool::put_hash(BlockId block, const Hash128& hash) {
  size_t i = home(hash);
  while (index_[i] != none) i = (i + 1) & (index_.size() - 1);
  index_[i] = block;
  blocks_[block].published = true;
  blocks_[block].hash = hash;
}

void BlockPool::drop_hash(BlockId block) {
  const size_t mask = index_.size() - 1;
  size_t hole = home(blocks_[block].hash);
  while (index_[hole] != block) {
    invariant(index_[hole] != none, "a published block is not in the index");
    hole = (hole + 1) & mask;
  }
  // Entries behind the hole move up unless that would put them before their home: no tombstones.
  for (size_t i = (hole + 1) & mask; index_[i] != none; i = (i + 1) & mask) {
    if (((i - home(blocks_[index_[i]].hash)) & mask) < ((i - hole) & mask)) continue;
    index_[hole] = index_[i];
    hole = i;
  }
  index_[hole] = none;
  blocks_[block].published = false;
}

void BlockPool::forget_hashes() {
  std::ranges::fill(index_, none);
  for (Block& block : blocks_) block.published = false;
}

void BlockPool::link_before(BlockId block, BlockId next) {
  const BlockId prev = blocks_[next].prev;
  blocks_[block].prev = prev;
  blocks_[block].next = next;
  blocks_[prev].next = blocks_[next].prev = block;
  ++num_free_;
}

void BlockPool::unlink(BlockId block) {
  blocks_[blocks_[block].prev].next = blocks_[block].next;
  blocks_[blocks_[block].next].prev = blocks_[block].prev;
  --num_free_;
}

void BlockPool::check_invariants(std::span<const int32_t> references) const {
  const auto head = static_cast<BlockId>(num_blocks());
  int64_t num_listed = 0, num_referenced = 0, num_published = 0, num_indexed = 0;
  for (BlockId block = blocks_[head].next; block != head; block = blocks_[block].next) {
    const BlockId next = blocks_[block].next;
    invariant(next == head || blocks_[next].published || !blocks_[block].published,
              "I6: a block without content waits longer");
    invariant(blocks_[block].references == 0, "I1: a referenced block is in the free list");
    invariant(blocks_[blocks_[block].next].prev == block, "I1: the free list is broken");
    invariant(++num_listed <= num_blocks(), "I1: the free list has a cycle");
  }
  invariant(num_listed == num_free_, "I1: the free count is wrong");
  for (BlockId block = 0; block < head; ++block) {
    invariant(blocks_[block].references == references[block], "I2: references differ from table memberships");
    num_referenced += blocks_[block].references > 0;
    num_published += blocks_[block].published;
    if (blocks_[block].published) invariant(find(blocks_[block].hash) == block, "I5: a published block is not found");
  }
  invariant(num_listed + num_referenced == num_blocks(), "I4: free + referenced differs from the total");
  for (const BlockId block : index_) num_indexed += block != none;
  invariant(num_indexed == num_published, "I5: the index has stale entries");
}

}  // namespace hybrid
