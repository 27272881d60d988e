// New keys and values to their slots of the paged cache: copies of one row of one head, dim elements each.
#pragma once

#include "ops/cpu/thread_pool.h"
#include "ops/cpu/vec.h"

namespace hybrid::cpu::HYBRID_ISA {

inline void store_rows(const TensorView& cache, const TensorView& from, int64_t row, int64_t slot) {
  const int64_t heads = cache.shape[1], block_size = cache.shape[2], size = item_size(cache.dtype);
  const int64_t bytes = cache.shape[3] * size;
  char* to = cache.as<char>() + (slot / block_size * cache.strides[0] + slot % block_size * cache.shape[3]) * size;
  const char* p = from.as<const char>() + row * from.strides[0] * size;
  for (int64_t head = 0; head < heads; ++head, to += block_size * bytes, p += from.strides[1] * size)
    std::memcpy(to, p, static_cast<size_t>(bytes));
}

inline void store_kv(const StoreKv& a) {
  const int64_t* slots = a.slots.as<const int64_t>();
  const int64_t row_bytes = 2 * a.k.shape[1] * a.k.shape[2] * item_size(a.k.dtype);
  const int64_t grain = std::max<int64_t>(1, 32768 / row_bytes);  // less does not repay waking a thread
  pool().parallel_for(a.slots.shape[0], grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (slots[row] < 0) continue;
      store_rows(a.k_cache, a.k, row, slots[row]);
      store_rows(a.v_cache, a.v, row, slots[row]);
    }
  });
}

}  // namespace hybrid::cpu::HYBRID_ISA
