// The one way to launch a kernel and the one way to check a CUDA call.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <source_location>

#include "common/check.h"
#include "ops/tensor.h"

namespace hybrid::cuda {

inline void check(cudaError_t result, std::source_location at = std::source_location::current()) {
  if (result != cudaSuccess) [[unlikely]]
    throw InternalError(concat("CUDA: ", cudaGetErrorString(result), " at ", at.file_name(), ":", at.line()));
}

// Kernels take one struct by value, in constant memory (`const __grid_constant__ Params`).
template <class Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, const Params& params,
            std::source_location at = std::source_location::current()) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          at);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, params), at);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for n items of work when each block takes `per_block`: enough to cover them, not more than the device can
// queue well (kernels loop with a grid stride).
inline unsigned grid_for(int64_t n, int64_t per_block) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(n, per_block), 0, 132 * 16));
}

}  // namespace hybrid::cuda
