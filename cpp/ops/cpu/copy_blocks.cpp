#include <algorithm>
#include <cstring>

#include "ops/cpu/thread_pool.h"
#include "ops/ops.h"

namespace hybrid::cpu {

void copy_blocks(const CopyBlocks& a) {
  constexpr int64_t piece = 1 << 18;  // bytes: a few large blocks still occupy every thread
  const int64_t size = item_size(a.cache.dtype), block_bytes = a.cache.shape[1] * size;
  const int64_t pieces = (block_bytes + piece - 1) / piece;
  const int32_t *src = a.src.as<const int32_t>(), *dst = a.dst.as<const int32_t>();
  pool().parallel_for(a.src.shape[0] * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / pieces, offset = i % pieces * piece;
      std::memcpy(a.cache.as<char>() + dst[pair] * a.cache.strides[0] * size + offset,
                  a.cache.as<char>() + src[pair] * a.cache.strides[0] * size + offset,
                  static_cast<size_t>(std::min(piece, block_bytes - offset)));
    }
  });
}

}  // namespace hybrid::cpu
