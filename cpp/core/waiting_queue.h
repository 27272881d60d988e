// WaitingQueue: who waits, by (priority, arrival); never by id. Owns nothing.
#pragma once

#include <set>
#include <utility>

#include "common/check.h"
#include "core/request.h"

namespace hybrid {

// The order in which requests are served; running ones are preempted from its end.
struct ServedBefore {
  bool operator()(const Request* a, const Request* b) const {
    return std::pair(a->priority, a->arrival) < std::pair(b->priority, b->arrival);
  }
};

class WaitingQueue {
 public:
  bool empty() const { return queue_.empty(); }
  int64_t size() const { return static_cast<int64_t>(queue_.size()); }
  Request& head() const { return **queue_.begin(); }
  auto begin() const { return queue_.begin(); }
  auto end() const { return queue_.end(); }

  void push(Request& request) { invariant(queue_.insert(&request).second, "a request waits twice"); }
  void remove(Request& request) { invariant(queue_.erase(&request) == 1, "a request does not wait"); }

 private:
  std::set<Request*, ServedBefore> queue_;
};

}  // namespace hybrid
