// rms_norm, with the residual addition fused in: one block a row, one pass, the row held in registers.
//
// Reads x (and residual) once, writes out (and residual) once: memory-bound. The weight is read ahead of the wait. The
// block's shape, and with it the order of the sum of squares (thread, warp, block), follows from the row's width alone.
// One row is bound by what one multiprocessor can move, some 96 KB in 2 us at 8192 columns.
#include "launch.cuh"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "reduce.cuh"
#include "rms_row.cuh"

namespace hybrid::cuda {

namespace {

constexpr int most_threads = 1024, most_turns = 4;

// R: the residual's type, T or float. The sum is held as floats, rounded to R first: what is normed is what was stored.
template <class T, class R>
struct RmsNormParams {
  T* out;
  const T* x;
  const T* __restrict__ weight;
  const R* residual;
  R* sum;
  int64_t out_row, x_row, residual_row, sum_row;
  int dim;
  float eps;
  bool begins_residual;
};

template <class T, class R, int turns>
__global__ void __launch_bounds__(most_threads) rms_norm_kernel(const __grid_constant__ RmsNormParams<T, R> p) {
  let_next_kernel_start();
  constexpr int per = Pack<T>::size;
  __shared__ float scratch[warp_size];
  const int64_t row = blockIdx.x;
  const int packs = p.dim / per;
  const auto pack_of = [](int turn) { return turn * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); };
  Pack<T> weight[turns];
#pragma unroll
  for (int turn = 0; turn < turns; ++turn)
    if (pack_of(turn) < packs) weight[turn] = Pack<T>::load(p.weight + pack_of(turn) * per);
  wait_for_previous_kernel();

  RowPart<T, R> part[turns];
  const R* residual = p.residual + row * p.residual_row;
  R* const sum = p.sum + row * p.sum_row;
#pragma unroll
  for (int turn = 0; turn < turns; ++turn) {
    if (pack_of(turn) >= packs) continue;
    part[turn].x = Pack<T>::load(p.x + row * p.x_row + pack_of(turn) * per);
    if (p.residual != nullptr && !p.begins_residual) part[turn].load_residual(residual + pack_of(turn) * per);
  }
  float held[turns][per], squares = 0.0f;
#pragma unroll
  for (int turn = 0; turn < turns; ++turn) {
    if (pack_of(turn) >= packs) continue;
    if (p.residual != nullptr)
      part[turn].add(held[turn], sum + pack_of(turn) * per, p.begins_residual);
    else
      part[turn].x.widen(held[turn]);
    squares = add_squares(squares, held[turn]);
  }
  const float scale = rsqrtf(block_sum(squares, scratch) / static_cast<float>(p.dim) + p.eps);
#pragma unroll
  for (int turn = 0; turn < turns; ++turn)
    if (pack_of(turn) < packs)
      scaled(held[turn], scale, weight[turn]).store(p.out + row * p.out_row + pack_of(turn) * per);
}

template <class T, class R>
void launch_rms_norm(const RmsNorm& a) {
  constexpr int64_t per = Pack<T>::size;
  const int64_t rows = a.x.shape[0], dim = a.x.shape[1], packs = dim / per;
  require(dim % per == 0 && packs <= most_threads * most_turns, "rms_norm: dimension ", dim, " must be a multiple of ",
          per, " of at most ", most_threads * most_turns * per);
  const TensorView& sum = a.sum.defined() ? a.sum : a.residual;
  for (const TensorView* t : {&a.out, &a.x, &a.weight, &a.residual, &sum}) require_packs("rms_norm", *t);
  const RmsNormParams<T, R> p{
      a.out.as<T>(),  a.x.as<T>(),           a.weight.as<T>(), a.residual.as<R>(),    sum.as<R>(), a.out.strides[0],
      a.x.strides[0], a.residual.strides[0], sum.strides[0],   static_cast<int>(dim), a.eps,       a.begins_residual};
  const auto run = [&]<int turns>() {
    const int64_t threads = ceil_div(ceil_div(packs, turns), warp_size) * warp_size;
    launch(rms_norm_kernel<T, R, turns>, static_cast<unsigned>(rows), static_cast<unsigned>(threads), 0, a.stream, p);
  };
  // 512 threads a block where they suffice: measured between 256 and 1024, for one row and for thousands.
  if (packs <= 512)
    run.template operator()<1>();
  else if (packs <= 1024)
    run.template operator()<2>();
  else
    run.template operator()<4>();
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
