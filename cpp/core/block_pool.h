// BlockPool: physical KV blocks. Knows references, eviction order and prefix hashes; not requests, not tokens.
//
// A block is referenced or free. Free blocks form one list, the next to be reused first: those without a hash, then
// those with one, least recently used first. Every operation is O(1) a block and none allocates after construction.
#pragma once

#include <span>
#include <vector>

#include "common/siphash.h"
#include "common/types.h"

namespace hybrid {

class BlockPool {
 public:
  static constexpr BlockId none = -1;

  explicit BlockPool(int64_t num_blocks);
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // Appends n blocks with one reference each to `out`, dropping their hashes. False, and nothing changed, if fewer are
  // free.
  bool allocate(int64_t n, std::vector<BlockId>& out);
  void share(BlockId block);  // one more reference; takes a free (cached) block off the free list
  // One reference less for each. The last of the span is freed first, hence reused first: a prefix outlives its tail.
  void release(std::span<const BlockId> blocks);

  BlockId find(const Hash128& hash) const;           // none if no block carries the hash
  void publish(BlockId block, const Hash128& hash);  // no effect if the block has a hash or another carries this one
  void forget_hashes();

  int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()) - 1; }
  int64_t num_free() const { return num_free_; }
  int32_t references(BlockId block) const { return at(block).references; }
  bool published(BlockId block) const { return at(block).published; }
  const Hash128& hash(BlockId block) const { return at(block).hash; }

  // `references[b]`: how many tables hold block b. Throws InternalError.
  void check_invariants(std::span<const int32_t> references) const;

 private:
  friend struct RecordedState;

  struct Block {
    int32_t references = 0;
    BlockId prev = none, next = none;  // in the free list, while references is 0
    bool published = false;
    Hash128 hash;
  };

  const Block& at(BlockId block) const;
  void link_before(BlockId block, BlockId next);
  void unlink(BlockId block);
  size_t home(const Hash128& hash) const { return hash.lo & (index_.size() - 1); }  // keyed, hence uniform
  void put_hash(BlockId block, const Hash128& hash);
  void drop_hash(BlockId block);

  std::vector<Block> blocks_;   // the last one is the head of the circular free list
  std::vector<BlockId> index_;  // hash -> block: open addressing, at most half full
  int64_t num_free_;
};

}  // namespace hybrid
