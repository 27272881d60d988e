// What must hold between any two calls of a scheduler (numbers as in the list of invariants).
#include <algorithm>
#include <vector>

#include "common/check.h"
#include "core/scheduler.h"

namespace hybrid {

void Scheduler::check_invariants() const {
  check_requests();
  check_blocks();
}

void Scheduler::check_requests() const {
  using State = Request::State;
  invariant(std::ssize(running_) <= config_.max_num_seqs, "S2: too many requests run");
  invariant(std::ranges::is_sorted(running_, ServedBefore{}), "S5: running requests are out of order");
  int64_t num_waiting = 0, num_running = 0, num_rows = 0, num_in_flight = 0, num_ordered = 0;
  for (const auto& [id, request] : requests_) {
    invariant(request->id == id, "S4: a request is stored under another id");
    num_waiting += request->state == State::waiting;
    num_running += request->state == State::running;
    num_in_flight += request->in_flight;
    num_ordered += request->is_ordered;
    invariant(!request->is_ordered || request->state == State::running, "S4: ordered, but not running");
    check_request(*request);
  }
  invariant(num_waiting == waiting_.size() && num_running == std::ssize(running_), "S4: a request is lost or doubled");
  invariant(num_ordered == decode_order_.size(), "S4: a decode is lost or doubled");
  for (const Request* request : waiting_) invariant(request->state == State::waiting, "S4: in the wrong queue");
  for (const Request* request : running_) invariant(request->state == State::running, "S4: in the wrong queue");
  for (int64_t step = next_step_ - num_in_flight_; step < next_step_; ++step)
    num_rows += std::ssize(in_flight_[static_cast<size_t>(step % config_.depth)].rows);
  invariant(num_rows == num_in_flight, "S8: rows in flight without their request");
}

void Scheduler::check_request(const Request& request) const {
  using State = Request::State;
  const auto length = std::ssize(request.tokens);
  invariant(request.num_computed <= request.num_tokens(), "S3: more tokens computed than there are");
  invariant(request.num_prompt <= length && request.num_tokens() <= request.length_limit,
            "S7: tokens are lost or too many");
  invariant(0 <= request.num_unknown && request.num_unknown <= request.in_flight, "S3: unknown tokens of no batch");
  invariant(request.in_flight <= num_in_flight_, "S3: in more batches than there are");
  invariant(request.kv.size() >= config_.blocks_for(request.num_computed), "I3: tokens without a block");
  switch (request.state) {
    case State::held:
      invariant(request.leader && request.leader->state != State::finished, "S6: nobody will wake a held choice");
      [[fallthrough]];
    case State::waiting:
      invariant(request.kv.empty() && request.num_computed == 0, "S8: blocks without running");
      invariant(request.host.empty()
                    ? request.num_on_host == 0
                    : request.host.size() == config_.blocks_for(request.num_on_host) - request.first_on_host,
                "I3: tokens on the host without a block");
      break;
    case State::running:
      invariant(!request.leader && length < request.length_limit, "S3: runs past its end");
      invariant(request.host.empty(), "S8: runs, and still has blocks on the host");
      break;
    case State::finished:
      invariant(request.in_flight > 0, "S8: finished, but still here");
      break;
  }
  for (const Request* follower : request.followers)
    invariant(follower->leader == &request, "S4: a choice left its leader");
}

void Scheduler::check_blocks() const {
  std::vector<int32_t> references(static_cast<size_t>(config_.num_blocks)),
      on_host(static_cast<size_t>(config_.num_host_blocks));
  for (const auto& [id, request] : requests_) {
    for (const BlockId block : request->kv.blocks()) ++references[static_cast<size_t>(block)];
    for (const BlockId block : request->host.blocks()) ++on_host[static_cast<size_t>(block)];
  }
  kv_.pool().check_invariants(references);
  kv_.host_pool().check_invariants(on_host);
  const auto block_size = static_cast<size_t>(config_.block_size);
  for (const auto& [id, request] : requests_) {
    const auto blocks = request->kv.blocks();
    for (size_t i = static_cast<size_t>(request->num_computed / config_.block_size); i < blocks.size(); ++i)
      invariant(references[static_cast<size_t>(blocks[i])] == 1, "I7: a block that will be written is shared");
    Hash128 hash = request->root_hash;  // computed anew: not what the request remembers
    for (size_t i = 0; i < blocks.size() && (i + 1) * block_size <= request->tokens.size(); ++i) {
      hash = kv_.chained_hash(*request, static_cast<int64_t>(i), hash);
      if (kv_.pool().published(blocks[i]))
        invariant(kv_.pool().hash(blocks[i]) == hash, "I5: a hash differs from its tokens'");
    }
    for (size_t i = request->tokens.size() / block_size; i < blocks.size(); ++i)
      invariant(!kv_.pool().published(blocks[i]), "I5: a published block is not full");
  }
}

}  // namespace hybrid
