// rms_norm, with the residual addition fused in: one block a row, the row held in registers between its two passes.
//
// Reads x (and residual) once, writes out (and residual) once: memory-bound. The sum of squares is taken in a fixed
// order (thread, warp, block), so a row does not depend on its neighbours.
#include "launch.cuh"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace hybrid::cuda {

namespace {

constexpr int max_packs = 4;  // per thread: rows of up to 1024 x 4 x 8 elements

template <class T>
struct RmsNormParams {
  T* out;
  const T* x;
  const T* __restrict__ weight;
  T* residual;
  int64_t out_row, x_row, residual_row;
  int dim;
  float eps;
};

template <class T>
__global__ void rms_norm_kernel(const __grid_constant__ RmsNormParams<T> p) {
  constexpr int per = Pack<T>::size;
  __shared__ float scratch[warp_size];
  const int64_t row = blockIdx.x;
  const int packs = p.dim / per;
  Pack<T> held[max_packs];
  float squares = 0.0f;
#pragma unroll
  for (int turn = 0; turn < max_packs; ++turn) {
    const int pack = turn * blockDim.x + threadIdx.x;
    if (pack >= packs) break;
    Pack<T> x = Pack<T>::load(p.x + row * p.x_row + pack * per);
    if (p.residual != nullptr) {
      const Pack<T> residual = Pack<T>::load(p.residual + row * p.residual_row + pack * per);
#pragma unroll
      for (int i = 0; i < per; ++i) x.set(i, x.at(i) + residual.at(i));
      x.store(p.residual + row * p.residual_row + pack * per);
    }
#pragma unroll
    for (int i = 0; i < per; ++i) squares = fmaf(x.at(i), x.at(i), squares);
    held[turn] = x;
  }
  const float scale = rsqrtf(block_sum(squares, scratch) / static_cast<float>(p.dim) + p.eps);
#pragma unroll
  for (int turn = 0; turn < max_packs; ++turn) {
    const int pack = turn * blockDim.x + threadIdx.x;
    if (pack >= packs) break;
    const Pack<T> weight = Pack<T>::load(p.weight + pack * per);
    Pack<T> out;
#pragma unroll
    for (int i = 0; i < per; ++i) out.set(i, held[turn].at(i) * scale * weight.at(i));
    out.store(p.out + row * p.out_row + pack * per);
  }
}

}  // namespace

void rms_norm(const RmsNorm& a) {
  by_dtype(a.x.dtype, [&]<class T>() {
    constexpr int64_t per = Pack<T>::size;
    const int64_t dim = a.x.shape[1], packs = dim / per;
    require(dim % per == 0 && packs <= 1024 * max_packs, "rms_norm: dimension ", dim, " must be a multiple of ", per,
            " of at most ", 1024 * max_packs * per);
    RmsNormParams<T> p{a.out.as<T>(),         a.x.as<T>(),           a.weight.as<T>(),
                       a.residual.as<T>(),    a.out.strides[0],      a.x.strides[0],
                       a.residual.strides[0], static_cast<int>(dim), a.eps};
    const int64_t threads = std::clamp<int64_t>(ceil_div(packs, warp_size) * warp_size, warp_size, 1024);
    launch(rms_norm_kernel<T>, static_cast<unsigned>(a.x.shape[0]), static_cast<unsigned>(threads), 0, a.stream, p);
  });
}

}  // namespace hybrid::cuda
