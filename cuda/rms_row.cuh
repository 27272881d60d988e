// The parts of a row that is normed, with the residual addition before it: what rms_norm.cu and gemv.cu have in common,
// so that both give the same bits.
#pragma once

#include "vec.cuh"

namespace hybrid::cuda {

// What one thread holds of a row, per turn: a pack of x, as many values of the residual.
template <class T, class R>
struct RowPart {
  static constexpr int per = Pack<T>::size, residual_packs = per / Pack<R>::size;
  Pack<T> x;
  Pack<R> residual[residual_packs];

  __device__ void load_residual(const R* from) {
#pragma unroll
    for (int i = 0; i < residual_packs; ++i) residual[i] = Pack<R>::load(from + i * Pack<R>::size);
  }
  // sum = R(residual + x), which is stored where `to` is not null.
  __device__ void add(float (&sum)[per], R* to, bool begins) const {
    x.widen(sum);
#pragma unroll
    for (int i = 0; i < residual_packs; ++i) {
      constexpr int count = Pack<R>::size;
      float part[count] = {};
      if (!begins) residual[i].widen(part);
#pragma unroll
      for (int j = 0; j < count; ++j) part[j] += sum[i * count + j];
      const Pack<R> rounded = Pack<R>::narrow(part);
      if (to != nullptr) rounded.store(to + i * count);
      rounded.widen(part);
#pragma unroll
      for (int j = 0; j < count; ++j) sum[i * count + j] = part[j];
    }
  }
};

template <int size>
__device__ inline float add_squares(float squares, const float (&values)[size]) {
#pragma unroll
  for (int i = 0; i < size; ++i) squares = fmaf(values[i], values[i], squares);
  return squares;
}

template <class T>
__device__ inline Pack<T> scaled(const float (&values)[Pack<T>::size], float scale, const Pack<T>& weight) {
  float factors[Pack<T>::size], products[Pack<T>::size];
  weight.widen(factors);
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) products[i] = values[i] * scale * factors[i];
  return Pack<T>::narrow(products);
}

}  // namespace hybrid::cuda
