// linear: x @ weight^T + bias, weight row-major [n, k].
//
// 16-bit types run on the tensor cores: few rows by a kernel that streams the weights (gemv.cu), more by one that tiles
// (gemm.cu); both add in the order of linear.cuh and agree bit for bit. Float has its own plain kernel for any number
// of rows, below.
#include "linear.cuh"
#include "ops/dispatch.h"

namespace hybrid::cuda {

namespace {

constexpr int tile = 32;

// A block computes 32 x 32 outputs, a thread four of them; each is one chain of fused multiply-adds in ascending k.
__global__ void float_linear_kernel(const __grid_constant__ LinearParams<float> p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  __shared__ float x[tile][tile + 1], w[tile][tile + 1];
  const int64_t row0 = int64_t{blockIdx.y} * tile, column0 = int64_t{blockIdx.x} * tile;
  const int lane = threadIdx.x, first = threadIdx.y;
  float sum[4] = {};
  for (int64_t k0 = 0; k0 < p.k; k0 += tile) {
    const int64_t k = k0 + lane;
#pragma unroll
    for (int i = first; i < tile; i += 8) {
      x[i][lane] = row0 + i < p.rows && k < p.k ? p.x[(row0 + i) * p.x_row + k] : 0.0f;
      w[i][lane] = column0 + i < p.n && k < p.k ? p.weight[(column0 + i) * p.k + k] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < tile; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fmaf(x[first + 8 * i][j], w[lane][j], sum[i]);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) store_output(p, row0 + first + 8 * i, column0 + lane, sum[i]);
}

}  // namespace

void float_linear(const LinearParams<float>& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.n, tile)), static_cast<unsigned>(ceil_div(p.rows, tile)));
  launch(float_linear_kernel, grid, dim3(tile, 8), 0, stream, p);
}

void linear(const Linear& a) {
  by_dtype(a.x.dtype, [&]<class T>() {
    const bool wide = a.out.dtype == DType::f32;
    LinearParams<T> p{wide ? nullptr : a.out.as<T>(),
                      wide ? a.out.as<float>() : nullptr,
                      a.x.as<T>(),
                      a.weight.as<T>(),
                      a.bias.as<T>(),
                      a.x.shape[0],
                      a.n,
                      a.k,
                      a.out.strides[0],
                      a.x.strides[0],
                      segment_length(a.k)};
    if constexpr (sizeof(T) == 4) {
      float_linear(p, a.stream);
    } else {
      constexpr int64_t per = Pack<T>::size;
      const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
      require(p.k % per == 0 && p.x_row % per == 0 && aligned(p.x) && aligned(p.weight), "linear: k = ", p.k,
              " and the row stride of x = ", p.x_row, " must be multiples of ", per, ", x and weight 16-byte aligned");
      (p.rows <= skinny_rows ? skinny_linear<T> : tiled_linear<T>)(p, a.stream);
    }
  });
}

}  // namespace hybrid::cuda
