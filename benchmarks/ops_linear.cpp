// linear on the weights of a whole model (SmolLM2-135M's shapes, every layer its own memory), beside what the machine
// can do: `of_read` is the share of the read bandwidth, `of_peak` of the multiply-add rate, both measured here first.
//
//   build/benchmarks/bench_ops_linear [--benchmark_filter=bf16]
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string_view>
#include <vector>

#include "ops/cpu/isa.h"
#include "ops/cpu/thread_pool.h"
#include "ops/dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hybrid {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// The fastest run of each of several calls.
class FastestCalls {
 public:
  explicit FastestCalls(size_t calls) : seconds_(calls, 1e9) {}
  template <class Call>
  void time(size_t index, const Call& call) {
    const auto start = Clock::now();
    call();
    seconds_[index] = std::min(seconds_[index], seconds_since(start));
  }
  double sum() const { return std::accumulate(seconds_.begin(), seconds_.end(), 0.0); }

 private:
  std::vector<double> seconds_;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

TensorView tensor(void* data, DType dtype, std::initializer_list<int64_t> shape) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  for (int64_t size : shape) view.shape[view.ndim++] = size;
  int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; stride *= view.shape[i--]) view.strides[i] = stride;
  return view;
}

#if defined(__x86_64__)

__attribute__((target("avx512f"))) uint64_t read_all(const char* data, int64_t bytes) {
  __m512i sum[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int j = 0; j < 4; ++j) sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(data + i + j * 64));
  return static_cast<uint64_t>(
      _mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]))));
}

// 24 independent chains of 16 lanes, as in the register tile of linear. Returns multiply-adds.
__attribute__((target("avx512f"))) int64_t multiply_f32(int64_t iterations) {
  __m512 sum[24], a = _mm512_set1_ps(1e-3f), b = _mm512_set1_ps(1e-3f);
  for (int j = 0; j < 24; ++j) sum[j] = _mm512_set1_ps(static_cast<float>(j));  // unlike, else they would be merged
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
    for (auto& s : sum) s = _mm512_fmadd_ps(a, b, s);
    __asm__ volatile("" : "+v"(a), "+v"(b));
  }
  for (auto& s : sum) benchmark::DoNotOptimize(s);
  return iterations * 24 * 16;
}

__attribute__((target("avx512f,avx512bf16"))) int64_t multiply_bf16(int64_t iterations) {
  __m512 sum[24];
  for (int j = 0; j < 24; ++j) sum[j] = _mm512_set1_ps(static_cast<float>(j));
  __m512i a = _mm512_set1_epi32(0x3c003c00), b = a;
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
    for (auto& s : sum) s = _mm512_dpbf16_ps(s, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    __asm__ volatile("" : "+v"(a), "+v"(b));
  }
  for (auto& s : sum) benchmark::DoNotOptimize(s);
  return iterations * 24 * 32;
}

double best_read_bandwidth() {
  constexpr int64_t total = int64_t{1} << 28, part = int64_t{1} << 22, piece = int64_t{1} << 18;
  std::unique_ptr<char, Free> data(static_cast<char*>(std::aligned_alloc(64, total)));
  std::memset(data.get(), 1, total);
  FastestCalls fastest(total / part);
  for (int run = 0; run < 12; ++run)
    for (int64_t i = 0; i < total / part; ++i)
      fastest.time(static_cast<size_t>(i), [&] {
        cpu::pool().parallel_for(part / piece, 1, [&](int64_t begin, int64_t end) {
          benchmark::DoNotOptimize(read_all(data.get() + i * part + begin * piece, (end - begin) * piece));
        });
      });
  return static_cast<double>(total) / fastest.sum();
}

// Floating-point operations a second on all threads.
double best_rate(int64_t (*multiply)(int64_t)) {
  FastestCalls fastest(1);
  int64_t done = 0;
  for (int run = 0; run < 100; ++run)
    fastest.time(0, [&] {
      done = 0;
      cpu::pool().parallel_for(16, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) __atomic_fetch_add(&done, multiply(2000), __ATOMIC_RELAXED);
      });
    });
  return 2.0 * static_cast<double>(done) / fastest.sum();
}

struct Machine {
  double read = best_read_bandwidth(), f32 = best_rate(multiply_f32), bf16 = f32;
  Machine() {
    const std::string_view isa = cpu::kernels().name;
    if (isa == "avx512_bf16" || isa == "amx") bf16 = best_rate(multiply_bf16);
  }
};

const Machine& machine() {
  static const Machine measured;
  return measured;
}

void report(benchmark::State& state, DType dtype, double seconds, double bytes, double operations) {
  state.counters["GBps"] = bytes / seconds * 1e-9;
  state.counters["Gflops"] = operations / seconds * 1e-9;
  state.counters["of_read"] = bytes / seconds / machine().read;
  state.counters["of_peak"] = operations / seconds / (dtype == DType::bf16 ? machine().bf16 : machine().f32);
  state.SetLabel(cpu::kernels().name);
}

#else

void report(benchmark::State& state, DType, double seconds, double bytes, double operations) {
  state.counters["GBps"] = bytes / seconds * 1e-9;
  state.counters["Gflops"] = operations / seconds * 1e-9;
  state.SetLabel(cpu::kernels().name);
}

#endif

struct Layer {
  int64_t n, k;
  TensorView weight;
};

// All linear layers of SmolLM2-135M, packed, with random weights.
class Model {
 public:
  explicit Model(DType dtype, int64_t layers) : dtype_(dtype) {
    for (int64_t layer = 0; layer < layers; ++layer)
      for (const auto& [n, k] : {std::pair{960, 576}, std::pair{576, 576}, std::pair{3072, 576}, std::pair{576, 1536}})
        add(n, k);
    add(49152, 576);
  }
  const std::vector<Layer>& layers() const { return layers_; }

 private:
  void add(int64_t n, int64_t k) {
    const int64_t size = packed_size(n, k), bytes = size * item_size(dtype_);
    memory_.emplace_back(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(bytes))));
    by_dtype(dtype_, [&]<class T>() {
      T* data = reinterpret_cast<T*>(memory_.back().get());
      for (int64_t i = 0; i < size; ++i) data[i] = static_cast<T>(static_cast<float>(i % 251 - 125) * 0.001f);
    });
    layers_.push_back({n, k, tensor(memory_.back().get(), dtype_, {size})});
  }

  DType dtype_;
  std::vector<std::unique_ptr<char, Free>> memory_;
  std::vector<Layer> layers_;
};

// Every layer once. `head`: whether the last one, the vocabulary, takes part.
void forward(benchmark::State& state, DType dtype, int64_t layers, bool head) {
  const int64_t rows = state.range(0);
  const Model model(dtype, layers);
  const size_t count = model.layers().size() - (head ? 0 : 1);
  std::vector<float> x(static_cast<size_t>(rows * 1536)), out(static_cast<size_t>(rows * 49152));
  by_dtype(dtype, [&]<class T>() {
    for (int64_t i = 0; i < rows * 1536; ++i) reinterpret_cast<T*>(x.data())[i] = static_cast<T>(0.01f);
  });
  double products = 0.0, bytes = 0.0;
  for (size_t i = 0; i < count; ++i) {
    products += static_cast<double>(model.layers()[i].n) * static_cast<double>(model.layers()[i].k);
    bytes += static_cast<double>(model.layers()[i].weight.numel() * item_size(dtype));
  }
  FastestCalls fastest(count);
  for (auto _ : state)
    for (size_t i = 0; i < count; ++i) {
      const Layer& layer = model.layers()[i];
      const Linear args{tensor(out.data(), layer.n == 49152 ? DType::f32 : dtype, {rows, layer.n}),
                        tensor(x.data(), dtype, {rows, layer.k}),
                        layer.weight,
                        {},
                        layer.n,
                        layer.k,
                        nullptr};
      fastest.time(i, [&] { linear(args); });
    }
  report(state, dtype, fastest.sum(), bytes, 2.0 * static_cast<double>(rows) * products);
}

void decode_bf16(benchmark::State& state) { forward(state, DType::bf16, 30, true); }
void decode_f16(benchmark::State& state) { forward(state, DType::f16, 30, true); }
void decode_f32(benchmark::State& state) { forward(state, DType::f32, 15, true); }
void prefill_bf16(benchmark::State& state) { forward(state, DType::bf16, 4, false); }
void prefill_f16(benchmark::State& state) { forward(state, DType::f16, 4, false); }
void prefill_f32(benchmark::State& state) { forward(state, DType::f32, 4, false); }

BENCHMARK(decode_bf16)->Arg(1)->Arg(2)->Arg(4)->Arg(8)->Arg(16)->Arg(32)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(decode_f16)->Arg(1)->Arg(16)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(decode_f32)->Arg(1)->Arg(16)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(prefill_bf16)->Arg(128)->Arg(512)->Arg(2048)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(prefill_f16)->Arg(512)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(prefill_f32)->Arg(512)->Unit(benchmark::kMillisecond)->UseRealTime();

// An empty loop in two pieces: what parallel_for costs while the workers are awake.
void empty_loop(benchmark::State& state) {
  for (auto _ : state) cpu::pool().parallel_for(2, 1, [](int64_t begin, int64_t) { benchmark::DoNotOptimize(begin); });
}
BENCHMARK(empty_loop)->UseRealTime();

}  // namespace
}  // namespace hybrid
