#include "core/replay.h"

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace hybrid {

namespace {

struct EventWords {
  Event kind;
  std::span<const int64_t> all;  // the first one included
  WordReader words;
};

EventWords next_event(std::span<const int64_t>& events) {
  const auto kind = static_cast<Event>(events.front() & 0xff);
  WordReader reader(events.subspan(1));
  const auto payload = reader.take(events.front() >> 8);
  const auto all = events.first(payload.size() + 1);
  events = events.subspan(all.size());
  return {kind, all, WordReader(payload)};
}

Config config_of(std::span<const int64_t> words) {
  Config config;
  WordReader reader(words);
  visit_config(reader, config);
  config.vocab_size += first_new_token;
  config.validate();
  return config;
}

}  // namespace

Replay::Replay(std::span<const int64_t> config, std::span<const int64_t> events)
    : events_(events), config_(config_of(config)) {
  require(!events.empty() && static_cast<Event>(events.front() & 0xff) == Event::state,
          "the recording does not begin with a state");
  const auto bytes = static_cast<size_t>(BatchLayout(config_).bytes());
  std::vector<std::byte*> pointers;
  for (int64_t i = 0; i <= config_.depth; ++i) pointers.push_back(arenas_.emplace_back(bytes).data());
  scheduler_ = std::make_unique<Scheduler>(config_, pointers);
  WordReader state = next_event(events_).words;
  RecordedState::read(state, *scheduler_);
  for (const auto& [id, request] : scheduler_->requests_) hashes_[id].emplace_back();
  collect_hashes();
  for (auto& [id, request] : scheduler_->requests_) foresee_hashes(id);
  // Twice: a scheduler that decides otherwise may say more.
  memory_.resize(2 * (Recorder::header_words + 2 * events.size() + 3 * static_cast<size_t>(config_.num_blocks)));
  scheduler_->record(memory_, std::ssize(memory_));
}

void Replay::collect_hashes() {
  for (auto rest = events_; !rest.empty();) {
    auto [kind, all, words] = next_event(rest);
    if (kind == Event::add) {
      const auto id = static_cast<RequestId>(words.next());
      words.next();
      const int64_t n = words.next();
      require(1 <= n && n <= config_.max_num_seqs, "request ", id, " of the recording has ", n, " choices");
      for (int64_t i = 0; i < n; ++i) hashes_[id + static_cast<RequestId>(i)].emplace_back();
    } else if (kind == Event::hash) {
      const auto id = static_cast<RequestId>(words.next());
      auto& lists = hashes_[id];
      const int64_t i = words.next();
      require(!lists.empty() && 0 <= i && i < config_.max_model_len, "the recording has no request ", id,
              " with a block ", i);
      auto& hashes = lists.back();
      hashes.resize(std::max(hashes.size(), static_cast<size_t>(i) + 1));
      hashes[static_cast<size_t>(i)] = {static_cast<uint64_t>(words.next()), 0};
    }
  }
}

// The scheduler takes these instead of computing them.
void Replay::foresee_hashes(RequestId id) {
  auto& lists = hashes_.at(id);
  const auto later = std::move(lists.front());
  lists.pop_front();
  auto& hashes = scheduler_->requests_.at(id)->hashes;  // those of the state come first
  for (size_t i = hashes.size(); i < later.size(); ++i) hashes.push_back(later[i]);
}

void Replay::run() {
  try {
    while (!events_.empty()) {
      const auto event = next_event(events_);
      take(event.kind, event.words);
    }
  } catch (const std::logic_error& error) {  // InternalError, std::invalid_argument
    failure_ = error.what();
  }
}

void Replay::take(Event kind, WordReader words) {
  switch (kind) {
    case Event::add:
      return add(words);
    case Event::abort: {
      std::vector<RequestId> ids;
      while (!words.empty()) ids.push_back(static_cast<RequestId>(words.next()));
      scheduler_->abort(ids);
      return;
    }
    case Event::forget:
      scheduler_->forget_prefixes();
      return;
    case Event::limit:
      scheduler_->limit_running(words.next());
      return;
    case Event::schedule:
      scheduler_->schedule(words.next());
      return;
    case Event::commit:
      return commit(words);
    default:
      return;
  }
}

void Replay::add(WordReader& words) {
  RecordedRequest what;
  words(what.id);
  words(what.client);
  const int64_t n = words.next();
  words(what.priority);
  words(what.num_prompt);
  what.num_known = what.num_prompt + words.next();
  words(what.length_limit);
  words(what.min_tokens);
  words(what.num_adjustments);
  words(what.adjustment_traits);
  std::vector<std::unique_ptr<Request>> choices;
  for (int64_t i = 0; i < n; ++i, ++what.id) {
    require(!scheduler_->requests_.contains(what.id), "request ", what.id, " of the recording is added twice");
    what.arrival = scheduler_->next_arrival_ + i;
    choices.push_back(request_of(what, config_, scheduler_->kv_));
    choices.back()->state = i == 0 ? Request::State::waiting : Request::State::held;
  }
  scheduler_->queue(std::move(choices));
  for (int64_t i = 0; i < n; ++i) foresee_hashes(what.id - static_cast<RequestId>(n - i));
}

void Replay::commit(WordReader& words) {
  const int64_t step = words.next();
  const auto picked = words.take(words.count_left());
  tokens_.assign(picked.size(), plain_token);
  require(scheduler_->num_in_flight_ > 0, "step ", step, " was committed, and no batch is in flight");
  for (const auto& row : scheduler_->batch_of(scheduler_->next_step_ - scheduler_->num_in_flight_).rows) {
    if (row.sampled_row < 0 || row.sampled_row >= std::ssize(picked)) continue;
    Token& token = tokens_[static_cast<size_t>(row.sampled_row)];
    const auto what = static_cast<Picked>(picked[static_cast<size_t>(row.sampled_row)]);
    if (what == Picked::stops) token = stop_token;
    if (what == Picked::adds) token = static_cast<Token>(first_new_token - 1 + row.request->adjustments.size());
  }
  scheduler_->commit(step, tokens_);
}

std::span<const int64_t> Replay::recorded_events() const {
  const std::span<const int64_t> half(memory_.data() + Recorder::header_words,
                                      static_cast<size_t>(memory_[Recorder::end_0]));
  return half;
}

std::vector<int64_t> Replay::decisions_of(std::span<const int64_t> events) {
  std::vector<int64_t> found;
  while (!events.empty()) {
    const auto event = next_event(events);
    if (event.kind >= first_decision || event.kind == Event::commit)
      found.insert(found.end(), event.all.begin(), event.all.end());
  }
  return found;
}

}  // namespace hybrid
