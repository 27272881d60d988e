// x @ weight^T over a packed weight.
#pragma once

#include "ops/cpu/packed.h"
#include "ops/cpu/thread_pool.h"
#include "ops/cpu/vec.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

namespace hybrid::cpu::HYBRID_ISA {

template <class T>
float linear_element(const T* x, const T* panel, int64_t column, int64_t k) {
  float sum = 0.0f;
  for (int64_t i = 0; i < k; ++i)
    sum += static_cast<float>(x[i]) * static_cast<float>(panel[packed_offset<T>(column, i)]);
  return sum;
}

inline void linear(const Linear& args) {
  const int64_t panel_size = panel_columns * padded_k(args.k), rows = args.out.shape[0];
  by_dtype(args.x.dtype, [&]<class T>() {
    pool().parallel_for(args.n, 32, [&](int64_t begin, int64_t end) {
      for (int64_t column = begin; column < end; ++column)
        for (int64_t row = 0; row < rows; ++row) {
          const T* panel = args.weight.as<T>() + column / panel_columns * panel_size;
          const T* x = args.x.as<T>() + row * args.x.strides[0];
          float sum = linear_element(x, panel, column % panel_columns, args.k);
          if (args.bias.defined()) sum += static_cast<float>(args.bias.as<T>()[column]);
          const int64_t at = row * args.out.strides[0] + column;
          if (args.out.dtype == DType::f32)
            args.out.as<float>()[at] = sum;
          else
            args.out.as<T>()[at] = static_cast<T>(sum);
        }
    });
  });
}

}  // namespace hybrid::cpu::HYBRID_ISA
