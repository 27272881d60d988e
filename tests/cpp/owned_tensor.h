// OwnedTensor: a contiguous tensor with its memory, for tests and benchmarks of the ops.
#pragma once

#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

#include "ops/float16.h"
#include "ops/float8.h"
#include "ops/tensor.h"

namespace hybrid::test {

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>) return DType::f32;
  if constexpr (std::is_same_v<T, Float16>) return DType::f16;
  if constexpr (std::is_same_v<T, BFloat16>) return DType::bf16;
  if constexpr (std::is_same_v<T, Float8>) return DType::f8;
  if constexpr (std::is_same_v<T, int32_t>) return DType::i32;
  if constexpr (std::is_same_v<T, int64_t>) return DType::i64;
  if constexpr (std::is_same_v<T, uint8_t>) return DType::u8;
}

inline TensorView view_of(void* data, DType dtype, std::initializer_list<int64_t> shape) {
  TensorView v;
  v.data = data;
  v.dtype = dtype;
  for (const int64_t size : shape) v.shape[v.ndim++] = size;
  int64_t stride = 1;
  for (int i = v.ndim - 1; i >= 0; stride *= v.shape[i--]) v.strides[i] = stride;
  return v;
}

template <class T>
struct OwnedTensor {
  std::vector<T> data;
  TensorView view;

  OwnedTensor(std::initializer_list<int64_t> shape, T value) {
    int64_t n = 1;
    for (const int64_t size : shape) n *= size;
    data.assign(static_cast<size_t>(n), value);
    view = view_of(data.data(), dtype_of<T>(), shape);
  }
  explicit OwnedTensor(std::vector<T> values) : data(std::move(values)) {
    view = view_of(data.data(), dtype_of<T>(), {static_cast<int64_t>(data.size())});
  }
  OwnedTensor(const OwnedTensor&) = delete;
  OwnedTensor(OwnedTensor&&) = default;  // a vector keeps its memory when it moves
  OwnedTensor& operator=(OwnedTensor&&) = default;

  T& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
  const T& operator[](int64_t i) const { return data[static_cast<size_t>(i)]; }
};

template <class T>
T not_a_number() {
  return static_cast<T>(std::numeric_limits<float>::quiet_NaN());
}

template <class T>
bool same_bits(const T* a, const T* b, int64_t n) {
  return std::memcmp(a, b, static_cast<size_t>(n) * sizeof(T)) == 0;
}

}  // namespace hybrid::test
