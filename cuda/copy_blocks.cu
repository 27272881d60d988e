// copy_blocks: whole cache blocks (all layers, K and V, contiguous) from src to dst, for copy-on-write.
//
// Blocks of the grid share a pair: 64 KB pieces, 16 bytes a thread and turn. Memory-bound.
#include "launch.cuh"
#include "ops/ops.h"

namespace hybrid::cuda {

namespace {

struct CopyBlocksParams {
  char* cache;
  const int32_t* __restrict__ src;
  const int32_t* __restrict__ dst;
  int64_t block_stride, block_bytes;
};

__global__ void copy_blocks_kernel(const __grid_constant__ CopyBlocksParams p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const char* from = p.cache + p.src[blockIdx.y] * p.block_stride;
  char* to = p.cache + p.dst[blockIdx.y] * p.block_stride;
  const int64_t step = int64_t{gridDim.x} * blockDim.x * 16;
  for (int64_t at = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) * 16; at < p.block_bytes; at += step)
    *reinterpret_cast<int4*>(to + at) = *reinterpret_cast<const int4*>(from + at);
}

}  // namespace

void copy_blocks(const CopyBlocks& a) {
  const int64_t item = item_size(a.cache.dtype);
  CopyBlocksParams p{a.cache.as<char>(), a.src.as<int32_t>(), a.dst.as<int32_t>(), a.cache.strides[0] * item,
                     a.cache.shape[1] * item};
  require(p.block_bytes % 16 == 0 && p.block_stride % 16 == 0, "copy_blocks: a block of ", p.block_bytes,
          " bytes is not a multiple of 16");
  const auto pieces = static_cast<unsigned>(std::clamp<int64_t>(ceil_div(p.block_bytes, 64 * 1024), 1, 1024));
  launch(copy_blocks_kernel, dim3(pieces, static_cast<unsigned>(a.src.shape[0])), 256, 0, a.stream, p);
}

}  // namespace hybrid::cuda
