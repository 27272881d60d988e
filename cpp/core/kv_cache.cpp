#include "core/kv_cache.h"

#include <algorithm>

#include "common/check.h"

namespace hybrid {

KVCacheManager::KVCacheManager(const Config& config)
    : config_(config), pool_(config.num_blocks), host_pool_(config.num_host_blocks) {
  found_.reserve(static_cast<size_t>(config.max_blocks_per_seq()));
  fresh_.reserve(1);
}

Hash128 KVCacheManager::chained_hash(const Request& request, int64_t i, const Hash128& parent) const {
  const auto block_size = static_cast<size_t>(config_.block_size);
  const auto tokens = std::span(request.tokens).subspan(static_cast<size_t>(i) * block_size, block_size);
  SipHash128 hash(config_.hash_key);
  hash.word(parent.lo);
  hash.word(parent.hi);
  return hash.finish({reinterpret_cast<const uint8_t*>(tokens.data()), tokens.size_bytes()});
}

const Hash128& KVCacheManager::hash(Request& request, int64_t i) const {
  auto& hashes = request.hashes;
  while (std::ssize(hashes) <= i) {
    const auto block = std::ssize(hashes);
    hashes.push_back(chained_hash(request, block, hashes.empty() ? request.root_hash : hashes.back()));
    if (recorder_) recorder_->event(Event::hash, request.id, block, hashes.back().lo);
  }
  return hashes[static_cast<size_t>(i)];
}

bool KVCacheManager::may_fork(const Request& request) const {
  const Request* leader = request.leader;
  // A partly filled block of the leader's is copied before the batch computes anything.
  return leader && !leader->just_admitted && leader->num_computed >= leader->num_prompt &&
         request.num_tokens() == request.num_prompt;
}

void KVCacheManager::find_prefix(Request& request) {
  found_.clear();
  if (!config_.enable_prefix_caching) return;
  const int64_t most = (static_cast<int64_t>(request.tokens.size()) - 1) / config_.block_size;
  for (int64_t i = 0; i < most; ++i) {
    const BlockId block = pool_.find(hash(request, i));
    if (block == BlockPool::none) return;
    found_.push_back(block);
  }
}

bool KVCacheManager::admit(Request& request, int64_t headroom, CopyList& swap_ins) {
  invariant(request.kv.empty() && request.num_computed == 0, "a request is admitted twice");
  const bool fork = may_fork(request);
  int64_t num_computed;
  if (fork) {
    // The last prompt token is computed again: its logits, not the first choice's pick, decide what comes next.
    num_computed = request.num_prompt - 1;
    const auto shared = request.leader->kv.blocks().first(static_cast<size_t>(config_.blocks_for(num_computed)));
    found_.assign(shared.begin(), shared.end());
  } else {
    find_prefix(request);
    num_computed = static_cast<int64_t>(found_.size()) * config_.block_size;
  }
  // Shared blocks that nobody references leave the free list; a partly filled one is copied.
  const int64_t revived = std::ranges::count_if(found_, [&](BlockId block) { return pool_.references(block) == 0; });
  const int64_t whole = num_computed / config_.block_size;
  const int64_t needed = config_.blocks_for(request.num_tokens()) - whole + revived;
  if (needed + headroom > pool_.num_free()) return false;
  request.kv.reserve(config_.blocks_for(request.length_limit));
  for (const BlockId block : found_) request.kv.share(block);
  request.num_computed = num_computed;
  request.num_published = whole;
  swap_in(request, swap_ins);
  return true;
}

void KVCacheManager::swap_out(Request& request, CopyList& swap_outs) {
  const auto blocks = request.kv.blocks().first(static_cast<size_t>(config_.blocks_for(request.num_computed)));
  const auto kept = [&](BlockId block) { return pool_.published(block) && pool_.references(block) > 1; };
  const int64_t first = std::ranges::find_if_not(blocks, kept) - blocks.begin(),
                num_blocks = std::ssize(blocks) - first;
  if (num_blocks * config_.swap_cost >= request.num_computed - first * config_.block_size) return;
  if (!request.host.extend(num_blocks)) return;
  for (int64_t i = 0; i < num_blocks; ++i) swap_outs.emplace_back(blocks[first + i], request.host.blocks()[i]);
  request.first_on_host = first;
  request.num_on_host = request.num_computed;
  request.may_publish_host = request.may_publish;
}

// Behind the prefix that was found; not if there is a gap between them, where what is kept on the host has no use.
void KVCacheManager::swap_in(Request& request, CopyList& swap_ins) {
  const int64_t found = request.kv.size(), first = request.first_on_host;
  if (found >= first && request.num_computed < request.num_on_host) {
    const auto kept = request.host.blocks();
    const int64_t end = first + std::ssize(kept);
    invariant(request.kv.extend(end - found), "no blocks to swap into");
    for (int64_t i = found; i < end; ++i) swap_ins.emplace_back(kept[i - first], request.kv.blocks()[i]);
    request.num_computed = request.num_on_host;
    request.may_publish = request.may_publish_host;
  }
  request.host.release();
  request.num_on_host = 0;
}

bool KVCacheManager::grow(Request& request, int64_t num_new, CopyList& copies) {
  const int64_t missing = config_.blocks_for(request.num_computed + num_new) - request.kv.size();
  const int64_t first = request.num_computed / config_.block_size;  // block that is written
  const bool copy = first < request.kv.size() && pool_.references(request.kv.blocks()[first]) > 1;
  if (missing <= 0 && !copy) return true;
  if (std::max<int64_t>(missing, 0) + copy > pool_.num_free()) return false;
  if (copy) {
    fresh_.clear();
    invariant(pool_.allocate(1, fresh_), "no block to copy to");
    copies.emplace_back(request.kv.replace(first, fresh_[0]), fresh_[0]);
  }
  if (missing > 0) invariant(request.kv.extend(missing), "free blocks disappeared");
  return true;
}

void KVCacheManager::publish(Request& request, int64_t num_computed) {
  if (!config_.enable_prefix_caching || !request.may_publish) return;
  for (; request.num_published < num_computed / config_.block_size; ++request.num_published)
    pool_.publish(request.kv.blocks()[request.num_published], hash(request, request.num_published));
}

void KVCacheManager::release(Request& request) {
  request.kv.release();
  request.num_computed = request.num_published = 0;
  request.may_publish = true;
}

}  // namespace hybrid
