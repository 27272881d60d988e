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

// R: the residual's type, T or float. The sum is held as floats, rounded to R first: what is normed is what was stored.
template <class T, class R>
struct RmsNormParams {
  T* out;
  const T* x;
  const T* __restrict__ weight;
  R* residual;
  int64_t out_row, x_row, residual_row;
  int dim;
  float eps;
};

template <class T, class R>
__global__ void rms_norm_kernel(const __grid_constant__ RmsNormParams<T, R> p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  constexpr int per = Pack<T>::size, residual_per = Pack<R>::size;
  __shared__ float scratch[warp_size];
  const int64_t row = blockIdx.x;
  const int packs = p.dim / per;
  float held[max_packs][per];
  float squares = 0.0f;
#pragma unroll
  for (int turn = 0; turn < max_packs; ++turn) {
    const int pack = turn * blockDim.x + threadIdx.x;
    if (pack >= packs) break;
    const Pack<T> x = Pack<T>::load(p.x + row * p.x_row + pack * per);
#pragma unroll
    for (int i = 0; i < per; ++i) held[turn][i] = x.at(i);
    if (p.residual != nullptr) {
      R* residual = p.residual + row * p.residual_row + pack * per;
#pragma unroll
      for (int part = 0; part < per; part += residual_per) {
        Pack<R> sum = Pack<R>::load(residual + part);
#pragma unroll
        for (int i = 0; i < residual_per; ++i) {
          sum.set(i, sum.at(i) + held[turn][part + i]);
          held[turn][part + i] = sum.at(i);
        }
        sum.store(residual + part);
      }
    }
#pragma unroll
    for (int i = 0; i < per; ++i) squares = fmaf(held[turn][i], held[turn][i], squares);
  }
  const float scale = rsqrtf(block_sum(squares, scratch) / static_cast<float>(p.dim) + p.eps);
#pragma unroll
  for (int turn = 0; turn < max_packs; ++turn) {
    const int pack = turn * blockDim.x + threadIdx.x;
    if (pack >= packs) break;
    const Pack<T> weight = Pack<T>::load(p.weight + pack * per);
    Pack<T> out;
#pragma unroll
    for (int i = 0; i < per; ++i) out.set(i, held[turn][i] * scale * weight.at(i));
    out.store(p.out + row * p.out_row + pack * per);
  }
}

template <class T, class R>
void launch_rms_norm(const RmsNorm& a) {
  constexpr int64_t per = Pack<T>::size;
  const int64_t dim = a.x.shape[1], packs = dim / per;
  require(dim % per == 0 && packs <= 1024 * max_packs, "rms_norm: dimension ", dim, " must be a multiple of ", per,
          " of at most ", 1024 * max_packs * per);
  RmsNormParams<T, R> p{a.out.as<T>(),         a.x.as<T>(),           a.weight.as<T>(),
                        a.residual.as<R>(),    a.out.strides[0],      a.x.strides[0],
                        a.residual.strides[0], static_cast<int>(dim), a.eps};
  const int64_t threads = std::clamp<int64_t>(ceil_div(packs, warp_size) * warp_size, warp_size, 1024);
  launch(rms_norm_kernel<T, R>, static_cast<unsigned>(a.x.shape[0]), static_cast<unsigned>(threads), 0, a.stream, p);
}

}  // namespace

void rms_norm(const RmsNorm& a) {
  by_dtype(a.x.dtype, [&]<class T>() {
    if (a.residual.dtype == DType::f32)
      launch_rms_norm<T, float>(a);
    else
      launch_rms_norm<T, T>(a);
  });
}

}  // namespace hybrid::cuda
