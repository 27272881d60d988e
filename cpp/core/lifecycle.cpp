// The life of a request around the policy: how it comes, what a committed batch changes, how it goes.
#include <algorithm>

#include "common/check.h"
#include "core/scheduler.h"

namespace hybrid {

namespace {

Config validated(Config config) {
  config.validate();
  return config;
}

}  // namespace

Scheduler::Scheduler(Config config, std::span<std::byte* const> arenas)
    : config_(validated(config)),
      kv_(config_),
      max_running_(config_.max_num_seqs),
      decode_order_(config_.blocks_for(config_.min_shared_tokens)),
      writer_(config_, BatchLayout(config_), arenas),
      in_flight_(static_cast<size_t>(config_.depth)),
      outputs_(config_.num_clients, config_.max_num_seqs) {
  require(std::ssize(arenas) == config_.depth + 1, arenas.size(), " arenas, depth ", config_.depth, " needs ",
          config_.depth + 1);
  const auto seqs = static_cast<size_t>(config_.max_num_seqs);
  running_.reserve(seqs);
  plan_.reserve(seqs);
  copies_.reserve(seqs);
  emitted_.reserve(seqs);
  for (InFlight& batch : in_flight_) batch.rows.reserve(seqs);
}

void Scheduler::add(const RequestSpec& spec) {
  spec.validate(config_);
  for (int64_t i = 0; i < spec.n; ++i)
    require(!requests_.contains(spec.id + static_cast<RequestId>(i)), "request id ",
            spec.id + static_cast<RequestId>(i), " is in use");
  const Recorder::Call call(recorder_.get());
  std::vector<std::unique_ptr<Request>> choices;
  for (int64_t i = 0; i < spec.n; ++i)
    choices.push_back(std::make_unique<Request>(spec, i, next_arrival_ + i, config_, kv_.pool(), kv_.host_pool()));
  if (recorder_) record_add(spec, *choices[0]);
  queue(std::move(choices));
}

void Scheduler::queue(std::vector<std::unique_ptr<Request>> choices) {
  next_arrival_ += std::ssize(choices);
  Request& leader = *choices[0];
  for (size_t i = 1; i < choices.size(); ++i) {
    choices[i]->leader = &leader;
    leader.followers.push_back(choices[i].get());
  }
  for (auto& choice : choices) requests_.emplace(choice->id, std::move(choice));
  waiting_.push(leader);
}

void Scheduler::limit_running(int64_t max_running) {
  require(1 <= max_running && max_running <= config_.max_num_seqs, "max_running is ", max_running, ", must be in [1, ",
          config_.max_num_seqs, "]");
  const Recorder::Call call(recorder_.get());
  if (recorder_) recorder_->event(Event::limit, max_running);
  max_running_ = max_running;
}

int64_t Scheduler::abort(std::span<const RequestId> ids) {
  const Recorder::Call call(recorder_.get());
  if (recorder_) record_abort(ids);
  int64_t num_live = 0;
  for (const RequestId id : ids) {
    const auto found = requests_.find(id);
    if (found == requests_.end() || found->second->state == Request::State::finished) continue;
    ++num_live;
    finish(*found->second);
  }
  return num_live;
}

// An admitted request, with its prefix found.
void Scheduler::start(Request& request) {
  if (recorder_) record_admission(request);
  const bool waited = request.arrival < blocked_before_;
  note(StepEvent::admitted, request, request.num_computed, waited ? blocked_by_ : WaitedFor::nothing);
  if (request.num_preemptions == 0) {
    request.cached_tokens = request.num_computed;
    request.scheduled_at = now_;
    totals_.prefix_queries += std::ssize(request.tokens);
    totals_.prefix_hits += request.num_computed;
    // All that it will ever need, so that no later step allocates. Untouched pages cost nothing.
    request.tokens.reserve(static_cast<size_t>(request.length_limit));
    request.hashes.reserve(static_cast<size_t>(request.length_limit / config_.block_size));
  }
  request.just_admitted = true;
  leave_leader(request);
}

const Outputs& Scheduler::commit(int64_t step, std::span<const Token> tokens) {
  require(num_in_flight_ > 0, "step ", step, " is committed, but no batch is in flight");
  const int64_t oldest = next_step_ - num_in_flight_;
  require(step == oldest, "step ", step, " is committed, but the oldest in flight is ", oldest);
  const InFlight& batch = batch_of(step);
  require(std::ssize(tokens) == batch.num_sampled, "step ", step, " is committed with ", tokens.size(),
          " tokens, it has ", batch.num_sampled, " sampled rows");
  for (const Token token : tokens)
    require(0 <= token && token < config_.vocab_size, "token ", token, " of step ", step, " is not in [0, ",
            config_.vocab_size, ")");
  const Recorder::Call call(recorder_.get());
  if (recorder_) recorder_->begin_commit(step, batch.num_sampled);
  --num_in_flight_;
  emitted_.clear();
  for (const Row& row : batch.rows) settle(row, tokens);
  write_outputs(step);
  write_events(batch);
  return outputs_;
}

void Scheduler::settle(const Row& row, std::span<const Token> tokens) {
  Request& request = *row.request;
  const bool live = request.state != Request::State::finished;
  --request.in_flight;
  FinishReason reason = FinishReason::none;
  if (row.sampled_row >= 0) {
    --request.num_unknown;
    if (live) {
      const Token token = tokens[static_cast<size_t>(row.sampled_row)];
      const int64_t num_adjustments = request.adjustments.size();
      reason = request.append(token);
      if (recorder_) {
        const bool adds = num_adjustments > 0 && request.adjustments.size() > num_adjustments;
        recorder_->picked(row.sampled_row, reason == FinishReason::stop ? Picked::stops
                                           : adds                       ? Picked::adds
                                                                        : Picked::plain);
      }
      const auto cached = static_cast<int32_t>(std::exchange(request.cached_tokens, -1));
      emitted_.push_back({request.client, request.id, token, reason, cached, row.sampled_row,
                          static_cast<int32_t>(request.num_preemptions), std::exchange(request.scheduled_at, -1)});
    }
  }
  if (row.num_preemptions == request.num_preemptions) {
    kv_.publish(request, std::min(row.num_computed, std::ssize(request.tokens)));
    if (row.num_computed >= request.num_prompt) queue_followers(request);
  }
  if (reason != FinishReason::none) return finish(request);
  if (!live && request.in_flight == 0) remove(request);
}

// Takes it out of wherever it is. While a batch in flight still writes its blocks it keeps them.
void Scheduler::finish(Request& request) {
  if (request.state == Request::State::waiting) waiting_.remove(request);
  if (request.state == Request::State::running)
    running_.erase(std::ranges::lower_bound(running_, &request, ServedBefore{}));
  decode_order_.remove(request);
  request.move_to(Request::State::finished);
  leave_leader(request);
  queue_followers(request);
  if (request.in_flight == 0) remove(request);
}

void Scheduler::queue_followers(Request& leader) {
  for (Request* follower : leader.followers) {
    if (follower->state != Request::State::held) continue;
    follower->move_to(Request::State::waiting);
    waiting_.push(*follower);
  }
}

void Scheduler::leave_leader(Request& request) {
  if (Request* leader = std::exchange(request.leader, nullptr)) std::erase(leader->followers, &request);
}

void Scheduler::remove(Request& request) {
  for (Request* follower : request.followers) follower->leader = nullptr;
  requests_.erase(request.id);
}

void Scheduler::write_outputs(int64_t step) {
  outputs_.step = step;
  outputs_.num_rows = std::ssize(emitted_);
  auto& start = outputs_.client_start;
  std::ranges::fill(start, 0);
  for (const Emitted& row : emitted_) ++start[static_cast<size_t>(row.client) + 1];
  for (size_t client = 1; client < start.size(); ++client) start[client] += start[client - 1];
  // start[c] serves as client c's cursor, so it ends up as the start of c + 1: shifted back below.
  for (const Emitted& row : emitted_) {
    const auto i = static_cast<size_t>(start[static_cast<size_t>(row.client)]++);
    outputs_.ids[i] = row.id;
    outputs_.tokens[i] = row.token;
    outputs_.finish[i] = row.finish;
    outputs_.cached_tokens[i] = row.cached_tokens;
    outputs_.rows[i] = row.row;
    outputs_.num_preemptions[i] = row.num_preemptions;
    outputs_.scheduled_at[i] = row.scheduled_at;
  }
  std::shift_right(start.begin(), start.end(), 1);
  start.front() = 0;
}

void Scheduler::write_events(const InFlight& batch) {
  outputs_.num_tokens = batch.num_tokens;
  outputs_.num_seqs = std::ssize(batch.rows);
  outputs_.scheduled = batch.scheduled;
  outputs_.event_ids.clear();
  outputs_.event_values.clear();
  outputs_.event_kinds.clear();
  for (int64_t client = 0; client < config_.num_clients; ++client) {
    outputs_.event_start[static_cast<size_t>(client)] = static_cast<int32_t>(outputs_.event_ids.size());
    for (const EventRow& event : batch.events) {
      if (event.client != client) continue;
      outputs_.event_ids.push_back(event.id);
      outputs_.event_values.push_back(static_cast<int32_t>(event.value));
      outputs_.event_kinds.push_back(event.kind);
    }
  }
  outputs_.event_start.back() = static_cast<int32_t>(outputs_.event_ids.size());
}

std::vector<RequestId> Scheduler::ids_in_flight() const {
  std::vector<RequestId> ids;
  for (int64_t step = next_step_ - num_in_flight_; step < next_step_; ++step)
    for (const Row& row : in_flight_[static_cast<size_t>(step % config_.depth)].rows) ids.push_back(row.request->id);
  std::ranges::sort(ids);
  ids.erase(std::ranges::unique(ids).begin(), ids.end());
  return ids;
}

Stats Scheduler::stats() const {
  Stats stats = totals_;
  stats.num_running = std::ssize(running_);
  stats.num_waiting = waiting_.size();
  for (const auto& [id, request] : requests_) {
    const bool held = request->state == Request::State::held, waiting = request->state == Request::State::waiting;
    stats.num_waiting += held;
    stats.num_swapped += waiting && !request->host.empty();
    if ((held || waiting) && (stats.waiting_since < 0 || request->waits_since < stats.waiting_since))
      stats.waiting_since = request->waits_since;
    // Blocks that several share are full: a request copies one before it writes to it.
    if (!request->kv.empty()) stats.empty_slots += request->kv.size() * config_.block_size - request->num_computed;
  }
  stats.host_blocks_total = kv_.host_pool().num_blocks();
  stats.host_blocks_used = stats.host_blocks_total - kv_.host_pool().num_free();
  stats.blocks_total = kv_.pool().num_blocks();
  stats.blocks_used = stats.blocks_total - kv_.pool().num_free();
  return stats;
}

bool Scheduler::forget_prefixes() {
  const Recorder::Call call(recorder_.get());
  if (recorder_) recorder_->event(Event::forget);
  kv_.forget_hashes();
  for (const auto& [id, request] : requests_) {
    if (!request->kv.empty()) request->may_publish = false;
    request->may_publish_host = false;
  }
  return kv_.pool().num_free() == kv_.pool().num_blocks();
}

}  // namespace hybrid
