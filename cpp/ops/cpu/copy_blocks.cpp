// Whole cache blocks, within a cache and between two.
#include <algorithm>
#include <cstring>

#include "ops/cpu/thread_pool.h"
#include "ops/ops.h"

namespace hybrid::cpu {

namespace {

void copy(const TensorView& to, const TensorView& from, const TensorView& dst, const TensorView& src) {
  constexpr int64_t piece = 1 << 18;  // bytes: a few large blocks still occupy every thread
  const int64_t size = item_size(to.dtype), block_bytes = to.shape[1] * size;
  const int64_t pieces = (block_bytes + piece - 1) / piece;
  pool().parallel_for(src.shape[0] * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / pieces, offset = i % pieces * piece;
      std::memcpy(to.as<char>() + dst.index_at(pair) * to.strides[0] * size + offset,
                  from.as<char>() + src.index_at(pair) * from.strides[0] * size + offset,
                  static_cast<size_t>(std::min(piece, block_bytes - offset)));
    }
  });
}

}  // namespace

void copy_blocks(const CopyBlocks& a) { copy(a.cache, a.cache, a.dst, a.src); }
void swap_blocks(const SwapBlocks& a) { copy(a.dst_cache, a.src_cache, a.dst, a.src); }

}  // namespace hybrid::cpu
