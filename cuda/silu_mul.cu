// silu_mul: out = silu(gate) * up, 16 bytes a thread and turn; memory-bound. Blocks walk rows, so nothing is divided.
#include "launch.cuh"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "silu.cuh"
#include "vec.cuh"

namespace hybrid::cuda {

namespace {

template <class T>
struct SiluMulParams {
  T* out;
  const T* x;
  int64_t rows, dim, out_row, x_row;
};

template <class T>
__global__ void silu_mul_kernel(const __grid_constant__ SiluMulParams<T> p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  constexpr int per = Pack<T>::size;
  const int64_t at = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) * per;
  if (at >= p.dim) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    float gate[per], up[per];
    Pack<T>::load(p.x + row * p.x_row + at).widen(gate);
    Pack<T>::load(p.x + row * p.x_row + p.dim + at).widen(up);
#pragma unroll
    for (int j = 0; j < per; ++j) up[j] = silu_product(gate[j], up[j]);
    Pack<T>::narrow(up).store(p.out + row * p.out_row + at);
  }
}

}  // namespace

void silu_mul(const SiluMul& a) {
  by_dtype(a.out.dtype, [&]<class T>() {
    SiluMulParams<T> p{a.out.as<T>(), a.x.as<T>(), a.out.shape[0], a.out.shape[1], a.out.strides[0], a.x.strides[0]};
    require(p.dim % Pack<T>::size == 0, "silu_mul: dimension ", p.dim, " is not a multiple of ", Pack<T>::size);
    for (const TensorView* t : {&a.out, &a.x}) require_packs("silu_mul", *t);
    const int64_t packs = p.dim / Pack<T>::size, threads = std::min<int64_t>(ceil_div(packs, 32) * 32, 256);
    const auto columns = static_cast<unsigned>(ceil_div(packs, threads));
    launch(silu_mul_kernel<T>, dim3(columns, grid_for(p.rows, 1)), static_cast<unsigned>(threads), 0, a.stream, p);
  });
}

}  // namespace hybrid::cuda
