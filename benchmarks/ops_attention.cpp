// Attention over the paged cache, its store and its copies, as ratios: decode to the machine's read bandwidth, prefill
// to its f32 multiply-add peak, both measured in the same run and with the same threads.
//
//   bench_ops_attention                  HYBRID_CPU_ISA=avx2 bench_ops_attention --benchmark_filter=decode
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "ops/cpu/isa.h"
#include "ops/cpu/thread_pool.h"
#include "ops/float16.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hybrid {
namespace {

TensorView view_of(void* data, DType dtype, std::initializer_list<int64_t> shape) {
  TensorView v;
  v.data = data;
  v.dtype = dtype;
  for (const int64_t size : shape) v.shape[v.ndim++] = size;
  int64_t stride = 1;
  for (int i = v.ndim - 1; i >= 0; stride *= v.shape[i--]) v.strides[i] = stride;
  return v;
}

double seconds_of(const auto& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Best of a few sums of `bytes` bytes by all threads, in bytes/s.
double read_bandwidth(int64_t bytes) {
  std::vector<uint64_t> data(static_cast<size_t>(bytes / 8), 1);
  std::vector<uint64_t> sums(1024);
  constexpr int64_t piece = 1 << 13;
  double best = 0;
  for (int round = 0; round < 8; ++round) {
    const double seconds = seconds_of([&] {
      cpu::pool().parallel_for(bytes / 8 / piece, 16, [&](int64_t begin, int64_t end) {
        uint64_t sum = 0;
        for (int64_t i = begin * piece; i < end * piece; ++i) sum += data[static_cast<size_t>(i)];
        sums[static_cast<size_t>(begin % 1024)] = sum;
      });
    });
    benchmark::DoNotOptimize(sums.data());
    best = std::max(best, static_cast<double>(bytes) / seconds);
  }
  return best;
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) float fma_chain_avx512(int64_t steps) {
  __m512 sum[16];
  for (auto& s : sum) s = _mm512_set1_ps(1.0f);
  const __m512 x = _mm512_set1_ps(0.999f);
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 16
    for (auto& s : sum) s = _mm512_fmadd_ps(s, x, x);
  float total = 0;
  for (auto& s : sum) total += _mm512_cvtss_f32(s);
  return total;
}
__attribute__((target("avx2,fma"))) float fma_chain_avx2(int64_t steps) {
  __m256 sum[12];
  for (auto& s : sum) s = _mm256_set1_ps(1.0f);
  const __m256 x = _mm256_set1_ps(0.999f);
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 12
    for (auto& s : sum) s = _mm256_fmadd_ps(s, x, x);
  float total = 0;
  for (auto& s : sum) total += _mm256_cvtss_f32(s);
  return total;
}
#endif

// f32 multiply-adds of all threads, in flops/s; 0 where we have no loop for the machine.
double fma_peak() {
  double best = 0;
#if defined(__x86_64__)
  const bool wide = __builtin_cpu_supports("avx512f");
  if (!wide && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return 0;
  constexpr int64_t steps = 2'000'000;
  const int64_t threads = cpu::num_threads();
  std::vector<float> sums(static_cast<size_t>(threads));
  for (int round = 0; round < 5; ++round) {
    const double seconds = seconds_of([&] {
      cpu::pool().parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          sums[static_cast<size_t>(i)] = wide ? fma_chain_avx512(steps) : fma_chain_avx2(steps);
      });
    });
    benchmark::DoNotOptimize(sums.data());
    const double flops = static_cast<double>(threads * steps) * 2.0 * (wide ? 16 * 16 : 12 * 8);
    best = std::max(best, flops / seconds);
  }
#endif
  return best;
}

// `layers` caches in turn, as a model does, so that the KV of one step does not stay in the last-level cache by luck.
struct Batch {
  std::vector<BFloat16> cache, q, out;
  std::vector<int32_t> query_start{0}, seq_lens, kv_start{0}, kv_blocks;
  std::vector<PagedAttention> layers;
  double kv_bytes = 0, flops = 0;  // of one layer

  Batch(int64_t heads, int64_t kv_heads, int64_t dim, const std::vector<std::pair<int, int>>& sequences,
        int64_t num_layers, int64_t block_size = 32) {
    int64_t blocks = 0, decodes = 0, longest = 0;
    for (const auto& [query_len, seq_len] : sequences) {
      blocks += (seq_len + block_size - 1) / block_size;
      query_start.push_back(query_start.back() + query_len);
      seq_lens.push_back(seq_len);
      kv_start.push_back(static_cast<int32_t>(blocks));
      decodes += query_len == 1;
      longest = std::max<int64_t>(longest, query_len);
      kv_bytes += 2.0 * 2 * seq_len * static_cast<double>(kv_heads * dim);
      const double pairs = query_len * (seq_len - (query_len - 1) / 2.0);
      flops += 4.0 * pairs * static_cast<double>(heads * dim);
    }
    kv_blocks.resize(static_cast<size_t>(blocks));
    std::iota(kv_blocks.begin(), kv_blocks.end(), 0);
    std::shuffle(kv_blocks.begin(), kv_blocks.end(), std::mt19937(1));
    const int64_t rows = query_start.back(), block = kv_heads * block_size * dim;
    std::minstd_rand random(2);
    const auto fill = [&](std::vector<BFloat16>& v, int64_t n) {
      v.resize(static_cast<size_t>(n));
      for (auto& x : v) x = BFloat16(static_cast<float>(random()) / 1073741824.0f - 1.0f);
    };
    fill(cache, num_layers * 2 * blocks * block);
    fill(q, rows * heads * dim);
    out.resize(q.size());
    const auto n = static_cast<int64_t>(sequences.size());
    for (int64_t layer = 0; layer < num_layers; ++layer) {
      PagedAttention a;
      a.out = view_of(out.data(), DType::bf16, {rows, heads, dim});
      a.q = view_of(q.data(), DType::bf16, {rows, heads, dim});
      a.k_cache = view_of(cache.data() + 2 * layer * blocks * block, DType::bf16, {blocks, kv_heads, block_size, dim});
      a.v_cache =
          view_of(cache.data() + (2 * layer + 1) * blocks * block, DType::bf16, {blocks, kv_heads, block_size, dim});
      a.query_start = view_of(query_start.data(), DType::i32, {n + 1});
      a.seq_lens = view_of(seq_lens.data(), DType::i32, {n});
      a.kv_start = view_of(kv_start.data(), DType::i32, {n + 1});
      a.kv_blocks = view_of(kv_blocks.data(), DType::i32, {blocks});
      a.num_decodes = view_of(&decodes, DType::i64, {1}), a.max_decodes = decodes, a.max_prompts = n - decodes;
      a.max_query_len = longest;
      a.scale = 1.0f / std::sqrt(static_cast<float>(dim));
      a.stream = nullptr;
      layers.push_back(a);
    }
  }
};

void run(benchmark::State& state, Batch batch) {
  static const double bandwidth = read_bandwidth(int64_t{256} << 20), peak = fma_peak();
  size_t layer = 0;
  const auto start = std::chrono::steady_clock::now();
  for (auto _ : state) {
    paged_attention(batch.layers[layer]);
    layer = (layer + 1) % batch.layers.size();
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() /
                         static_cast<double>(state.iterations());
  state.counters["read_GB/s"] = bandwidth / 1e9;
  state.counters["kv_of_bandwidth"] = batch.kv_bytes / seconds / bandwidth;
  state.counters["peak_GF/s"] = peak / 1e9;
  if (peak > 0) state.counters["of_fma_peak"] = batch.flops / seconds / peak;
}

using Sequences = std::vector<std::pair<int, int>>;  // {query rows, tokens}

void decode_16x320(benchmark::State& s) { run(s, {9, 3, 64, Sequences(16, {1, 320}), 30}); }
void decode_2x320_in_l2(benchmark::State& s) { run(s, {9, 3, 64, Sequences(2, {1, 320}), 1}); }  // arithmetic alone
void decode_64x1000_gqa4(benchmark::State& s) { run(s, {32, 8, 64, Sequences(64, {1, 1000}), 2}); }
void decode_8x2000_head128(benchmark::State& s) { run(s, {32, 8, 128, Sequences(8, {1, 2000}), 4}); }
void decode_1x32768(benchmark::State& s) { run(s, {9, 3, 64, Sequences(1, {1, 32768}), 10}); }
void decode_ragged(benchmark::State& s) {
  Sequences sequences(15, {1, 100});
  sequences.push_back({1, 8000});
  run(s, {9, 3, 64, sequences, 30});
}
void prefill_1024(benchmark::State& s) { run(s, {9, 3, 64, {{1024, 1024}}, 1}); }
void prefill_1024_head128(benchmark::State& s) { run(s, {16, 8, 128, {{1024, 1024}}, 1}); }
void prefill_512_of_8192(benchmark::State& s) { run(s, {9, 3, 64, {{512, 8192}}, 1}); }
void mixed_15x320_and_497(benchmark::State& s) {
  Sequences sequences(15, {1, 320});
  sequences.push_back({497, 497});
  run(s, {9, 3, 64, sequences, 8});
}

BENCHMARK(decode_16x320)->UseRealTime();
BENCHMARK(decode_2x320_in_l2)->UseRealTime();
BENCHMARK(decode_64x1000_gqa4)->UseRealTime();
BENCHMARK(decode_8x2000_head128)->UseRealTime();
BENCHMARK(decode_1x32768)->UseRealTime();
BENCHMARK(decode_ragged)->UseRealTime();
BENCHMARK(prefill_1024)->UseRealTime();
BENCHMARK(prefill_1024_head128)->UseRealTime();
BENCHMARK(prefill_512_of_8192)->UseRealTime();
BENCHMARK(mixed_15x320_and_497)->UseRealTime();

}  // namespace
}  // namespace hybrid
