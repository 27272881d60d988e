#include "core/recorder.h"

#include <algorithm>

namespace hybrid {

Recorder::Recorder(std::span<int64_t> memory, int64_t num_steps) : memory_(memory), steps_a_half_(num_steps) {
  require(std::ssize(memory) >= 2 * header_words && num_steps > 0, "a recording of ", num_steps, " steps in ",
          memory.size(), " words");
  std::ranges::fill(memory_.first(header_words), 0);
  set(half_words, (std::ssize(memory) - header_words) / 2);
  set(mark, magic);
}

void Recorder::begin_half() {
  which_ = 1 - which_;
  limit_ = memory_[half_words];
  half_ = memory_.data() + header_words + which_ * limit_;
  at_ = call_begun_ = num_steps_ = 0;
  picked_ = -1;
  set(end_0 + which_, 0);
  set(joined_0 + which_, !is_full_ && memory_[turns] > 0);
  is_full_ = false;
  begin(Event::state);
}

void Recorder::end_half() {
  end();
  is_on_ = !is_full_;
  if (!is_on_) return set(mark, 0);
  set(turns, memory_[turns] + 1);
}

void Recorder::begin(Event event) {
  begun_ = at_;
  word(static_cast<int64_t>(event));
}

// A call that does not fit is left out, and with it all that follow until the next half.
void Recorder::end() {
  if (is_full_) {
    limit_ = at_ = call_begun_;
    picked_ = -1;
    return set(end_0 + which_, at_);
  }
  const int64_t kind = half_[begun_];
  half_[begun_] = kind | (at_ - begun_ - 1) << 8;
  num_steps_ += kind == static_cast<int64_t>(Event::step);
  set(end_0 + which_, at_);
}

void Recorder::begin_commit(int64_t step, int64_t num_sampled) {
  begin(Event::commit);
  word(step);
  const int64_t first = at_;
  for (int64_t row = 0; row < num_sampled; ++row) word(static_cast<int64_t>(Picked::plain));
  end();
  picked_ = is_full_ ? -1 : first;
}

}  // namespace hybrid
