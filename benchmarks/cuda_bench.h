// What the benchmarks of the CUDA kernels share: device memory, the time of a launch within a graph, the line of a
// case.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "launch.cuh"
#include "ops/float16.h"
#include "ops/float8.h"
#include "ops/ops.h"

namespace hybrid::bench {

constexpr size_t beyond_l2 = size_t{256} << 20;
inline cudaStream_t stream = nullptr;
inline double copy_bandwidth = 0;  // bytes a second
inline std::vector<std::string> wanted;

// Device memory that lives as long as its case.
class Memory {
 public:
  ~Memory() {
    for (void* p : held_) cudaFree(p);
  }
  // Random values of about unit size, as bf16 where the type is no other float.
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
    else if (dtype == DType::f8)
      for (char& byte : pattern) byte = std::bit_cast<char>(Float8(normal(rng)));
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

inline double seconds(const std::function<void()>& work) {
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
inline double time_of_launch(int64_t sets, const std::function<void(int64_t)>& launch) {
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

inline int64_t sets_of(double bytes_a_set, int64_t most = 256) {
  return std::clamp<int64_t>(static_cast<int64_t>(std::ceil(static_cast<double>(beyond_l2) / bytes_a_set)), 1, most);
}

inline bool selected(const std::string& name) {
  return std::all_of(wanted.begin(), wanted.end(),
                     [&](const std::string& word) { return name.find(word) != std::string::npos; });
}

inline void report(const std::string& name, double time, double bytes, double operations) {
  std::printf("%-44s %9.2f us  %6.3f TB/s  %5.1f %% of copy  %7.1f TFLOP/s\n", name.c_str(), time * 1e6,
              bytes / time * 1e-12, bytes / time / copy_bandwidth * 100, operations / time * 1e-12);
  std::fflush(stdout);
}

// Makes the stream and measures the copy that bandwidths are held against. Called first.
inline void begin() {
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
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

}  // namespace hybrid::bench
