// Sampling of 16 rows of a vocabulary, by kind of request; greedy as a ratio to the machine's read bandwidth.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <vector>

#include "ops/cpu/thread_pool.h"
#include "ops/ops.h"

namespace hybrid {
namespace {

struct Settings {
  float temperature = 1.0f, top_p = 1.0f, min_p = 0.0f;
  int32_t top_k = 0, num_logprobs = -1;
};

// The columns of one call. Logits of a model: a normal bulk and a few that stand out.
struct Rows {
  int64_t rows, vocab;
  std::vector<float> logits, temperature, top_p, min_p, penalty, logprobs;
  std::vector<int32_t> tokens, top_k, positions, num_logprobs, adjust_start, logprob_ids, ranks;
  std::vector<int64_t> seeds;
  Sample args{};

  Rows(int64_t n, int64_t size, const Settings& s)
      : rows(n),
        vocab(size),
        logits(static_cast<size_t>(n * size)),
        temperature(static_cast<size_t>(n), s.temperature),
        top_p(static_cast<size_t>(n), s.top_p),
        min_p(static_cast<size_t>(n), s.min_p),
        penalty(static_cast<size_t>(n), 1.0f),
        logprobs(static_cast<size_t>(n * 21)),
        tokens(static_cast<size_t>(n)),
        top_k(static_cast<size_t>(n), s.top_k),
        positions(static_cast<size_t>(n)),
        num_logprobs(static_cast<size_t>(n), s.num_logprobs),
        adjust_start(static_cast<size_t>(n + 1)),
        logprob_ids(static_cast<size_t>(n * 21)),
        ranks(static_cast<size_t>(n)),
        seeds(static_cast<size_t>(n), 7) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0.0f, 2.0f);
    for (float& x : logits) x = normal(random);
    for (int64_t r = 0; r < rows; ++r)
      for (int i = 0; i < 20; ++i)
        logits[static_cast<size_t>(r * vocab + random() % vocab)] += 6.0f + 0.4f * static_cast<float>(i);
    const auto view = [](auto& v, DType dtype, int64_t columns = 0) {
      TensorView t;
      t.data = v.data();
      t.dtype = dtype;
      t.ndim = columns > 0 ? 2 : 1;
      t.shape[0] = static_cast<int64_t>(v.size()) / std::max<int64_t>(1, columns);
      t.shape[1] = columns;
      t.strides[0] = std::max<int64_t>(1, columns);
      t.strides[1] = 1;
      return t;
    };
    args.tokens = view(tokens, DType::i32);
    if (s.num_logprobs >= 0) {
      args.logprobs = view(logprobs, DType::f32, 21);
      args.logprob_ids = view(logprob_ids, DType::i32, 21);
      args.ranks = view(ranks, DType::i32);
    }
    args.logits = view(logits, DType::f32, vocab);
    args.temperature = view(temperature, DType::f32), args.top_p = view(top_p, DType::f32),
    args.min_p = view(min_p, DType::f32);
    args.repetition_penalty = view(penalty, DType::f32), args.top_k = view(top_k, DType::i32),
    args.seeds = view(seeds, DType::i64);
    args.positions = view(positions, DType::i32), args.num_logprobs = view(num_logprobs, DType::i32);
    args.adjust_start = view(adjust_start, DType::i32);
    args.adjust_ids = args.adjust_flags = TensorView{.dtype = DType::i32, .ndim = 1, .strides = {1}};
    args.adjust_add = TensorView{.dtype = DType::f32, .ndim = 1, .strides = {1}};
  }
};

double read_bandwidth(int64_t bytes) {
  std::vector<uint64_t> data(static_cast<size_t>(bytes / 8), 1);
  std::vector<uint64_t> sums(static_cast<size_t>(bytes >> 16));
  double best = 0;
  for (int round = 0; round < 8; ++round) {
    const auto start = std::chrono::steady_clock::now();
    cpu::pool().parallel_for(bytes >> 16, 16, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        uint64_t sum = 0;
        for (int64_t i = 0; i < 1 << 13; ++i) sum += data[static_cast<size_t>((piece << 13) + i)];
        sums[static_cast<size_t>(piece)] = sum;
      }
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, static_cast<double>(bytes) / seconds);
  }
  benchmark::DoNotOptimize(sums.data());
  return best;
}

void run(benchmark::State& state, const Settings& settings) {
  Rows rows(state.range(0), state.range(1), settings);
  const auto bytes = static_cast<double>(rows.rows * rows.vocab * 4);
  static const double bandwidth = read_bandwidth(int64_t{128} << 20);
  const auto start = std::chrono::steady_clock::now();
  for (auto _ : state) {
    for (int32_t& position : rows.positions) ++position;
    sample(rows.args);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() /
                         static_cast<double>(state.iterations());
  state.counters["us_per_row"] = seconds * 1e6 / static_cast<double>(rows.rows);
  state.counters["of_bandwidth"] = bytes / seconds / bandwidth;
}

void greedy(benchmark::State& s) { run(s, {.temperature = 0.0f}); }
void greedy_logprobs_20(benchmark::State& s) { run(s, {.temperature = 0.0f, .num_logprobs = 20}); }
void whole_vocabulary(benchmark::State& s) { run(s, {}); }
void top_k_50(benchmark::State& s) { run(s, {.temperature = 0.8f, .top_k = 50}); }
void top_k_50_top_p_90(benchmark::State& s) { run(s, {.temperature = 0.8f, .top_p = 0.9f, .top_k = 50}); }
void top_p_90(benchmark::State& s) { run(s, {.temperature = 0.8f, .top_p = 0.9f}); }
void top_p_90_flat(benchmark::State& s) { run(s, {.temperature = 5.0f, .top_p = 0.9f}); }
void min_p_05(benchmark::State& s) { run(s, {.min_p = 0.05f}); }

#define HYBRID_SAMPLE_BENCHMARK(name) \
  BENCHMARK(name)->Args({1, 49152})->Args({16, 49152})->Args({16, 151936})->UseRealTime()
HYBRID_SAMPLE_BENCHMARK(greedy);
HYBRID_SAMPLE_BENCHMARK(greedy_logprobs_20);
HYBRID_SAMPLE_BENCHMARK(whole_vocabulary);
HYBRID_SAMPLE_BENCHMARK(top_k_50);
HYBRID_SAMPLE_BENCHMARK(top_k_50_top_p_90);
HYBRID_SAMPLE_BENCHMARK(top_p_90);
HYBRID_SAMPLE_BENCHMARK(top_p_90_flat);
HYBRID_SAMPLE_BENCHMARK(min_p_05);

}  // namespace
}  // namespace hybrid
