#include "core/recorded_state.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "core/scheduler.h"

namespace hybrid {

namespace {

template <class Words>
void visit(Words& words, RecordedRequest& request) {
  words(request.id);
  words(request.client);
  words(request.priority);
  words(request.arrival);
  words(request.num_prompt);
  words(request.num_known);
  words(request.length_limit);
  words(request.min_tokens);
  words(request.num_adjustments);
  words(request.adjustment_traits);
}

template <class Words>
int64_t visit_size(Words& words, int64_t size) {
  if constexpr (Words::reads) return words.count();
  words(size);
  return size;
}

// A list whose items are numbers of one word.
template <class Words, class Items>
void visit_list(Words& words, Items& items) {
  const int64_t size = visit_size(words, std::ssize(items));
  if constexpr (Words::reads) items.resize(static_cast<size_t>(size));
  for (auto& item : items) words(item);
}

}  // namespace

RecordedRequest recorded(const Request& request) {
  return {.id = request.id,
          .client = request.client,
          .priority = request.priority,
          .arrival = request.arrival,
          .num_prompt = request.num_prompt,
          .num_known = std::ssize(request.tokens),
          .length_limit = request.length_limit,
          .min_tokens = request.min_tokens,
          .num_adjustments = request.adjustments.size(),
          .adjustment_traits = request.adjustments.traits()};
}

std::unique_ptr<Request> request_of(const RecordedRequest& recorded, const Config& config, KVCacheManager& kv) {
  const int64_t most = std::min(config.max_model_len, config.pool_tokens());
  require(0 < recorded.num_prompt && recorded.num_prompt <= recorded.num_known &&
              recorded.num_known <= recorded.length_limit && recorded.length_limit <= most && 0 <= recorded.client &&
              recorded.client < config.num_clients && 0 <= recorded.num_adjustments &&
              recorded.num_adjustments <= config.max_adjustments,
          "the recording has a request ", recorded.id, " that no scheduler would have taken");
  const std::vector<Token> tokens(static_cast<size_t>(recorded.num_known), plain_token);
  const auto num_prompt = static_cast<size_t>(recorded.num_prompt);
  RequestSpec spec{.id = recorded.id,
                   .tokens = std::span(tokens).first(num_prompt),
                   .generated = std::span(tokens).subspan(num_prompt),
                   .client = recorded.client,
                   .priority = recorded.priority,
                   .max_tokens = recorded.length_limit - recorded.num_prompt,
                   .min_tokens = recorded.min_tokens,
                   .stop_token_ids = {stop_token}};
  auto request = std::make_unique<Request>(spec, 0, recorded.arrival, config, kv.pool(), kv.host_pool());
  request->adjustments = Adjustments(recorded.num_adjustments, recorded.adjustment_traits);
  return request;
}

// References, hashes, and the free list in its order.
template <class Words>
void RecordedState::visit(Words& words, BlockPool& pool) {
  const auto head = static_cast<BlockId>(pool.num_blocks());
  for (BlockId block = 0; block < head; ++block) {
    BlockPool::Block& each = pool.blocks_[static_cast<size_t>(block)];
    int64_t use = 2 * int64_t{each.references} + each.published;
    words(use);
    each.references = static_cast<int32_t>(use / 2);
    if (use % 2 == 0) continue;
    Hash128 hash = each.hash;
    words(hash.lo);
    if constexpr (Words::reads) pool.put_hash(block, {hash.lo, 0});
  }
  int64_t num_free = visit_size(words, pool.num_free_);
  if constexpr (Words::reads) {
    pool.blocks_.back().prev = pool.blocks_.back().next = head;
    pool.num_free_ = 0;
  }
  for (BlockId block = head; num_free > 0; --num_free) {
    block = pool.blocks_[static_cast<size_t>(block)].next;
    words(block);
    if constexpr (Words::reads) {
      require(0 <= block && block < head, "the recording has no block ", block);
      pool.link_before(block, head);
    }
  }
}

Request* RecordedState::find(Scheduler& scheduler, RequestId id) {
  const auto found = scheduler.requests_.find(id);
  require(found != scheduler.requests_.end(), "the recording has no request ", id);
  return found->second.get();
}

template <class Words>
void RecordedState::visit(Words& words, Scheduler& scheduler, Request& request) {
  words(request.state);
  words(request.num_computed);
  words(request.num_unknown);
  words(request.in_flight);
  words(request.sampled_row);
  words(request.num_preemptions);
  words(request.cached_tokens);
  words(request.num_published);
  words(request.may_publish);
  visit_list(words, request.kv.blocks_);
  words(request.first_on_host);
  words(request.num_on_host);
  words(request.may_publish_host);
  // Which of the host's blocks are free follows from these; in what order decides nothing.
  int64_t num_on_host = visit_size(words, request.host.size());
  for (int64_t i = 0; i < num_on_host; ++i) {
    BlockId block = Words::reads ? 0 : request.host.blocks()[static_cast<size_t>(i)];
    words(block);
    if constexpr (Words::reads) request.host.share(block);
  }
  const int64_t num_hashes = visit_size(words, std::ssize(request.hashes));
  if constexpr (Words::reads) request.hashes.resize(static_cast<size_t>(num_hashes));
  for (Hash128& hash : request.hashes) words(hash.lo);
  bool is_led = request.leader != nullptr;
  words(is_led);
  if (!is_led) return;
  RequestId leader = Words::reads ? 0 : request.leader->id;
  words(leader);
  if constexpr (Words::reads) {
    request.leader = find(scheduler, leader);  // it came before, hence was written before
    request.leader->followers.push_back(&request);
  }
}

template <class Words>
void RecordedState::visit_in_flight(Words& words, Scheduler& scheduler) {
  words(scheduler.next_step_);
  words(scheduler.num_in_flight_);
  require(0 <= scheduler.num_in_flight_ && scheduler.num_in_flight_ <= scheduler.config_.depth &&
              scheduler.num_in_flight_ <= scheduler.next_step_,
          "the recording has ", scheduler.num_in_flight_, " steps under way");
  for (int64_t step = scheduler.next_step_ - scheduler.num_in_flight_; step < scheduler.next_step_; ++step) {
    auto& batch = scheduler.batch_of(step);
    words(batch.num_sampled);
    const int64_t num_rows = visit_size(words, std::ssize(batch.rows));
    if constexpr (Words::reads) batch.rows.resize(static_cast<size_t>(num_rows));
    for (auto& row : batch.rows) {
      RequestId id = Words::reads ? 0 : row.request->id;
      words(id);
      if constexpr (Words::reads) row.request = find(scheduler, id);
      words(row.num_new);
      words(row.num_computed);
      words(row.num_preemptions);
      words(row.sampled_row);
    }
  }
}

template <class Words>
void RecordedState::visit(Words& words, Scheduler& scheduler) {
  words(scheduler.next_arrival_);
  words(scheduler.max_running_);
  visit(words, scheduler.kv_.pool());
  std::vector<Request*> requests;
  for (const auto& [id, request] : scheduler.requests_) requests.push_back(request.get());
  std::ranges::sort(requests, {}, &Request::arrival);
  const int64_t num_requests = visit_size(words, std::ssize(requests));
  for (int64_t i = 0; i < num_requests; ++i) {
    RecordedRequest what = Words::reads ? RecordedRequest{} : recorded(*requests[static_cast<size_t>(i)]);
    hybrid::visit(words, what);
    if constexpr (Words::reads) {
      auto made = request_of(what, scheduler.config_, scheduler.kv_);
      require(!scheduler.requests_.contains(what.id), "the recording has request ", what.id, " twice");
      requests.push_back(made.get());
      scheduler.requests_.emplace(what.id, std::move(made));
    }
    Request& request = *requests[static_cast<size_t>(i)];
    visit(words, scheduler, request);
    if constexpr (Words::reads) {
      if (request.state == Request::State::running) scheduler.running_.push_back(&request);
      if (request.state == Request::State::waiting) scheduler.waiting_.push(request);
    }
  }
  if constexpr (Words::reads) std::ranges::sort(scheduler.running_, ServedBefore{});
  visit_in_flight(words, scheduler);
}

// A file may be damaged, or made by somebody: what would be a memory error later is refused here.
void RecordedState::check(Scheduler& scheduler) {
  const Config& config = scheduler.config_;
  require(1 <= scheduler.max_running_ && scheduler.max_running_ <= config.max_num_seqs, "in the recording ",
          scheduler.max_running_, " may run");
  BlockPool& pool = scheduler.kv_.pool();
  std::vector<int32_t> references(static_cast<size_t>(pool.num_blocks()));
  for (auto& [id, request] : scheduler.requests_) {
    require(0 <= request->num_computed && request->kv.size() <= config.max_blocks_per_seq() &&
                0 <= request->num_published && request->num_published <= request->kv.size() &&
                request->state <= Request::State::finished,
            "the recording has a request ", id, " in no possible state");
    require(0 <= request->first_on_host && 0 <= request->num_on_host &&
                request->num_on_host <= config.max_blocks_per_seq() * config.block_size,
            "the recording has a request ", id, " with ", request->num_on_host, " tokens on the host");
    for (const BlockId block : request->kv.blocks()) {
      require(0 <= block && block < pool.num_blocks(), "the recording has no block ", block);
      ++references[static_cast<size_t>(block)];
    }
  }
  for (int64_t step = scheduler.next_step_ - scheduler.num_in_flight_; step < scheduler.next_step_; ++step) {
    const auto& batch = scheduler.batch_of(step);
    require(std::ssize(batch.rows) <= config.max_num_seqs, "step ", step, " of the recording has too many rows");
    for (const auto& row : batch.rows)
      require(-1 <= row.sampled_row && row.sampled_row < batch.num_sampled && 0 <= row.num_computed &&
                  (row.num_preemptions != row.request->num_preemptions ||
                   row.num_computed <= row.request->kv.size() * config.block_size),
              "step ", step, " of the recording has an impossible row");
  }
  scheduler.check_requests();
  pool.check_invariants(references);
}

void RecordedState::write(Scheduler& scheduler, Recorder& out) {
  WordWriter words{out};
  visit(words, scheduler);
}

void RecordedState::read(WordReader& in, Scheduler& scheduler) {
  // What is not known to be held must not be released.
  const auto drop = [&] {
    for (auto& [id, request] : scheduler.requests_) request->kv.blocks_.clear();
  };
  try {
    visit(in, scheduler);
    check(scheduler);
  } catch (const InternalError& error) {
    drop();
    throw std::invalid_argument(concat("the recording's state contradicts itself: ", error.what()));
  } catch (...) {
    drop();
    throw;
  }
}

}  // namespace hybrid
