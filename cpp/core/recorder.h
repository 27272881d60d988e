// Recorder: what a scheduler is told and what it decides, as words in memory that another process reads, also when this
// one is dead or stopped. Knows words and room; no request and no token. What a prompt says does not get here: tokens
// are told as the keyed hashes of full blocks, of which only the equality means something.
//
//   memory:  header | half 0 | half 1        half:  state, event, event, ...
//
// A half begins with the whole state of the scheduler. When it holds `num_steps` steps or is full, the other one is
// begun anew: both together always have the last `num_steps`, as far as there is room.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>

#include "common/check.h"

namespace hybrid {

// An event is a word, kind | number of words that follow << 8, and those. As in python/hybrid_serve/flight.py.
enum class Event : uint8_t {
  // What the scheduler is told.
  state = 1,  // see recorded_state.h
  add,        // id, client, n, priority, prompt tokens, generated tokens, length limit, min_tokens, adjustments,
              // their traits
  abort,      // ids
  forget,
  schedule,  // now
  commit,    // step, Picked of each sampled row
  limit,     // how many may run
  hash,      // id, block of its tokens, 64 bits of the hash: asked for the first time
  // What it decides.
  admit,    // id, tokens found in the cache, their blocks
  preempt,  // id
  step,  // step, rows, (id, tokens, new blocks, those) of each row, decodes, sampled rows, (source, copy) of each copy
};
inline constexpr Event first_decision = Event::admit;

// What matters of a token that was picked: whether it ended its request, or gave it one more adjustment.
enum class Picked : uint8_t { plain, adds, stops };

class Recorder {
 public:
  static constexpr int64_t magic = 0x3130544847494c46, header_words = 64;  // "FLIGHT01"
  // Words of the header. Ends are counted in words from the half's begin; a half is `joined` if the other one leads to
  // it without a gap. `calls` is odd while the scheduler is at work.
  enum Word : int64_t { mark, calls, turns, half_words, end_0, end_1, joined_0, joined_1, config };

  // `memory`: of whoever reads it; at least twice what the state may take.
  Recorder(std::span<int64_t> memory, int64_t num_steps);

  // One call of the scheduler, however it ends.
  class Call {
   public:
    explicit Call(Recorder* recorder) : recorder_(recorder) {
      if (recorder_) recorder_->count_call();
    }
    ~Call() {
      if (recorder_) recorder_->count_call();
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

   private:
    Recorder* recorder_;
  };

  // Whether a half should begin now: with begin_half(), a state, end_half().
  bool is_due() const { return is_on_ && (is_full_ || num_steps_ >= steps_a_half_); }
  void begin_half();
  void end_half();  // no room for a state: nothing is recorded from now on

  void begin(Event event);
  void word(int64_t value) {
    if (at_ < limit_)
      half_[at_++] = value;
    else
      is_full_ = true;
  }
  void end();
  template <class... Values>
  void event(Event which, Values... values) {
    begin(which);
    (word(static_cast<int64_t>(values)), ...);
    end();
  }

  void begin_commit(int64_t step, int64_t num_sampled);
  void picked(int64_t row, Picked what) {
    if (picked_ >= 0) half_[picked_ + row] = static_cast<int64_t>(what);
  }
  void config_word(int64_t index, int64_t value) { memory_[static_cast<size_t>(config + index)] = value; }

 private:
  void set(int64_t index, int64_t value) {
    std::atomic_ref(memory_[static_cast<size_t>(index)]).store(value, std::memory_order_release);
  }
  void count_call() {
    call_begun_ = at_;
    set(calls, memory_[calls] + 1);
  }

  std::span<int64_t> memory_;
  int64_t steps_a_half_, num_steps_ = 0;
  // Of the half: its room, where the next word goes, where this event began, and this call.
  int64_t limit_ = 0, at_ = 0, begun_ = 0, call_begun_ = 0;
  int64_t* half_ = nullptr;
  int64_t which_ = 1, picked_ = -1;
  bool is_on_ = true, is_full_ = false;
};

}  // namespace hybrid
