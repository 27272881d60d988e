// KVCacheManager: tokens to blocks. Knows which blocks a request needs, shares and publishes; not who may run.
#pragma once

#include <utility>
#include <vector>

#include "core/block_pool.h"
#include "core/config.h"
#include "core/recorder.h"
#include "core/request.h"

namespace hybrid {

// (source, destination) of the copies that a batch makes before it writes any KV, within the device or to or from the
// host.
using CopyList = std::vector<std::pair<BlockId, BlockId>>;

class KVCacheManager {
 public:
  explicit KVCacheManager(const Config& config);

  // Lets a request without blocks begin with what is there already: all the prompt's blocks of its leader, if they are
  // computed, else its longest published prefix, at most all tokens but the last, and behind that what the host keeps
  // of it. Sets num_computed. False, and nothing changed, unless the rest of its tokens would fit too and leave
  // `headroom` free blocks.
  bool admit(Request& request, int64_t headroom, CopyList& swap_ins);
  // Room for the next `num_new` tokens; a block among those written that others share is copied first. False: nothing
  // changed.
  bool grow(Request& request, int64_t num_new, CopyList& copies);
  // Publishes the blocks that the first `num_computed` tokens fill.
  void publish(Request& request, int64_t num_computed);
  // Keeps on the host what a request has computed, if that costs less than to compute it again and there is room; else
  // nothing. Its published blocks at the beginning that others hold, too, stay behind: they will be found. `release`
  // comes next.
  void swap_out(Request& request, CopyList& swap_outs);
  void release(Request& request);
  void forget_hashes() { pool_.forget_hashes(); }
  void record(Recorder* recorder) { recorder_ = recorder; }

  BlockPool& pool() { return pool_; }
  const BlockPool& pool() const { return pool_; }
  BlockPool& host_pool() { return host_pool_; }
  const BlockPool& host_pool() const { return host_pool_; }
  // The hash of full block i of the request's tokens, given the hash of the block before it (or the root).
  Hash128 chained_hash(const Request& request, int64_t i, const Hash128& parent) const;

 private:
  const Hash128& hash(Request& request, int64_t i) const;  // computed once
  bool may_fork(const Request& request) const;
  void find_prefix(Request& request);
  void swap_in(Request& request, CopyList& swap_ins);

  const Config config_;
  BlockPool pool_, host_pool_;
  std::vector<BlockId> found_;  // by find_prefix
  std::vector<BlockId> fresh_;
  Recorder* recorder_ = nullptr;
};

}  // namespace hybrid
