// Scheduler: which request computes which tokens next. The policy, and the only class that other languages hold.
// Knows no clock, thread, socket, device or Python: a sequence of calls always gives the same batches. One caller at a
// time.
//
// There are no phases: a request has num_computed and num_tokens, and every step lets the first catch up with the
// second.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "core/batch.h"
#include "core/config.h"
#include "core/decode_order.h"
#include "core/kv_cache.h"
#include "core/outputs.h"
#include "core/recorder.h"
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
  // `now`, of RequestSpec's clock, is what Outputs::scheduled_at says of the requests that run for the first time.
  const Batch* schedule(int64_t now = 0);
  // The tokens picked in the oldest batch in flight, one per sampled row.
  const Outputs& commit(int64_t step, std::span<const Token> tokens);

  // At most so many run from the next batch on, within [1, config().max_num_seqs]; what is too many waits, as if
  // preempted. Throws std::invalid_argument for any other number.
  void limit_running(int64_t max_running);

  // Requests with a row in a batch in flight, each once, in no order: what a device that fails was working on.
  std::vector<RequestId> ids_in_flight() const;

  bool idle() const { return requests_.empty() && num_in_flight_ == 0; }
  // Requests that wait or run, and those that have ended while a batch in flight still has a row of theirs.
  int64_t num_open() const { return std::ssize(requests_); }
  Stats stats() const;
  // No KV computed before this call is found by a later request. True if no block is in use.
  bool forget_prefixes();
  // From now on `memory`, which outlives the scheduler, has the last `num_steps` steps, see Recorder.
  void record(std::span<int64_t> memory, int64_t num_steps);
  void check_invariants() const;  // throws InternalError; costs O(blocks + requests)
  const Config& config() const { return config_; }

 private:
  friend struct SchedulerTest;  // plants faults
  friend struct RecordedState;
  friend class Replay;

  struct Planned {
    Request* request;
    int64_t num_new;
    bool is_decode;
  };
  struct Row {
    Request* request;
    int64_t num_new;
    int64_t num_computed;     // once the batch is done
    int64_t num_preemptions;  // when it was scheduled: tells whether the blocks are still those it wrote
    int32_t sampled_row;      // -1: none
  };
  struct EventRow {
    int32_t client;
    RequestId id;
    int64_t value;
    uint8_t kind;  // see Outputs
  };
  struct InFlight {
    int64_t num_tokens = 0, num_sampled = 0, scheduled = 0;
    std::vector<Row> rows;
    std::vector<EventRow> events;
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
  int64_t admit_before(const Request& request, int64_t tokens_left);
  void admit_waiting();
  std::optional<WaitedFor> admit_head(int64_t most);
  void block(WaitedFor what);
  void note(StepEvent event, const Request& request, int64_t value, WaitedFor waited_for = WaitedFor::nothing);
  void plan(Request& request, int64_t num_new, bool is_decode);
  int64_t num_planned_blocks() const;
  const Batch* write_batch();
  bool may_begin_alike();
  void order_decodes();

  // lifecycle.cpp: how a request comes and goes
  void queue(std::vector<std::unique_ptr<Request>> choices);
  void start(Request& request);
  void settle(const Row& row, std::span<const Token> tokens);
  void finish(Request& request);
  void queue_followers(Request& leader);
  void leave_leader(Request& request);
  void remove(Request& request);
  void write_outputs(int64_t step);
  void write_events(const InFlight& batch);
  InFlight& batch_of(int64_t step) { return in_flight_[static_cast<size_t>(step % config_.depth)]; }

  // recording.cpp
  void record_state();
  void record_add(const RequestSpec& spec, const Request& first);
  void record_abort(std::span<const RequestId> ids);
  void record_admission(const Request& request);
  void record_step(const Batch& batch);

  // invariants.cpp
  void check_requests() const;
  void check_request(const Request& request) const;
  void check_blocks() const;

  Config config_;
  KVCacheManager kv_;  // outlives the requests, whose allocations it backs
  std::unordered_map<RequestId, std::unique_ptr<Request>> requests_;
  WaitingQueue waiting_;
  std::vector<Request*> running_;  // by ServedBefore
  int64_t next_arrival_ = 0;
  int64_t max_running_;

  // of the batch being planned
  std::vector<Planned> plan_;
  DecodeOrder decode_order_;
  CopyList copies_, swap_outs_, swap_ins_;
  int64_t tokens_left_ = 0, adjustments_left_ = 0;
  bool short_of_blocks_ = false;
  int64_t now_ = 0;
  std::vector<EventRow> events_;  // since the last batch
  // Why the last time somebody was left waiting; those who came before `blocked_before_` were there.
  WaitedFor blocked_by_ = WaitedFor::nothing;
  int64_t blocked_before_ = 0;

  BatchWriter writer_;
  std::vector<InFlight> in_flight_;  // of step s: entry s % depth
  int64_t next_step_ = 0, num_in_flight_ = 0;
  std::vector<Emitted> emitted_;
  Outputs outputs_;
  Stats totals_;
  std::unique_ptr<Recorder> recorder_;  // null: nothing is recorded
};

}  // namespace hybrid
