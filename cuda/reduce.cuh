// Sums and maxima over a warp and over a block, in a fixed order.
#pragma once

namespace hybrid::cuda {

constexpr int warp_size = 32;

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lane = warp_size / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int lane = warp_size / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

// Every thread of the block gets the sum. `scratch`: 32 floats of shared memory, free to reuse after the next barrier.
__device__ inline float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, warps = blockDim.x / warp_size;
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

}  // namespace hybrid::cuda
