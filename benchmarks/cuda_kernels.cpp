// How fast the CUDA kernels are beside what the device can do.
//
// Each case is captured as one CUDA graph of many launches over buffers that together are far larger than L2, replayed
// and timed with events; the median of 5 replays counts. A line gives the time of a launch, the bytes or operations
// that the case cannot do without per second, and for bytes the share of a device copy measured first (read + written).
//   bench_cuda_kernels [words that the names of the cases must contain]
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "launch.cuh"
#include "ops/float16.h"
#include "ops/ops.h"

namespace hybrid::bench {
namespace {

constexpr size_t beyond_l2 = size_t{256} << 20;
cudaStream_t stream = nullptr;
double copy_bandwidth = 0;  // bytes a second
std::vector<std::string> wanted;

// Device memory that lives as long as its case.
class Memory {
 public:
  ~Memory() {
    for (void* p : held_) cudaFree(p);
  }
  // Random values of about unit size, as bf16.
  TensorView random(std::initializer_list<int64_t> shape, DType dtype = DType::bf16) {
    TensorView t = take(shape, dtype);
    std::vector<char> pattern(std::min<size_t>(bytes(t), size_t{8} << 20));
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    if (dtype == DType::f32)
      for (size_t i = 0; i + 4 <= pattern.size(); i += 4) {
        const float x = normal(rng);
        std::memcpy(&pattern[i], &x, 4);
      }
    else
      for (size_t i = 0; i + 2 <= pattern.size(); i += 2) {
        const BFloat16 x(normal(rng));
        std::memcpy(&pattern[i], &x, 2);
      }
    for (size_t at = 0; at < bytes(t); at += pattern.size())
      cuda::check(cudaMemcpy(static_cast<char*>(t.data) + at, pattern.data(), std::min(pattern.size(), bytes(t) - at),
                             cudaMemcpyHostToDevice));
    return t;
  }
  template <class T>
  TensorView column(const std::vector<T>& values, DType dtype) {
    TensorView t = take({static_cast<int64_t>(values.size())}, dtype);
    cuda::check(cudaMemcpy(t.data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return t;
  }
  TensorView take(std::initializer_list<int64_t> shape, DType dtype) {
    TensorView t;
    t.dtype = dtype, t.device = Device::cuda, t.ndim = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), t.shape);
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; --i) t.strides[i] = stride, stride *= t.shape[i];
    cuda::check(cudaMalloc(&t.data, std::max<size_t>(16, bytes(t))));
    held_.push_back(t.data);
    return t;
  }

 private:
  static size_t bytes(const TensorView& t) { return static_cast<size_t>(t.numel() * item_size(t.dtype)); }
  std::vector<void*> held_;
};

double seconds(const std::function<void()>& work) {
  cudaEvent_t begin, end;
  cuda::check(cudaEventCreate(&begin));
  cuda::check(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i < 7; ++i) {
    cuda::check(cudaEventRecord(begin, stream));
    work();
    cuda::check(cudaEventRecord(end, stream));
    cuda::check(cudaEventSynchronize(end));
    float milliseconds = 0;
    cuda::check(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= 2) times.push_back(milliseconds * 1e-3);
  }
  cuda::check(cudaEventDestroy(begin));
  cuda::check(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// launch(i): the case on buffer set i % sets.
double time_of_launch(int64_t sets, const std::function<void(int64_t)>& launch) {
  const int64_t launches = std::max<int64_t>(sets, 10);
  launch(0);  // scratch grows outside of capture
  cuda::check(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int64_t i = 0; i < launches; ++i) launch(i % sets);
  cuda::check(cudaStreamEndCapture(stream, &graph));
  cuda::check(cudaGraphInstantiate(&executable, graph, 0));
  const double time = seconds([&] { cuda::check(cudaGraphLaunch(executable, stream)); });
  cuda::check(cudaGraphExecDestroy(executable));
  cuda::check(cudaGraphDestroy(graph));
  return time / static_cast<double>(launches);
}

int64_t sets_of(double bytes_a_set, int64_t most = 256) {
  return std::clamp<int64_t>(static_cast<int64_t>(std::ceil(static_cast<double>(beyond_l2) / bytes_a_set)), 1, most);
}

bool selected(const std::string& name) {
  return std::all_of(wanted.begin(), wanted.end(),
                     [&](const std::string& word) { return name.find(word) != std::string::npos; });
}

void report(const std::string& name, double time, double bytes, double operations) {
  std::printf("%-44s %9.2f us  %6.2f TB/s  %5.1f %% of copy  %7.1f TFLOP/s\n", name.c_str(), time * 1e6,
              bytes / time * 1e-12, bytes / time / copy_bandwidth * 100, operations / time * 1e-12);
  std::fflush(stdout);
}

struct Heads {
  const char* name;
  int64_t heads, kv_heads, dim;
};
constexpr Heads head_shapes[] = {
    {"llama8b", 32, 8, 128}, {"qwen0.6b", 16, 8, 128}, {"hd64", 32, 8, 64}, {"qwen0.5b", 14, 2, 64}};
constexpr int64_t block_size = 16;

void attention(const std::string& name, const Heads& h, const std::vector<int32_t>& queries,
               const std::vector<int32_t>& lens) {
  if (!selected(name)) return;
  Memory memory;
  const int64_t seqs = static_cast<int64_t>(lens.size());
  std::vector<int32_t> query_start{0}, kv_start{0};
  double visible = 0, tokens = 0;
  for (size_t s = 0; s < lens.size(); ++s) {
    query_start.push_back(query_start.back() + queries[s]);
    kv_start.push_back(kv_start.back() + static_cast<int32_t>((lens[s] + block_size - 1) / block_size));
    const double n = queries[s];
    visible += n * (lens[s] - n) + n * (n + 1) / 2;
    tokens += lens[s];
  }
  const int64_t blocks = kv_start.back(), rows = query_start.back();
  std::vector<int32_t> table(static_cast<size_t>(blocks));
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  std::shuffle(table.begin(), table.end(), std::mt19937(2));
  const double kv_bytes = tokens * 2.0 * static_cast<double>(h.kv_heads * h.dim) * 2;
  const bool decode = rows == seqs;
  const int64_t layers = decode ? sets_of(kv_bytes, 32) : 1;
  const TensorView cache = memory.random({blocks, layers, 2, h.kv_heads, block_size, h.dim});
  const TensorView q = memory.random({rows, h.heads, h.dim}), out = memory.random({rows, h.heads, h.dim});
  PagedAttention a{};
  a.out = out, a.q = q;
  a.query_start = memory.column(query_start, DType::i32), a.seq_lens = memory.column(lens, DType::i32);
  a.kv_start = memory.column(kv_start, DType::i32), a.kv_blocks = memory.column(table, DType::i32);
  a.num_decodes = memory.column(std::vector<int64_t>{decode ? seqs : 0}, DType::i64);
  a.max_decodes = decode ? seqs : 0, a.max_prompts = decode ? 0 : seqs,
  a.max_query_len = *std::max_element(queries.begin(), queries.end());
  a.scale = 1.0f / std::sqrt(static_cast<float>(h.dim)), a.stream = stream;
  a.plan = memory.take({decode_plan_size(a.max_decodes)}, DType::i32);
  plan_decode({a.plan, a.query_start, a.seq_lens, a.kv_start, a.num_decodes, a.max_decodes, h.heads, h.kv_heads, h.dim,
               stream});
  const double time = time_of_launch(layers, [&](int64_t layer) {
    for (int which : {0, 1}) {
      TensorView t = cache;
      t.ndim = 4, t.data = cache.as<BFloat16>() + layer * cache.strides[1] + which * cache.strides[2];
      for (int i = 1; i < 4; ++i) t.shape[i] = cache.shape[i + 2], t.strides[i] = cache.strides[i + 2];
      (which == 0 ? a.k_cache : a.v_cache) = t;
    }
    paged_attention(a);
  });
  report(name, time, kv_bytes + 2.0 * 2 * static_cast<double>(out.numel()),
         4.0 * visible * static_cast<double>(h.heads * h.dim));
}

void attention_cases() {
  std::mt19937 rng(0);
  std::vector<int32_t> mixed;
  std::lognormal_distribution<double> length(6.3, 1.0);
  for (int i = 0; i < 256; ++i) mixed.push_back(static_cast<int32_t>(std::clamp(length(rng), 16.0, 8000.0)));
  for (const Heads& h : head_shapes) {
    const std::string suffix = std::string(" ") + h.name;
    for (const auto& [batch, len] : {std::pair<int, int>{1, 1024},
                                     {1, 8192},
                                     {8, 4096},
                                     {64, 1024},
                                     {64, 4096},
                                     {256, 1024},
                                     {1, 131072},
                                     {1, 384},
                                     {32, 384},
                                     {256, 384}})
      attention("decode " + std::to_string(batch) + "x" + std::to_string(len) + suffix, h,
                std::vector<int32_t>(static_cast<size_t>(batch), 1),
                std::vector<int32_t>(static_cast<size_t>(batch), len));
    attention("decode 256xmixed" + suffix, h, std::vector<int32_t>(256, 1), mixed);
    for (const auto& [batch, len] : {std::pair<int, int>{1, 512}, {4, 1024}, {4, 4096}, {1, 16384}}) {
      const std::vector<int32_t> lens(static_cast<size_t>(batch), len);
      attention("prefill " + std::to_string(batch) + "x" + std::to_string(len) + suffix, h, lens, lens);
    }
  }
}

void linear_case(const std::string& shape, int64_t n, int64_t k, int64_t rows) {
  const std::string name = "linear " + shape + " rows " + std::to_string(rows);
  if (!selected(name)) return;
  Memory memory;
  const double weight_bytes = 2.0 * static_cast<double>(n * k);
  const int64_t sets = sets_of(weight_bytes), elements = packed_size(n, k);
  const TensorView weights = memory.random({sets, elements}), x = memory.random({rows, k}),
                   out = memory.random({rows, n});
  const double time = time_of_launch(sets, [&](int64_t i) {
    TensorView weight = weights;
    weight.ndim = 1, weight.shape[0] = elements, weight.strides[0] = 1;
    weight.data = weights.as<BFloat16>() + i * elements;
    linear({out, x, weight, {}, n, k, stream});
  });
  const auto r = static_cast<double>(rows);
  report(name, time, weight_bytes + 2 * r * static_cast<double>(n + k),
         2 * r * static_cast<double>(n) * static_cast<double>(k));
}

void linear_cases() {
  const std::tuple<const char*, int64_t, int64_t> shapes[] = {
      {"0.5b qkv 1152x896", 1152, 896},  {"0.5b o 896x896", 896, 896},           {"0.5b gate_up 9728x896", 9728, 896},
      {"0.5b down 896x4864", 896, 4864}, {"0.5b head 151936x896", 151936, 896},  {"8b qkv 6144x4096", 6144, 4096},
      {"8b o 4096x4096", 4096, 4096},    {"8b gate_up 28672x4096", 28672, 4096}, {"8b down 4096x14336", 4096, 14336}};
  for (const auto& [name, n, k] : shapes)
    for (int64_t rows : {1, 4, 8, 16, 32, 64, 128, 256, 2048})
      if (rows < 2048 || n < 100000) linear_case(name, n, k, rows);
}

void elementwise_cases() {
  for (int64_t rows : {512, 4096, 16384}) {
    const std::string name = "store_kv " + std::to_string(rows) + " x 8 x 128";
    if (!selected(name)) continue;
    Memory memory;
    const int64_t blocks = rows / block_size, layers = 16;
    const TensorView cache = memory.random({2 * layers, blocks, 8, block_size, 128}),
                     kv = memory.random({layers, rows, 2, 8, 128});
    std::vector<int64_t> slots(static_cast<size_t>(rows));
    for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
    const TensorView slot = memory.column(slots, DType::i64);
    const double time = time_of_launch(layers, [&](int64_t i) {
      const auto part = [](const TensorView& t, int64_t offset, std::initializer_list<int> dims) {
        TensorView p = t;
        p.ndim = 0, p.data = t.as<BFloat16>() + offset;
        for (int d : dims) p.shape[p.ndim] = t.shape[d], p.strides[p.ndim] = t.strides[d], ++p.ndim;
        return p;
      };
      store_kv({part(cache, 2 * i * cache.strides[0], {1, 2, 3, 4}),
                part(cache, (2 * i + 1) * cache.strides[0], {1, 2, 3, 4}), part(kv, i * kv.strides[0], {1, 3, 4}),
                part(kv, i * kv.strides[0] + kv.strides[2], {1, 3, 4}), slot, stream});
    });
    report(name, time, 4.0 * static_cast<double>(rows * 8 * 128 * 2), 0);
  }
  for (const auto& [rows, dim] : {std::pair<int64_t, int64_t>{1, 4096}, {256, 896}, {256, 4096}, {8192, 4096}}) {
    const std::string shape = std::to_string(rows) + " x " + std::to_string(dim);
    const double bytes = 2.0 * static_cast<double>(rows * dim);
    const int64_t sets = sets_of(4 * bytes, 64);
    Memory memory;
    const TensorView x = memory.random({sets, rows, 3 * dim}), weight = memory.random({dim}),
                     residual = memory.random({sets, rows, dim});
    const auto part = [&](const TensorView& t, int64_t i, int64_t first, int64_t size) {
      TensorView p = t;
      p.ndim = 2, p.shape[0] = rows, p.shape[1] = size, p.strides[0] = t.strides[1], p.strides[1] = 1;
      p.data = t.as<BFloat16>() + i * t.strides[0] + first;
      return p;
    };
    if (selected("add+rms_norm " + shape))
      report("add+rms_norm " + shape,
             time_of_launch(sets,
                            [&](int64_t i) {
                              rms_norm({part(x, i, dim, dim), part(x, i, 0, dim), weight, part(residual, i, 0, dim),
                                        1e-6f, stream});
                            }),
             4 * bytes, 0);
    if (selected("silu_mul " + shape))
      report("silu_mul " + shape,
             time_of_launch(sets,
                            [&](int64_t i) { silu_mul({part(residual, i, 0, dim), part(x, i, 0, 2 * dim), stream}); }),
             3 * bytes, 0);
  }
}

void sample_cases() {
  struct Kind {
    const char* name;
    float temperature, top_p;
    int32_t top_k;
  };
  constexpr int64_t vocab = 151936;
  for (int64_t rows : {1, 32, 256})
    for (const Kind& kind : {Kind{"greedy", 0.0f, 1.0f, 0},
                             {"temperature", 0.8f, 1.0f, 0},
                             {"top-k 50", 0.8f, 1.0f, 50},
                             {"top-k 50 top-p 0.9", 0.8f, 0.9f, 50},
                             {"top-p 0.9, flat logits", 1.0f, 0.9f, 0}}) {
      const std::string name = "sample " + std::to_string(rows) + " x " + std::to_string(vocab) + " " + kind.name;
      if (!selected(name)) continue;
      Memory memory;
      const auto size = static_cast<size_t>(rows);
      const int64_t sets = sets_of(4.0 * static_cast<double>(rows * vocab), 16);
      const TensorView logits = memory.random({sets, rows, vocab}, DType::f32);
      Sample a{};
      a.tokens = memory.take({rows}, DType::i32);
      a.temperature = memory.column(std::vector<float>(size, kind.temperature), DType::f32);
      a.top_p = memory.column(std::vector<float>(size, kind.top_p), DType::f32);
      a.min_p = memory.column(std::vector<float>(size, 0.0f), DType::f32);
      a.repetition_penalty = memory.column(std::vector<float>(size, 1.0f), DType::f32);
      a.top_k = memory.column(std::vector<int32_t>(size, kind.top_k), DType::i32);
      a.seeds = memory.column(std::vector<int64_t>(size, 7), DType::i64);
      a.positions = memory.column(std::vector<int32_t>(size, 100), DType::i32);
      a.num_logprobs = memory.column(std::vector<int32_t>(size, -1), DType::i32);
      a.adjust_start = memory.column(std::vector<int32_t>(size + 1, 0), DType::i32);
      a.adjust_ids = memory.take({0}, DType::i32), a.adjust_flags = memory.take({0}, DType::i32);
      a.adjust_add = memory.take({0}, DType::f32), a.stream = stream;
      const double time = time_of_launch(sets, [&](int64_t i) {
        a.logits = logits;
        a.logits.ndim = 2, a.logits.shape[0] = rows, a.logits.shape[1] = vocab;
        a.logits.strides[0] = vocab, a.logits.strides[1] = 1;
        a.logits.data = logits.as<float>() + i * logits.strides[0];
        sample(a);
      });
      report(name, time, 4.0 * static_cast<double>(rows * vocab), 0);
    }
}

void measure_copy() {
  constexpr size_t bytes = size_t{1} << 30;
  Memory memory;
  const TensorView from = memory.random({static_cast<int64_t>(bytes / 2)}),
                   to = memory.take({static_cast<int64_t>(bytes / 2)}, DType::bf16);
  const double time =
      seconds([&] { cuda::check(cudaMemcpyAsync(to.data, from.data, bytes, cudaMemcpyDeviceToDevice, stream)); });
  copy_bandwidth = 2.0 * static_cast<double>(bytes) / time;
  cudaDeviceProp properties;
  cuda::check(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s: device copy %.2f TB/s (read + written)\n", properties.name, copy_bandwidth * 1e-12);
}

}  // namespace
}  // namespace hybrid::bench

int main(int count, char** arguments) {
  using namespace hybrid::bench;
  wanted.assign(arguments + 1, arguments + count);
  hybrid::cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  measure_copy();
  attention_cases();
  linear_cases();
  elementwise_cases();
  sample_cases();
  return 0;
}
