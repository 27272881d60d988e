// Host cost of a step: schedule() + commit() with `seqs` decoding requests of `length` tokens, nothing else in the
// loop.
#include <benchmark/benchmark.h>

#include <deque>
#include <memory>
#include <vector>

#include "core/scheduler.h"

namespace {

using namespace hybrid;

struct Machine {
  explicit Machine(Config c, int64_t length) : config(c) {
    config.validate();
    const BatchLayout layout(config);
    std::vector<std::byte*> pointers;
    for (int64_t i = 0; i <= config.depth; ++i) {
      arenas.emplace_back(static_cast<size_t>(layout.bytes() / 8));
      pointers.push_back(reinterpret_cast<std::byte*>(arenas.back().data()));
    }
    scheduler = std::make_unique<Scheduler>(config, pointers);
    prompt.assign(static_cast<size_t>(length), 1);
    picked.assign(static_cast<size_t>(config.max_num_seqs), 7);
  }

  void add(RequestId id) {
    // Nothing in common, or the first half, among as many families as there are.
    for (size_t i = 0; i < 4; ++i) {
      const RequestId own = (id >> (8 * i)) & 255;
      prompt[i] = static_cast<Token>(families > 0 ? static_cast<RequestId>(i == 0) * (id % families) : own);
      if (families > 0) prompt[prompt.size() / 2 + i] = static_cast<Token>(own);
    }
    scheduler->add({.id = id,
                    .tokens = prompt,
                    .max_tokens = config.max_model_len,
                    .stop_token_ids = {2},
                    .presence_penalty = penalty});
  }
  // Keeps `depth` batches in flight, as the engine does.
  void step() {
    while (const Batch* batch = scheduler->schedule()) sampled[scheduled++ % 2] = batch->num_sampled;
    benchmark::DoNotOptimize(
        scheduler->commit(committed, std::span(picked).first(static_cast<size_t>(sampled[committed % 2]))).num_rows);
    ++committed;
  }

  Config config;
  std::vector<std::vector<uint64_t>> arenas;
  std::unique_ptr<Scheduler> scheduler;
  std::vector<Token> prompt, picked;
  double penalty = 0;
  RequestId families = 0;
  int64_t scheduled = 0, committed = 0, sampled[2] = {};
};

void decode(benchmark::State& state, double penalty) {
  const int64_t seqs = state.range(0), length = state.range(1);
  Config config{.num_blocks = seqs * 2 * length / 16,
                .block_size = 16,
                .max_num_seqs = seqs,
                .max_num_batched_tokens = 8192,
                .max_model_len = 2 * length,
                .vocab_size = 32000};
  config.depth = state.range(2);
  Machine m(config, length);
  m.penalty = penalty;
  RequestId next_id = 0;
  int64_t steps_left = 0;  // before the first reaches its end
  for (auto _ : state) {
    if (steps_left-- == 0) {
      state.PauseTiming();
      while (!m.scheduler->idle()) m.step();
      for (int64_t i = 0; i < seqs; ++i) m.add(next_id++);
      while (m.scheduler->stats().num_waiting > 0) m.step();
      steps_left = length / 2;
      state.ResumeTiming();
    }
    m.step();
  }
}

BENCHMARK_CAPTURE(decode, plain, 0.0)
    ->ArgNames({"seqs", "length", "depth"})
    ->Args({1, 1024, 1})
    ->Args({256, 1024, 1})
    ->Args({256, 1024, 2})
    ->Args({256, 8192, 1})
    ->Args({1024, 1024, 1})
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(decode, penalties, 1.0)
    ->ArgNames({"seqs", "length", "depth"})
    ->Args({256, 1024, 1})
    ->Unit(benchmark::kMicrosecond);

// Decodes that begin alike, in families: none comes or goes; or each ends after 200 tokens and another one comes.
void decode_shared(benchmark::State& state, bool comes_and_goes) {
  const int64_t seqs = state.range(0), length = 1024, lifetime = 200;
  Config config{.num_blocks = seqs * 2 * length / 16,
                .block_size = 16,
                .max_num_seqs = seqs,
                .max_num_batched_tokens = 16384,
                .max_model_len = 2 * length,
                .vocab_size = 32000};
  config.min_shared_tokens = 256;
  Machine m(config, length);
  m.families = static_cast<RequestId>(state.range(1));
  RequestId next_id = 0;
  std::deque<RequestId> running;
  int64_t steps = 0;
  const auto renew = [&](int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (std::ssize(running) == seqs) {
        m.scheduler->abort({&running.front(), 1});
        running.pop_front();
      }
      m.add(running.emplace_back(next_id++));
    }
  };
  for (auto _ : state) {
    if (steps++ % (length / 2) == 0 || comes_and_goes) {
      state.PauseTiming();
      renew(comes_and_goes && steps > 1 ? (steps * seqs / lifetime) - (steps - 1) * seqs / lifetime : seqs);
      if (!comes_and_goes || steps == 1)
        while (m.scheduler->stats().num_waiting > 0) m.step();
      state.ResumeTiming();
    }
    m.step();
  }
}
BENCHMARK_CAPTURE(decode_shared, all_stay, false)
    ->ArgNames({"seqs", "families"})
    ->Args({256, 1})
    ->Args({256, 16})
    ->Args({1024, 1})
    ->Args({1024, 16})
    ->Unit(benchmark::kMicrosecond);
BENCHMARK_CAPTURE(decode_shared, come_and_go, true)
    ->ArgNames({"seqs", "families"})
    ->Args({256, 1})
    ->Args({256, 16})
    ->Args({1024, 16})
    ->Unit(benchmark::kMicrosecond);

// A prompt comes and goes while nothing else runs: add, prefix match of 8,000 cached tokens, one step, release.
void cached_prompt(benchmark::State& state) {
  Machine m({.num_blocks = 1024,
             .block_size = 16,
             .max_num_seqs = 8,
             .max_num_batched_tokens = 8192,
             .max_model_len = 10000,
             .vocab_size = 32000},
            8000);
  RequestId id = 0;
  for (auto _ : state) {
    m.scheduler->add({.id = id++, .tokens = m.prompt, .max_tokens = 1});
    m.step();
  }
}
BENCHMARK(cached_prompt)->Unit(benchmark::kMicrosecond);

}  // namespace
