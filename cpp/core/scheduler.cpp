#include "core/scheduler.h"

#include <algorithm>

#include "common/check.h"

namespace hybrid {

const Batch* Scheduler::schedule(int64_t now) {
  if (num_in_flight_ == config_.depth) return nullptr;
  const Recorder::Call call(recorder_.get());
  if (recorder_) {
    if (recorder_->is_due()) record_state();
    recorder_->event(Event::schedule, now);
  }
  now_ = now;
  plan_.clear();
  copies_.clear();
  swap_outs_.clear();
  swap_ins_.clear();
  tokens_left_ = config_.max_num_batched_tokens;
  adjustments_left_ = config_.max_adjustments;
  short_of_blocks_ = false;
  // Nothing of them goes to the host: there may be no batch now that would take it there.
  while (std::ssize(running_) > max_running_) preempt(*running_.back());
  continue_running();
  if (short_of_blocks_)
    block(WaitedFor::blocks);
  else
    admit_waiting();
  invariant(!plan_.empty() || num_in_flight_ > 0 || idle(), "S6: nothing is in flight and nothing can run");
  return plan_.empty() ? nullptr : write_batch();
}

// Every running request that lacks one token gets it; the others, and those that wait and come before them, share what
// is left of the budget, in order.
void Scheduler::continue_running() {
  const auto decodes = std::ranges::count_if(running_, [](const Request* r) { return r->num_missing() == 1; });
  int64_t prefill_left = tokens_left_ - decodes;
  for (size_t i = 0; i < running_.size(); ++i) {  // shrinks from its end while we preempt
    Request& request = *running_[i];
    const int64_t missing = request.num_missing();
    if (missing > 1) {
      const size_t num_running = running_.size();
      prefill_left = admit_before(request, prefill_left);
      i += running_.size() - num_running;
    }
    const int64_t num_new = missing == 1 ? 1 : std::min(missing, prefill_left);
    if (num_new == 0 || !request.ready()) continue;
    if (num_new == missing && request.adjustments.size() > adjustments_left_) continue;
    if (!make_room(request, num_new)) break;
    if (missing > 1) prefill_left -= num_new;
    plan(request, num_new, request.is_decode(num_new));
  }
}

// A request that cannot grow preempts the last one running. The last one itself waits for blocks to come free.
bool Scheduler::make_room(Request& request, int64_t num_new) {
  while (!kv_.grow(request, num_new, copies_)) {
    short_of_blocks_ = true;
    if (running_.back() == &request) return false;
    kv_.swap_out(*running_.back(), swap_outs_);
    preempt(*running_.back());
  }
  return true;
}

// It keeps its tokens and computes them again later, except those whose blocks are still in the cache by then, or on
// the host. A batch in flight may still write its blocks: batches run in order, so whoever gets them next writes after
// that, and what goes to the host is read after that and before the batch that is being planned writes.
void Scheduler::preempt(Request& request) {
  if (recorder_) recorder_->event(Event::preempt, request.id);
  note(StepEvent::preempted, request, request.num_computed);
  decode_order_.remove(request);
  kv_.release(request);
  running_.pop_back();
  request.move_to(Request::State::waiting);
  request.waits_since = now_;
  waiting_.push(request);
  ++request.num_preemptions;
  ++totals_.num_preemptions;
}

// Those that wait and are served before a running request do not wait for the end of its prompt. What is kept on the
// host does: it must not be taken back in a step that may put others there. Returns the tokens that are left.
int64_t Scheduler::admit_before(const Request& request, int64_t tokens_left) {
  while (tokens_left > 0 && !waiting_.empty() && ServedBefore{}(&waiting_.head(), &request)) {
    const Request& head = waiting_.head();
    const bool may_run = !short_of_blocks_ && std::ssize(running_) < max_running_;
    const int64_t before = tokens_left_;
    if (!may_run || !head.ready() || head.num_on_host > 0 || admit_head(tokens_left)) break;
    tokens_left -= before - tokens_left_;
  }
  return tokens_left;
}

// In order; a head that does not fit stops everyone behind it, so that nobody starves. Each running request could still
// take a block afterwards, lest the newcomer is preempted at once.
void Scheduler::admit_waiting() {
  while (!waiting_.empty() && tokens_left_ > 0 && std::ssize(running_) < max_running_) {
    if (!waiting_.head().ready()) return;
    if (const auto reason = admit_head(tokens_left_)) return block(*reason);
  }
  block(tokens_left_ > 0 ? WaitedFor::sequences : WaitedFor::tokens);
}

// What the head waits for; nothing: it runs now, and computes at most so many tokens in this step.
std::optional<WaitedFor> Scheduler::admit_head(int64_t most) {
  Request& head = waiting_.head();
  if (head.adjustments.size() > adjustments_left_) return WaitedFor::adjustments;
  if (!kv_.admit(head, std::ssize(running_), swap_ins_)) return WaitedFor::blocks;
  waiting_.remove(head);
  head.move_to(Request::State::running);
  running_.insert(std::ranges::upper_bound(running_, &head, ServedBefore{}), &head);
  start(head);
  const int64_t num_new = std::min(head.num_missing(), most);
  invariant(kv_.grow(head, num_new, copies_), "an admitted request does not fit");
  // Not even with one token missing: what it shares, this very step may fill.
  plan(head, num_new, false);
  return std::nullopt;
}

void Scheduler::block(WaitedFor what) {
  if (waiting_.empty()) return;
  blocked_by_ = what;
  blocked_before_ = next_arrival_;
}

void Scheduler::note(StepEvent event, const Request& request, int64_t value, WaitedFor waited_for) {
  const auto kind = static_cast<uint8_t>(static_cast<int>(event) | static_cast<int>(waited_for) << 4);
  events_.push_back({request.client, request.id, value, kind});
}

void Scheduler::plan(Request& request, int64_t num_new, bool is_decode) {
  if (!is_decode) note(StepEvent::chunk, request, num_new);
  tokens_left_ -= num_new;
  if (num_new == request.num_missing()) adjustments_left_ -= request.adjustments.size();
  plan_.push_back({&request, num_new, is_decode});
  // Already now, so that requests that come together share what the first of them computes: a step stores all of its
  // keys and values before it reads any, and steps run in order.
  kv_.publish(request, std::min(request.num_computed + num_new, std::ssize(request.tokens)));
}

// Whether any two decodes may: looked at before they are sorted, which costs a step without common beginnings more than
// all the rest of its planning.
bool Scheduler::may_begin_alike() {
  return std::ranges::count_if(plan_, [&](const Planned& planned) {
           return planned.is_decode && kv_.pool().references(planned.request->kv.blocks().front()) > 1;
         }) > 1;
}

// Brings decodes that begin alike together.
void Scheduler::order_decodes() {
  int64_t num_decodes = 0;
  for (const auto& [request, num_new, is_decode] : plan_) {
    if (!is_decode) continue;
    ++num_decodes;
    decode_order_.add(*request);
    request->planned_for = next_step_;
  }
  const auto ordered = decode_order_.decodes_of(next_step_, num_decodes);
  auto next = ordered.begin();
  for (Planned& planned : plan_)
    if (planned.is_decode) planned.request = *next++;
  invariant(next == ordered.end(), "a decode is planned twice, or not ordered");
}

int64_t Scheduler::num_planned_blocks() const {
  int64_t num_blocks = 0;
  for (const Planned& planned : plan_)
    num_blocks += config_.blocks_for(planned.request->num_computed + planned.num_new);
  return num_blocks;
}

const Batch* Scheduler::write_batch() {
  const bool shares = config_.min_shared_tokens > 0 && may_begin_alike();
  if (shares) order_decodes();
  InFlight& in_flight = batch_of(next_step_);
  in_flight.rows.clear();
  writer_.begin(next_step_, adjustments_left_ < config_.max_adjustments ? num_planned_blocks() : 0);
  for (const bool decodes : {true, false}) {
    for (const auto& [request, num_new, is_decode] : plan_) {
      if (is_decode != decodes) continue;
      const int32_t sampled_row = writer_.add(*request, num_new, is_decode);
      request->num_computed += num_new;
      ++request->in_flight;
      request->just_admitted = false;
      if (sampled_row >= 0) {
        request->sampled_row = sampled_row;
        ++request->num_unknown;
      }
      in_flight.rows.push_back({request, num_new, request->num_computed, request->num_preemptions, sampled_row});
    }
  }
  if (shares)
    for (const PrefixGroup& group : decode_order_.groups())
      writer_.add_prefix(group.decodes, group.blocks * config_.block_size);
  const Batch& batch = writer_.finish(copies_, swap_outs_, swap_ins_);
  totals_.blocks_swapped_out += batch.num_swap_outs;
  totals_.blocks_swapped_in += batch.num_swap_ins;
  in_flight.num_tokens = batch.num_tokens;
  in_flight.num_sampled = batch.num_sampled;
  in_flight.scheduled = now_;
  in_flight.events.swap(events_);
  events_.clear();
  if (recorder_) record_step(batch);
  ++next_step_;
  ++num_in_flight_;
  ++totals_.steps;
  totals_.step_tokens += batch.num_tokens;
  const auto bucket = std::ranges::lower_bound(kStepTokenBounds, batch.num_tokens) - kStepTokenBounds.begin();
  ++totals_.step_token_counts[static_cast<size_t>(bucket)];
  return &batch;
}

}  // namespace hybrid
