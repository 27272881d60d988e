#include <cstring>

#include "ops/ops.h"

namespace hybrid::cpu {

void copy_blocks(const CopyBlocks& args) {
  const int64_t bytes = args.cache.shape[1] * item_size(args.cache.dtype);
  const int64_t stride = args.cache.strides[0] * item_size(args.cache.dtype);
  for (int64_t i = 0; i < args.src.shape[0]; ++i)
    std::memcpy(args.cache.as<char>() + args.dst.as<int32_t>()[i] * stride,
                args.cache.as<char>() + args.src.as<int32_t>()[i] * stride, static_cast<size_t>(bytes));
}

}  // namespace hybrid::cpu
