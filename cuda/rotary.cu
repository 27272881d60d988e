// rotary: turns the pairs (i, i + rotary_dim / 2) of every head of q and k by the angle of the row's position, in
// place.
//
// One thread a pair; neighbours take neighbouring pairs. Reads and writes q and k once, cos_sin comes from L2.
#include "launch.cuh"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "vec.cuh"

namespace hybrid::cuda {

namespace {

template <class T>
struct RotaryParams {
  T* q;
  T* k;
  const float* __restrict__ cos_sin;
  const int32_t* __restrict__ positions;
  int64_t rows, q_row, k_row, q_head, k_head, cos_sin_row;
  int heads, kv_heads, half;
};

template <class T>
__global__ void rotary_kernel(const __grid_constant__ RotaryParams<T> p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int row_pairs = (p.heads + p.kv_heads) * p.half;
  const int64_t total = p.rows * row_pairs;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < total; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / row_pairs;
    const int in_row = static_cast<int>(i % row_pairs), head = in_row / p.half, pair = in_row % p.half;
    T* x = head < p.heads ? p.q + row * p.q_row + head * p.q_head : p.k + row * p.k_row + (head - p.heads) * p.k_head;
    const float* angle = p.cos_sin + p.positions[row] * p.cos_sin_row;
    const float cosine = angle[pair], sine = angle[p.half + pair];
    const float first = to_float(x[pair]), second = to_float(x[pair + p.half]);
    x[pair] = from_float<T>(first * cosine - second * sine);
    x[pair + p.half] = from_float<T>(second * cosine + first * sine);
  }
}

}  // namespace

void rotary(const Rotary& a) {
  by_dtype(a.q.dtype, [&]<class T>() {
    RotaryParams<T> p{a.q.as<T>(),
                      a.k.as<T>(),
                      a.cos_sin.as<float>(),
                      a.positions.as<int32_t>(),
                      a.q.shape[0],
                      a.q.strides[0],
                      a.k.strides[0],
                      a.q.strides[1],
                      a.k.strides[1],
                      a.cos_sin.strides[0],
                      static_cast<int>(a.q.shape[1]),
                      static_cast<int>(a.k.shape[1]),
                      static_cast<int>(a.cos_sin.shape[1] / 2)};
    launch(rotary_kernel<T>, grid_for(p.rows * (p.heads + p.kv_heads) * p.half, 256), 256, 0, a.stream, p);
  });
}

}  // namespace hybrid::cuda
