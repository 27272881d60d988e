// What the scheduler tells its recorder.
#include "core/recorded_state.h"
#include "core/scheduler.h"

namespace hybrid {

void Scheduler::record(std::span<int64_t> memory, int64_t num_steps) {
  recorder_ = std::make_unique<Recorder>(memory, num_steps);
  kv_.record(recorder_.get());
  int64_t index = 0;
  visit_config([&](auto value) { recorder_->config_word(index++, static_cast<int64_t>(value)); }, config_);
  record_state();
}

void Scheduler::record_state() {
  recorder_->begin_half();
  RecordedState::write(*this, *recorder_);
  recorder_->end_half();
}

void Scheduler::record_add(const RequestSpec& spec, const Request& first) {
  recorder_->event(Event::add, spec.id, spec.client, spec.n, spec.priority, std::ssize(spec.tokens),
                   std::ssize(spec.generated), first.length_limit, spec.min_tokens, first.adjustments.size(),
                   first.adjustments.traits());
}

void Scheduler::record_abort(std::span<const RequestId> ids) {
  recorder_->begin(Event::abort);
  for (const RequestId id : ids) recorder_->word(static_cast<int64_t>(id));
  recorder_->end();
}

void Scheduler::record_admission(const Request& request) {
  recorder_->begin(Event::admit);
  recorder_->word(static_cast<int64_t>(request.id));
  recorder_->word(request.num_computed);
  for (const BlockId block : request.kv.blocks()) recorder_->word(block);
  recorder_->end();
}

// Of a batch that is written: the blocks that a row's tokens need beyond those before them are new.
void Scheduler::record_step(const Batch& batch) {
  recorder_->begin(Event::step);
  recorder_->word(batch.step);
  recorder_->word(batch.num_seqs);
  for (const Row& row : batch_of(batch.step).rows) {
    const Request& request = *row.request;
    const int64_t num_before = config_.blocks_for(row.num_computed - row.num_new);
    const int64_t num_blocks = config_.blocks_for(row.num_computed);
    recorder_->word(static_cast<int64_t>(request.id));
    recorder_->word(row.num_new);
    recorder_->word(num_blocks - num_before);
    for (int64_t i = num_before; i < num_blocks; ++i) recorder_->word(request.kv.blocks()[static_cast<size_t>(i)]);
  }
  recorder_->word(batch.num_decodes);
  recorder_->word(batch.num_sampled);
  for (const auto& [source, copy] : copies_) {
    recorder_->word(source);
    recorder_->word(copy);
  }
  recorder_->end();
}

}  // namespace hybrid
