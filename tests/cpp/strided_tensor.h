// StridedTensor: a tensor whose dtype is chosen at run time and whose rows may have gaps between them; it owns exactly
// its memory, so that the sanitizer sees one element too many.
#pragma once

#include <cstring>
#include <random>
#include <vector>

#include "ops/dispatch.h"
#include "ops/tensor.h"

namespace hybrid {

class StridedTensor {
 public:
  // Zeros. `row_stride`: of the first dimension, 0 for a dense tensor; the gaps exist but belong to nobody.
  StridedTensor(DType dtype, std::vector<int64_t> shape, int64_t row_stride = 0) {
    view_.dtype = dtype;
    view_.ndim = static_cast<int32_t>(shape.size());
    int64_t stride = 1;
    for (int i = view_.ndim - 1; i >= 0; --i) {
      view_.shape[i] = shape[static_cast<size_t>(i)];
      view_.strides[i] = i == 0 && row_stride > 0 ? row_stride : stride;
      stride *= view_.shape[i];
    }
    const int64_t elements = row_stride > 0 && shape[0] > 0 ? (shape[0] - 1) * row_stride + stride / shape[0] : stride;
    storage_.resize(static_cast<size_t>(elements * item_size(dtype)));
    view_.data = storage_.data();
  }
  // Normal floats.
  static StridedTensor random(DType dtype, std::vector<int64_t> shape, std::mt19937& generator,
                              int64_t row_stride = 0) {
    StridedTensor tensor(dtype, std::move(shape), row_stride);
    std::normal_distribution<float> normal;
    const int64_t elements = static_cast<int64_t>(tensor.storage_.size()) / item_size(dtype);
    by_dtype(dtype, [&]<class T>() {
      for (int64_t i = 0; i < elements; ++i) tensor.view_.as<T>()[i] = static_cast<T>(normal(generator));
    });
    return tensor;
  }
  static StridedTensor of(const std::vector<int32_t>& values) {
    StridedTensor tensor(DType::i32, {static_cast<int64_t>(values.size())});
    if (!values.empty()) std::memcpy(tensor.view_.data, values.data(), values.size() * sizeof(int32_t));
    return tensor;
  }
  StridedTensor(const StridedTensor& other) : storage_(other.storage_), view_(other.view_) {
    view_.data = storage_.data();
  }
  StridedTensor(StridedTensor&&) = default;  // moving a vector keeps its memory in place
  StridedTensor& operator=(const StridedTensor&) = delete;
  StridedTensor& operator=(StridedTensor&&) = delete;

  const TensorView& view() const { return view_; }
  operator const TensorView&() const { return view_; }

  // Rows [first, first + count), sharing memory.
  TensorView rows(int64_t first, int64_t count) const {
    TensorView part = view_;
    part.shape[0] = count;
    part.data = static_cast<char*>(view_.data) + first * view_.strides[0] * item_size(view_.dtype);
    return part;
  }
  float at(int64_t row, int64_t column) const { return at(row * view_.strides[0] + column); }
  float at(int64_t offset) const {
    return by_dtype(view_.dtype, [&]<class T>() { return static_cast<float>(view_.as<T>()[offset]); });
  }
  bool row_equals(int64_t row, const StridedTensor& other, int64_t other_row) const {
    const auto bytes = static_cast<size_t>(view_.numel() / view_.shape[0] * item_size(view_.dtype));
    return std::memcmp(rows(row, 1).data, other.rows(other_row, 1).data, bytes) == 0;
  }

 private:
  std::vector<char> storage_;
  TensorView view_;
};

}  // namespace hybrid
