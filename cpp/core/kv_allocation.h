// KVAllocation: a request's logical blocks, in order. Move-only; its destructor releases, so a request that leaves by
// any path cannot leak. Knows no tokens.
#pragma once

#include <span>
#include <utility>
#include <vector>

#include "core/block_pool.h"

namespace hybrid {

class KVAllocation {
 public:
  explicit KVAllocation(BlockPool& pool) : pool_(&pool) {}
  KVAllocation(KVAllocation&& other) noexcept : pool_(other.pool_), blocks_(std::exchange(other.blocks_, {})) {}
  KVAllocation& operator=(KVAllocation&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(blocks_, other.blocks_);
    return *this;
  }
  ~KVAllocation() { pool_->release(blocks_); }

  std::span<const BlockId> blocks() const { return blocks_; }
  int64_t size() const { return static_cast<int64_t>(blocks_.size()); }
  bool empty() const { return blocks_.empty(); }
  void reserve(int64_t n) { blocks_.reserve(static_cast<size_t>(n)); }

  bool extend(int64_t n) { return pool_->allocate(n, blocks_); }  // all or nothing
  void share(BlockId block) {
    pool_->share(block);
    blocks_.push_back(block);
  }
  // Puts a block whose reference it takes over in the place of block i, which it releases and returns.
  BlockId replace(int64_t i, BlockId block) {
    const BlockId old = std::exchange(blocks_[static_cast<size_t>(i)], block);
    pool_->release({&old, 1});
    return old;
  }
  void release() {
    pool_->release(blocks_);
    blocks_.clear();
  }

 private:
  friend struct RecordedState;

  BlockPool* pool_;
  std::vector<BlockId> blocks_;
};

}  // namespace hybrid
