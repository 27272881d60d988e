// silu_mul: out = silu(gate) * up, 16 bytes a thread and turn; memory-bound.
#include "launch.cuh"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "vec.cuh"

namespace hybrid::cuda {

namespace {

template <class T>
struct SiluMulParams {
  T* __restrict__ out;
  const T* __restrict__ x;
  int64_t rows, dim, out_row, x_row;
};

template <class T>
__global__ void silu_mul_kernel(const __grid_constant__ SiluMulParams<T> p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  constexpr int per = Pack<T>::size;
  const int64_t packs = p.dim / per, total = p.rows * packs;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < total; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / packs, at = i % packs * per;
    const Pack<T> gate = Pack<T>::load(p.x + row * p.x_row + at), up = Pack<T>::load(p.x + row * p.x_row + p.dim + at);
    Pack<T> out;
#pragma unroll
    for (int j = 0; j < per; ++j) out.set(j, gate.at(j) / (1.0f + __expf(-gate.at(j))) * up.at(j));
    out.store(p.out + row * p.out_row + at);
  }
}

}  // namespace

void silu_mul(const SiluMul& a) {
  by_dtype(a.out.dtype, [&]<class T>() {
    SiluMulParams<T> p{a.out.as<T>(), a.x.as<T>(), a.out.shape[0], a.out.shape[1], a.out.strides[0], a.x.strides[0]};
    require(p.dim % Pack<T>::size == 0, "silu_mul: dimension ", p.dim, " is not a multiple of ", Pack<T>::size);
    launch(silu_mul_kernel<T>, grid_for(p.rows * (p.dim / Pack<T>::size), 256), 256, 0, a.stream, p);
  });
}

}  // namespace hybrid::cuda
