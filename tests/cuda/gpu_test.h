// Runs one op on the CPU and on the GPU over the same random input and compares: the CPU kernel is the specification.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "launch.cuh"
#include "ops/float16.h"
#include "ops/float8.h"
#include "ops/ops.h"

namespace hybrid::test {

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::f32;
}
template <>
constexpr DType dtype_of<BFloat16>() {
  return DType::bf16;
}
template <>
constexpr DType dtype_of<Float16>() {
  return DType::f16;
}
template <>
constexpr DType dtype_of<Float8>() {
  return DType::f8;
}
template <>
constexpr DType dtype_of<int32_t>() {
  return DType::i32;
}
template <>
constexpr DType dtype_of<int64_t>() {
  return DType::i64;
}

// The same contiguous tensor in host and in device memory.
template <class T>
class Twin {
 public:
  explicit Twin(std::vector<int64_t> shape) : shape_(std::move(shape)), host_(static_cast<size_t>(numel())) {
    cuda::check(cudaMalloc(&device_, std::max<size_t>(1, bytes())));
  }
  ~Twin() { cudaFree(device_); }
  Twin(const Twin&) = delete;
  Twin& operator=(const Twin&) = delete;

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t size : shape_) n *= size;
    return n;
  }
  size_t bytes() const { return static_cast<size_t>(numel()) * sizeof(T); }
  std::vector<T>& host() { return host_; }
  // And waits for it: a copy from pageable memory may return before its end, and streams that do not block would not
  // wait for it either.
  void upload() {
    cuda::check(cudaMemcpy(device_, host_.data(), bytes(), cudaMemcpyHostToDevice));
    cuda::check(cudaStreamSynchronize(nullptr));
  }
  std::vector<T> download() const {
    std::vector<T> copy(host_.size());
    cuda::check(cudaMemcpy(copy.data(), device_, bytes(), cudaMemcpyDeviceToHost));
    return copy;
  }
  Twin& fill_random(std::mt19937& rng, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    for (T& x : host_) x = static_cast<T>(normal(rng));
    upload();
    return *this;
  }
  // 0xff is NaN in every float type: an element that a kernel forgets shows.
  Twin& poison() {
    std::memset(static_cast<void*>(host_.data()), 0xff, bytes());
    upload();
    return *this;
  }
  TensorView on(Device device) {
    TensorView t;
    t.data = device == Device::cpu ? static_cast<void*>(host_.data()) : static_cast<void*>(device_);
    t.dtype = dtype_of<T>();
    t.device = device;
    t.ndim = static_cast<int32_t>(shape_.size());
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
      t.shape[i] = shape_[static_cast<size_t>(i)];
      t.strides[i] = stride;
      stride *= t.shape[i];
    }
    return t;
  }

 private:
  std::vector<int64_t> shape_;
  std::vector<T> host_;
  T* device_ = nullptr;
};

// |host - device| <= relative * |host| + absolute, everywhere.
template <class T>
void expect_close(Twin<T>& twin, float relative, float absolute, const char* what) {
  const std::vector<T> device = twin.download();
  for (size_t i = 0; i < device.size(); ++i) {
    const float expected = static_cast<float>(twin.host()[i]), got = static_cast<float>(device[i]);
    if (std::isnan(expected) && std::isnan(got)) continue;
    ASSERT_LE(std::fabs(expected - got), relative * std::fabs(expected) + absolute)
        << what << " differs at " << i << ": CPU " << expected << ", GPU " << got;
  }
}

// One unit in the last place of T, roughly: what a different order of float sums may cost after rounding.
template <class T>
constexpr float rounding() {
  return sizeof(T) == 4 ? 2e-5f : dtype_of<T>() == DType::bf16 ? 1.0f / 64 : 1.0f / 512;
}

using FloatTypes = ::testing::Types<float, BFloat16, Float16>;

// Queries of T_ over a cache of C_, and the scales of that.
template <class T_, class C_ = T_>
struct Over {
  using T = T_;
  using C = C_;
};
using CacheTypes = ::testing::Types<Over<float>, Over<BFloat16>, Over<Float16>, Over<float, Float8>,
                                    Over<BFloat16, Float8>, Over<Float16, Float8>>;
template <class C>
constexpr float k_scale = sizeof(C) == 1 ? 1.25f : 1.0f;
template <class C>
constexpr float v_scale = sizeof(C) == 1 ? 0.8f : 1.0f;

}  // namespace hybrid::test
