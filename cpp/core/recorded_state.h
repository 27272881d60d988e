// The state of a scheduler as words, in both directions: a member that decides something is named here, once. Knows
// what the classes of the core are made of; neither policy nor recording.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "common/check.h"
#include "core/recorder.h"
#include "core/request.h"

namespace hybrid {

class KVCacheManager;
class Scheduler;

struct WordWriter {
  static constexpr bool reads = false;
  Recorder& out;

  template <class T>
  void operator()(const T& value) {
    out.word(static_cast<int64_t>(value));
  }
};

class WordReader {
 public:
  static constexpr bool reads = true;

  explicit WordReader(std::span<const int64_t> words) : words_(words) {}

  bool empty() const { return words_.empty(); }
  int64_t count_left() const { return std::ssize(words_); }
  int64_t next() {
    require(!words_.empty(), "the recording ends within an event");
    const int64_t word = words_.front();
    words_ = words_.subspan(1);
    return word;
  }
  std::span<const int64_t> take(int64_t n) {
    require(0 <= n && n <= std::ssize(words_), "the recording ends within an event");
    const auto taken = words_.first(static_cast<size_t>(n));
    words_ = words_.subspan(static_cast<size_t>(n));
    return taken;
  }
  // A number of things of at least a word each.
  int64_t count() {
    const int64_t n = next();
    require(0 <= n && n <= std::ssize(words_), "the recording ends within a list of ", n);
    return n;
  }
  template <class T>
  void operator()(T& value) {
    value = static_cast<T>(next());
  }

 private:
  std::span<const int64_t> words_;
};

// What a request is, as far as the scheduler's decisions depend on it.
struct RecordedRequest {
  RequestId id = 0;
  int64_t client = 0, priority = 0, arrival = 0;
  int64_t num_prompt = 0, num_known = 0, length_limit = 0, min_tokens = 0;
  int64_t num_adjustments = 0, adjustment_traits = 0;
};

// A recording has no tokens. These stand for them: nothing but hashes, which are recorded, depends on the others.
inline constexpr Token plain_token = 0, stop_token = 1, first_new_token = 2;

RecordedRequest recorded(const Request& request);
std::unique_ptr<Request> request_of(const RecordedRequest& recorded, const Config& config, KVCacheManager& kv);

struct RecordedState {
  static void write(Scheduler& scheduler, Recorder& out);
  static void read(WordReader& in, Scheduler& scheduler);  // `scheduler`: fresh, of the recording's configuration

 private:
  template <class Words>
  static void visit(Words& words, Scheduler& scheduler);
  template <class Words>
  static void visit(Words& words, BlockPool& pool);
  template <class Words>
  static void visit(Words& words, Scheduler& scheduler, Request& request);
  template <class Words>
  static void visit_in_flight(Words& words, Scheduler& scheduler);
  static Request* find(Scheduler& scheduler, RequestId id);
  static void check(Scheduler& scheduler);
};

// The numbers of the configuration that decide something.
template <class Visit>
void visit_config(Visit&& visit, auto& config) {
  visit(config.num_blocks);
  visit(config.block_size);
  visit(config.max_num_seqs);
  visit(config.max_num_batched_tokens);
  visit(config.max_model_len);
  visit(config.vocab_size);
  visit(config.num_clients);
  visit(config.depth);
  visit(config.enable_prefix_caching);
  visit(config.max_adjustments);
  visit(config.num_host_blocks);
  visit(config.swap_cost);
}

}  // namespace hybrid
