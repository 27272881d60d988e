// Writes new keys and values into the paged cache.
#pragma once

#include "ops/dispatch.h"
#include "ops/ops.h"

namespace hybrid::cpu::HYBRID_ISA {

inline void store_kv(const StoreKv& args) {
  const int64_t block_size = args.k_cache.shape[2];
  by_dtype(args.k.dtype, [&]<class T>() {
    const auto store = [&](const TensorView& cache, const TensorView& x, int64_t row, int64_t slot) {
      for (int64_t head = 0; head < x.shape[1]; ++head)
        for (int64_t i = 0; i < x.shape[2]; ++i)
          cache.as<T>()[slot / block_size * cache.strides[0] + head * cache.strides[1] +
                        slot % block_size * cache.strides[2] + i] =
              x.as<T>()[row * x.strides[0] + head * x.strides[1] + i];
    };
    for (int64_t row = 0; row < args.k.shape[0]; ++row) {
      const int64_t slot = args.slots.as<int64_t>()[row];
      if (slot < 0) continue;
      store(args.k_cache, args.k, row, slot);
      store(args.v_cache, args.v, row, slot);
    }
  });
}

}  // namespace hybrid::cpu::HYBRID_ISA
