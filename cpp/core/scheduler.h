// Scheduler: which request computes which tokens next. The policy, and the only class that other languages hold.
// Knows no clock, thread, socket, device or Python: a sequence of calls always gives the same batches. One caller at a
// time.
//
// There are no phases: a request has num_computed and num_tokens, and every step lets the first catch up with the
// second.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "core/batch.h"
#include "core/config.h"
#include "core/kv_cache.h"
#include "core/outputs.h"
#include "core/request.h"
#include "core/stats.h"
#include "core/waiting_queue.h"

namespace hybrid {

class Scheduler {
 public:
  // `arenas`: depth + 1 ranges of BatchLayout(config).bytes() that outlive the scheduler.
  Scheduler(Config config, std::span<std::byte* const> arenas);

  // Queues the n choices of a request; throws std::invalid_argument, and queues none, for what can never run.
  void add(const RequestSpec& spec);
  // They give no further output. Unknown ids are ignored; returns how many were live.
  int64_t abort(std::span<const RequestId> ids);
  // The next batch, valid until `depth` more were made; null if depth batches are in flight or none can be made before
  // the next commit. Never null while something waits or runs and nothing is in flight.
  // `now`, of any clock, is what Outputs::scheduled_at says of the requests that run for the first time.
  const Batch* schedule(int64_t now = 0);
  // The tokens picked in the oldest batch in flight, one per sampled row.
  const Outputs& commit(int64_t step, std::span<const Token> tokens);

  // Requests with a row in a batch in flight, each once, in no order: what a device that fails was working on.
  std::vector<RequestId> ids_in_flight() const;

  bool idle() const { return requests_.empty() && num_in_flight_ == 0; }
  Stats stats() const;
  // No KV computed before this call is found by a later request. True if no block is in use.
  bool forget_prefixes();
  void check_invariants() const;  // throws InternalError; costs O(blocks + requests)
  const Config& config() const { return config_; }

 private:
  friend struct SchedulerTest;  // plants faults

  struct Planned {
    Request* request;
    int64_t num_new;
    bool is_decode;
  };
  struct Row {
    Request* request;
    int64_t num_computed;     // once the batch is done
    int64_t num_preemptions;  // when it was scheduled: tells whether the blocks are still those it wrote
    int32_t sampled_row;      // -1: none
  };
  struct InFlight {
    int64_t num_sampled = 0;
    std::vector<Row> rows;
  };
  struct Emitted {
    int32_t client;
    RequestId id;
    Token token;
    FinishReason finish;
    int32_t cached_tokens, row, num_preemptions;
    int64_t scheduled_at;
  };

  // scheduler.cpp: the policy
  void continue_running();
  bool make_room(Request& request, int64_t num_new);
  void preempt(Request& request);
  void admit_waiting();
  void plan(Request& request, int64_t num_new, bool is_decode);
  const Batch* write_batch();
  void order_plan();
  void write_prefixes();

  // lifecycle.cpp: how a request comes and goes
  void start(Request& request);
  void settle(const Row& row, std::span<const Token> tokens);
  void finish(Request& request);
  void queue_followers(Request& leader);
  void leave_leader(Request& request);
  void remove(Request& request);
  void write_outputs(int64_t step);
  InFlight& batch_of(int64_t step) { return in_flight_[static_cast<size_t>(step % config_.depth)]; }

  // invariants.cpp
  void check_request(const Request& request) const;
  void check_blocks() const;

  Config config_;
  KVCacheManager kv_;  // outlives the requests, whose allocations it backs
  std::unordered_map<RequestId, std::unique_ptr<Request>> requests_;
  WaitingQueue waiting_;
  std::vector<Request*> running_;  // by ServedBefore
  int64_t next_arrival_ = 0;

  // of the batch being planned
  std::vector<Planned> plan_;
  CopyList copies_;
  int64_t tokens_left_ = 0, adjustments_left_ = 0;
  bool short_of_blocks_ = false;
  int64_t now_ = 0;

  BatchWriter writer_;
  std::vector<InFlight> in_flight_;  // of step s: entry s % depth
  int64_t next_step_ = 0, num_in_flight_ = 0;
  std::vector<Emitted> emitted_;
  Outputs outputs_;
  Stats totals_;
};

}  // namespace hybrid
