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

// Programmatic dependent launch: where the device can (compute capability 9.0), a kernel's blocks may start while its
// predecessor in the stream still runs. So every kernel calls wait_for_previous_kernel() before it touches anything
// that an earlier one writes or reads; ahead of that it may read only what no kernel writes (weights, tables). It
// returns when the predecessor has ended and its writes are visible, hence, as that one waited too, when all earlier
// ones have. let_next_kernel_start() only gives the successor leave to start; it is no fence.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
bool can_overlap_launches();  // of the current device

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
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = can_overlap_launches() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), at);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for n items of work when each block takes `per_block`: enough to cover them, not more than the device can
// queue well (kernels loop with a grid stride).
inline unsigned grid_for(int64_t n, int64_t per_block) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(n, per_block), 0, 132 * 16));
}

}  // namespace hybrid::cuda
