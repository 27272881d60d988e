// A random linear layer, its input, and what comes out of it by a plain loop.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "ops/ops.h"
#include "strided_tensor.h"

namespace hybrid {

inline StridedTensor packed(const StridedTensor& weight) {
  StridedTensor out(weight.view().dtype, {packed_size(weight.view().shape[0], weight.view().shape[1])});
  pack_weight({out, weight});
  return out;
}

// One random layer and its input, x with gaps between rows.
struct Layer {
  int64_t n, k;
  StridedTensor x, weight, bias, packed_weight;

  Layer(DType dtype, int64_t rows, int64_t n_, int64_t k_, std::mt19937& generator)
      : n(n_),
        k(k_),
        x(StridedTensor::random(dtype, {rows, k_}, generator, k_ + 5)),
        weight(StridedTensor::random(dtype, {n_, k_}, generator)),
        bias(StridedTensor::random(dtype, {n_}, generator)),
        packed_weight(packed(weight)) {}

  void run(void (*linear)(const Linear&), const TensorView& out, const TensorView& rows, bool with_bias) const {
    linear({out, rows, packed_weight, with_bias ? bias.view() : TensorView{}, n, k, nullptr});
  }
};

inline void expect_close(const Layer& layer, const StridedTensor& out, bool with_bias) {
  for (int64_t row = 0; row < out.view().shape[0]; ++row)
    for (int64_t column = 0; column < layer.n; ++column) {
      double sum = with_bias ? layer.bias.at(column) : 0.0, magnitude = std::abs(sum);
      for (int64_t i = 0; i < layer.k; ++i) {
        const double product = double{layer.x.at(row, i)} * layer.weight.at(column, i);
        sum += product;
        magnitude += std::abs(product);
      }
      ASSERT_NEAR(out.at(row, column), sum, 2e-6 * magnitude) << "row " << row << ", column " << column;
    }
}

}  // namespace hybrid
