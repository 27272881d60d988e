// Replay: a recording's inputs given to a scheduler once more. Knows the words of a recording; neither files nor what a
// difference means.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/config.h"
#include "core/recorded_state.h"
#include "core/scheduler.h"

namespace hybrid {

class Replay {
 public:
  // `config`: the words of a recorder's header; `events`: what its memory holds, from a state on. Throws
  // std::invalid_argument for what no recorder wrote.
  Replay(std::span<const int64_t> config, std::span<const int64_t> events);

  // Until the end, or until the scheduler refuses an input: then failure() says why.
  void run();
  const std::string& failure() const { return failure_; }
  // The events that this scheduler decided, in the recording's words.
  std::vector<int64_t> decisions() const { return decisions_of(recorded_events()); }
  static std::vector<int64_t> decisions_of(std::span<const int64_t> events);

 private:
  void collect_hashes();
  void foresee_hashes(RequestId id);
  void take(Event kind, WordReader words);
  void add(WordReader& words);
  void commit(WordReader& words);
  std::span<const int64_t> recorded_events() const;

  std::span<const int64_t> events_;
  Config config_;
  std::vector<std::vector<std::byte>> arenas_;
  std::vector<int64_t> memory_;  // of our own recorder
  std::unique_ptr<Scheduler> scheduler_;
  // By choice, one list for each time that its id was given: what its blocks' hashes will be.
  std::unordered_map<RequestId, std::deque<std::vector<Hash128>>> hashes_;
  std::vector<Token> tokens_;
  std::string failure_;
};

}  // namespace hybrid
