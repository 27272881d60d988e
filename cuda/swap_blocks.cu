// swap_blocks: cache blocks between the device and pinned host memory, by the copy engines.
//
// Blocks that are neighbours on both sides travel as one piece, and all pieces are handed over in one call: a copy call
// costs microseconds, as much as a small block takes on the wire. Bound by PCIe from pieces of about 0.5 MB.
#include <vector>

#include "launch.cuh"
#include "ops/ops.h"

namespace hybrid::cuda {

namespace {

struct Pieces {
  std::vector<void*> to;
  std::vector<const void*> from;
  std::vector<size_t> bytes;
};

Pieces pieces_of(const SwapBlocks& a) {
  const int64_t item = item_size(a.dst_cache.dtype), to_stride = a.dst_cache.strides[0] * item,
                from_stride = a.src_cache.strides[0] * item;
  const auto block_bytes = static_cast<size_t>(a.dst_cache.shape[1] * item);
  Pieces pieces;
  for (int64_t i = 0; i < a.dst.shape[0]; ++i) {
    char* to = a.dst_cache.as<char>() + a.dst.index_at(i) * to_stride;
    const char* from = a.src_cache.as<const char>() + a.src.index_at(i) * from_stride;
    if (!pieces.to.empty() && static_cast<char*>(pieces.to.back()) + pieces.bytes.back() == to &&
        static_cast<const char*>(pieces.from.back()) + pieces.bytes.back() == from) {
      pieces.bytes.back() += block_bytes;
      continue;
    }
    pieces.to.push_back(to), pieces.from.push_back(from), pieces.bytes.push_back(block_bytes);
  }
  return pieces;
}

#if CUDART_VERSION >= 13000  // before, the call has other arguments or is not there
// One call for all takes a stream that is not the default one, nothing that captures it, and pinned memory.
bool can_batch(const SwapBlocks& a) {
  if (a.stream == nullptr) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(a.stream), &status));
  cudaPointerAttributes host{};
  check(cudaPointerGetAttributes(&host, a.dst_cache.device == Device::cpu ? a.dst_cache.data : a.src_cache.data));
  return status == cudaStreamCaptureStatusNone && host.type == cudaMemoryTypeHost;
}
#endif

}  // namespace

void swap_blocks(const SwapBlocks& a) {
  const Pieces pieces = pieces_of(a);
  if (pieces.bytes.empty()) return;
  const auto stream = static_cast<cudaStream_t>(a.stream);
#if CUDART_VERSION >= 13000
  if (can_batch(a)) {
    cudaMemcpyAttributes in_stream_order{};
    in_stream_order.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    size_t first = 0;
    check(cudaMemcpyBatchAsync(pieces.to.data(), pieces.from.data(), pieces.bytes.data(), pieces.bytes.size(),
                               &in_stream_order, &first, 1, stream));
    return;
  }
#endif
  for (size_t i = 0; i < pieces.bytes.size(); ++i)
    check(cudaMemcpyAsync(pieces.to[i], pieces.from[i], pieces.bytes[i], cudaMemcpyDefault, stream));
}

}  // namespace hybrid::cuda
