// silu(gate) * up of the gated feed-forward, elementwise.
#pragma once

#include "ops/cpu/thread_pool.h"
#include "ops/cpu/vec.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

namespace hybrid::cpu::HYBRID_ISA {

inline F32 silu(F32 x) { return x / (F32(1.0f) + exp(F32(0.0f) - x)); }

template <class T>
void silu_mul_row(T* out, const T* gate, const T* up, int64_t dim) {
  int64_t i = 0;
  for (; i + F32::width <= dim; i += F32::width) (silu(F32::load(gate + i)) * F32::load(up + i)).store(out + i);
  if (const int tail = static_cast<int>(dim - i); tail > 0)
    (silu(F32::load(gate + i, tail)) * F32::load(up + i, tail)).store(out + i, tail);
}

inline void silu_mul(const SiluMul& args) {
  const int64_t dim = args.out.shape[1];
  by_dtype(args.out.dtype, [&]<class T>() {
    pool().parallel_for(args.out.shape[0], rows_per_piece(dim * 4), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = args.x.as<T>() + row * args.x.strides[0];
        silu_mul_row(args.out.as<T>() + row * args.out.strides[0], x, x + dim, dim);
      }
    });
  });
}

}  // namespace hybrid::cpu::HYBRID_ISA
