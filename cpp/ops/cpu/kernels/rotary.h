// Rotary position embedding, "half" layout: element i of a head turns together with element i + rotary_dim / 2.
#pragma once

#include "ops/cpu/thread_pool.h"
#include "ops/cpu/vec.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

namespace hybrid::cpu::HYBRID_ISA {

template <class T>
void rotate_head(T* x, const float* cos_sin, int64_t half) {
  for (int64_t i = 0; i < half; i += F32::width) {
    const int count = static_cast<int>(std::min<int64_t>(F32::width, half - i));
    const F32 first = F32::load(x + i, count), second = F32::load(x + half + i, count);
    const F32 cosine = F32::load(cos_sin + i, count), sine = F32::load(cos_sin + half + i, count);
    (first * cosine - second * sine).store(x + i, count);
    (second * cosine + first * sine).store(x + half + i, count);
  }
}

template <class T>
void rotate_row(const TensorView& x, int64_t row, const float* cos_sin, int64_t half) {
  for (int64_t head = 0; head < x.shape[1]; ++head)
    rotate_head(x.as<T>() + row * x.strides[0] + head * x.strides[1], cos_sin, half);
}

inline void rotary(const Rotary& args) {
  const int64_t half = args.cos_sin.shape[1] / 2;
  const int64_t work = (args.q.shape[1] + args.k.shape[1]) * args.cos_sin.shape[1] * 2;
  by_dtype(args.q.dtype, [&]<class T>() {
    pool().parallel_for(args.q.shape[0], rows_per_piece(work), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const float* cos_sin = args.cos_sin.as<float>() + args.positions.as<int32_t>()[row] * args.cos_sin.strides[0];
        rotate_row<T>(args.q, row, cos_sin, half);
        rotate_row<T>(args.k, row, cos_sin, half);
      }
    });
  });
}

}  // namespace hybrid::cpu::HYBRID_ISA
