// DecodeOrder: the running decodes in an order that makes neighbours of those that begin with the same blocks, and the
// groups of those that a batch holds. Kept from batch to batch: what two decodes begin with does not change while they
// run, as each writes to blocks of its own, hence only who comes and who goes costs anything. Knows requests' blocks;
// neither queues nor tokens.
#pragma once

#include <span>
#include <vector>

#include "core/prefix_groups.h"
#include "core/request.h"

namespace hybrid {

class DecodeOrder {
 public:
  // `min_blocks`: see group_prefixes.
  explicit DecodeOrder(int64_t min_blocks) : min_blocks_(min_blocks) {}

  // A decode that has room for its next token. No effect if it is there already.
  void add(Request& request);
  // Before its blocks go. No effect if it is not there.
  void remove(Request& request);

  // The decodes of step `step`, as many as it has, of which `planned_for` says that they are in it; and their groups.
  std::span<Request* const> decodes_of(int64_t step, int64_t num_decodes);
  const std::vector<PrefixGroup>& groups() const { return groups_; }

  int64_t size() const { return static_cast<int64_t>(places_.size()); }

 private:
  struct Place {
    Request* request;
    int64_t common;  // blocks that it begins with like the one before it; 0 for the first
  };

  const int64_t min_blocks_;
  std::vector<Place> places_;
  std::vector<Request*> decodes_;
  std::vector<int64_t> common_, last_common_;  // of decodes_; of those that groups_ were made of
  std::vector<PrefixGroup> groups_;
  bool has_all_ = false;  // decodes_ are those of all places
};

}  // namespace hybrid
