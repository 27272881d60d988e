// Root-mean-square norm of rows, with the residual addition that precedes it in a transformer block.
#pragma once

#include "ops/cpu/thread_pool.h"
#include "ops/cpu/vec.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

namespace hybrid::cpu::HYBRID_ISA {

// sum = residual + x; the norm is taken of what was stored, so that it equals a norm of the sum read back later.
template <class R, class T>
void add_row(R* sum, const R* residual, const T* x, int64_t dim) {
  int64_t i = 0;
  for (; i + F32::width <= dim; i += F32::width) (F32::load(residual + i) + F32::load(x + i)).store(sum + i);
  if (const int tail = static_cast<int>(dim - i); tail > 0)
    (F32::load(residual + i, tail) + F32::load(x + i, tail)).store(sum + i, tail);
}

template <class T>
float sum_of_squares(const T* x, int64_t dim) {
  F32 sum[4] = {F32(0.0f), F32(0.0f), F32(0.0f), F32(0.0f)};
  int64_t i = 0;
  for (; i + 4 * F32::width <= dim; i += 4 * F32::width)
    for (int j = 0; j < 4; ++j) {
      const F32 value = F32::load(x + i + j * F32::width);
      sum[j] = fma(value, value, sum[j]);
    }
  for (; i < dim; i += F32::width) {
    const F32 value = F32::load(x + i, static_cast<int>(std::min<int64_t>(F32::width, dim - i)));
    sum[0] = fma(value, value, sum[0]);
  }
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
}

template <class T, class X>
void scale_row(T* out, const X* x, const T* weight, float scale, int64_t dim) {
  const F32 factor(scale);
  int64_t i = 0;
  for (; i + F32::width <= dim; i += F32::width) (F32::load(x + i) * factor * F32::load(weight + i)).store(out + i);
  if (const int tail = static_cast<int>(dim - i); tail > 0)
    (F32::load(x + i, tail) * factor * F32::load(weight + i, tail)).store(out + i, tail);
}

// `out` may be `x`.
template <class T, class X>
void norm_row(T* out, const X* x, const T* weight, int64_t dim, float eps) {
  const float mean = sum_of_squares(x, dim) / static_cast<float>(dim);
  scale_row(out, x, weight, 1.0f / std::sqrt(mean + eps), dim);
}

template <class T, class R>
void add_and_norm_row(const RmsNorm& args, int64_t row, T* out, const T* x) {
  const int64_t dim = args.x.shape[1];
  const TensorView& to = args.sum.defined() ? args.sum : args.residual;
  R* const sum = to.as<R>() + row * to.strides[0];
  const R* residual = args.residual.as<R>() + row * args.residual.strides[0];
  if (args.begins_residual) std::fill_n(sum, dim, R{}), residual = sum;
  add_row(sum, residual, x, dim);
  norm_row(out, sum, args.weight.as<T>(), dim, args.eps);
}

inline void rms_norm(const RmsNorm& args) {
  by_dtype(args.x.dtype, [&]<class T>() {
    pool().parallel_for(args.x.shape[0], rows_per_piece(args.x.shape[1]), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = args.x.as<T>() + row * args.x.strides[0];
        T* out = args.out.as<T>() + row * args.out.strides[0];
        if (!args.residual.defined())
          norm_row(out, x, args.weight.as<T>(), args.x.shape[1], args.eps);
        else if (args.residual.dtype == DType::f32)
          add_and_norm_row<T, float>(args, row, out, x);
        else
          add_and_norm_row<T, T>(args, row, out, x);
      }
    });
  });
}

}  // namespace hybrid::cpu::HYBRID_ISA
