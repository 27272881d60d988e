// linear: x @ weight^T + bias, weight row-major [n, k].
//
// 16-bit types run on the tensor cores: few rows by a kernel that streams the weights (gemv.cu), more by warpgroup
// products (linear_sm90.cu) or by cuBLASLt, whichever was measured to be faster. Without either, or where a row's bits
// may not depend on its batch, by one that tiles (gemm.cu); it and the first add in the order of linear.cuh and agree
// bit for bit. Float has its own plain kernel for any number of rows, below.
#include "cublaslt.cuh"
#include "linear.cuh"
#include "linear_sm90.cuh"
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

namespace {

template <class T>
LinearParams<T> params_of(const char* op, const Linear& a) {
  const bool wide = a.out.dtype == DType::f32;
  const LinearParams<T> p{wide ? nullptr : a.out.as<T>(),
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
  constexpr int64_t per = Pack<T>::size;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  require(sizeof(T) == 4 || (p.k % per == 0 && p.x_row % per == 0 && aligned(p.x) && aligned(p.weight)), op,
          ": k = ", p.k, " and the row stride of x = ", p.x_row, " must be multiples of ", per,
          ", x and weight 16-byte aligned");
  return p;
}

// Which kernel, from measurements on an H100: ours streams weights at 90 to 100 % of a copy's bandwidth up to 16 rows,
// fused and ahead of the previous kernel, and up to 32 rows weights so small that launches count (0.4 us less than
// cuBLASLt's 3.9 at 896 x 896). Above, see plan_tiles(). False: no fused kernel for this many rows.
template <bool gated, class T>
bool half_linear(const LinearParams<T>& p, Stream stream) {
  const bool few_rows = p.rows <= 16 || (p.rows <= skinny_rows && p.n * p.k < 4'000'000);
  if (!few_rows && !batch_invariant()) {
    if (const auto plan = plan_tiles(gated, p.rows, p.n, p.k)) {
      warpgroup_linear(p, gated, *plan, stream);
      return true;
    }
    if constexpr (gated) return false;
    if (library_linear(p, stream)) return true;
  }
  if (p.rows <= skinny_rows) {
    (gated ? skinny_gated_linear<T> : skinny_linear<T>)(p, stream);
    return true;
  }
  if constexpr (gated) return false;
  tiled_linear(p, stream);
  return true;
}

}  // namespace

void linear(const Linear& a) {
  by_dtype(a.x.dtype, [&]<class T>() {
    const LinearParams<T> p = params_of<T>("linear", a);
    if constexpr (sizeof(T) == 4)
      float_linear(p, a.stream);
    else
      half_linear<false>(p, a.stream);
  });
}

namespace {

// False: not by one kernel.
template <class T>
bool normed_row(const NormLinear& a) {
  const int64_t rows = a.x.shape[0];
  if (rows != 1 || a.residual.dtype != DType::f32) return false;
  for (const TensorView* t : {&a.x, &a.weight, &a.residual, &a.sum}) require_packs("norm_linear", *t);
  LinearParams<T> p = params_of<T>("norm_linear", {a.out, a.normed, a.product_weight, a.bias, a.n, a.k, a.stream});
  const NormedRow<T> norm{a.x.as<T>(), a.weight.as<T>(), a.residual.as<float>(), a.sum.as<float>(),
                          a.eps,       a.begins_residual};
  return skinny_normed_linear(p, norm, a.gate_up.defined(), a.stream);
}

}  // namespace

void norm_linear(const NormLinear& a) {
  const bool fused = by_dtype(a.x.dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 4)
      return false;
    else
      return normed_row<T>(a);
  });
  if (fused) return;
  rms_norm({a.normed, a.x, a.weight, a.residual, a.sum, a.eps, a.begins_residual, a.stream});
  if (a.gate_up.defined())
    linear_silu_mul({a.out, a.normed, a.product_weight, a.bias, a.gate_up, a.k, a.stream});
  else
    linear({a.out, a.normed, a.product_weight, a.bias, a.n, a.k, a.stream});
}

void linear_silu_mul(const LinearSiluMul& a) {
  const Linear product{a.gate_up, a.x, a.weight, a.bias, 2 * a.out.shape[1], a.k, a.stream};
  const bool fused = by_dtype(a.x.dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 4) {
      return false;
    } else {
      LinearParams<T> p = params_of<T>("linear_silu_mul", product);
      p.out = a.out.as<T>(), p.out_row = a.out.strides[0];
      return half_linear<true>(p, a.stream);
    }
  });
  if (fused) return;
  cuda::linear(product);
  silu_mul({a.out, a.gate_up, a.stream});
}

}  // namespace hybrid::cuda
