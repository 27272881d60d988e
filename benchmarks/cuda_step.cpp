// The linear layers of one decode step as a chain in one CUDA graph: what single kernels' times hide, the gaps between
// them, is in it.
//
// A layer is add and norm with qkv, norm (in attention's place), output, add and norm with gate and up and silu_mul,
// down; then comes the head. Every product has weights of its own. A line gives the time of a step, the median of 5
// replays, and the share of a device copy's bandwidth (read + written) at which the weights streamed.
//   bench_cuda_step [rows ...]
#include <cstdlib>

#include "cuda_bench.h"

namespace hybrid::bench {
namespace {

struct Model {
  const char* name;
  int64_t layers, hidden, qkv, inner, vocab;
};
constexpr Model models[] = {{"Qwen2.5-0.5B", 24, 896, 1152, 4864, 151936},
                            {"Llama-3.2-1B", 16, 2048, 3072, 8192, 128256},
                            {"Llama-3.1-8B", 32, 4096, 6144, 14336, 128256}};

// Random bf16; after 8 M of them the same again.
BFloat16* random_memory(int64_t elements) {
  const auto size = static_cast<size_t>(elements);
  std::vector<BFloat16> pattern(std::min(size, size_t{8} << 20));
  std::mt19937 rng(1);
  std::uniform_real_distribution<float> uniform(-0.05f, 0.05f);
  for (BFloat16& x : pattern) x = BFloat16(uniform(rng));
  BFloat16* memory = nullptr;
  cuda::check(cudaMalloc(&memory, size * 2));
  cuda::check(cudaMemcpy(memory, pattern.data(), pattern.size() * 2, cudaMemcpyHostToDevice));
  for (size_t done = pattern.size(); done < size; done *= 2)
    cuda::check(cudaMemcpy(memory + done, memory, std::min(done, size - done) * 2, cudaMemcpyDeviceToDevice));
  return memory;
}

TensorView tensor(void* data, DType dtype, std::initializer_list<int64_t> shape) {
  TensorView t;
  t.data = data, t.dtype = dtype, t.device = Device::cuda, t.ndim = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), t.shape);
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) t.strides[i] = stride, stride *= t.shape[i];
  return t;
}

void step(const Model& m, int64_t rows, BFloat16* weights, BFloat16* activations, float* logits) {
  const auto activation = [&](int64_t width) {
    BFloat16* const data = activations;
    activations += rows * width;
    return tensor(data, DType::bf16, {rows, width});
  };
  const TensorView normed = activation(m.hidden), hidden = activation(m.hidden), qkv = activation(m.qkv),
                   gate_up = activation(2 * m.inner), product = activation(m.inner);
  TensorView sums[] = {activation(2 * m.hidden), activation(2 * m.hidden)};  // as floats
  for (TensorView& sum : sums) sum.dtype = DType::f32, sum.shape[1] = sum.strides[0] = m.hidden;
  TensorView attended = qkv;
  attended.shape[1] = m.hidden;  // the queries' columns
  const TensorView norm = tensor(weights, DType::bf16, {m.hidden});
  const auto weight = [&](int64_t n, int64_t k) {
    BFloat16* const data = weights;
    weights += packed_size(n, k);
    return tensor(data, DType::bf16, {packed_size(n, k)});
  };
  const auto normed_linear = [&](const TensorView& out, const TensorView& scratch, int64_t n) {
    norm_linear({out,
                 hidden,
                 norm,
                 sums[0],
                 sums[1],
                 normed,
                 weight(n, m.hidden),
                 {},
                 scratch,
                 n,
                 m.hidden,
                 1e-6f,
                 false,
                 stream});
    std::swap(sums[0], sums[1]);
  };
  for (int64_t layer = 0; layer < m.layers; ++layer) {
    normed_linear(qkv, {}, m.qkv);
    rms_norm({normed, attended, norm, {}, {}, 1e-6f, false, stream});
    linear({hidden, normed, weight(m.hidden, m.hidden), {}, m.hidden, m.hidden, stream});
    normed_linear(product, gate_up, 2 * m.inner);
    linear({hidden, product, weight(m.hidden, m.inner), {}, m.hidden, m.inner, stream});
  }
  normed_linear(tensor(logits, DType::f32, {rows, m.vocab}), {}, m.vocab);
}

int64_t weight_elements(const Model& m) {
  return m.layers * (packed_size(m.qkv, m.hidden) + packed_size(m.hidden, m.hidden) +
                     packed_size(2 * m.inner, m.hidden) + packed_size(m.hidden, m.inner)) +
         packed_size(m.vocab, m.hidden);
}

void time_step(const Model& m, int64_t rows, BFloat16* weights) {
  BFloat16* const activations = random_memory(rows * (6 * m.hidden + m.qkv + 3 * m.inner));
  float* logits = nullptr;
  cuda::check(cudaMalloc(&logits, static_cast<size_t>(rows * m.vocab) * sizeof(float)));
  const auto run = [&] { step(m, rows, weights, activations, logits); };
  run();  // scratch grows, kernels load
  cuda::check(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  run();
  cuda::check(cudaStreamEndCapture(stream, &graph));
  cuda::check(cudaGraphInstantiate(&executable, graph, 0));
  const double time = seconds([&] { cuda::check(cudaGraphLaunch(executable, stream)); });
  std::printf("step of %-12s rows %4ld %10.1f us  %5.1f %% of copy\n", m.name, static_cast<long>(rows), time * 1e6,
              2.0 * static_cast<double>(weight_elements(m)) / time / copy_bandwidth * 100);
  std::fflush(stdout);
  cuda::check(cudaGraphExecDestroy(executable));
  cuda::check(cudaGraphDestroy(graph));
  cuda::check(cudaFree(activations));
  cuda::check(cudaFree(logits));
}

}  // namespace
}  // namespace hybrid::bench

int main(int count, char** arguments) {
  using namespace hybrid;
  std::vector<int64_t> rows;
  for (int i = 1; i < count; ++i) rows.push_back(std::atoll(arguments[i]));
  if (rows.empty()) rows = {1, 8, 16, 24, 32, 64, 128, 256, 512};
  bench::begin();
  for (const bench::Model& model : bench::models) {
    BFloat16* const weights = bench::random_memory(bench::weight_elements(model));
    for (const int64_t r : rows) bench::time_step(model, r, weights);
    cuda::check(cudaFree(weights));
  }
  return 0;
}
