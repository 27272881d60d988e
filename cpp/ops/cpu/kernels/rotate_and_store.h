// What lies between the product that yields q, k and v and attention, row by row: head norm, rotary embedding, cache.
//
// A key is copied or normed straight into its slot and rotated there; every step stores T, as if it were alone. Where
// the cache's type C is another, the slot is a row of T beside it, and what is in it then goes to the cache.
#pragma once

#include "ops/cpu/kernels/rms_norm.h"
#include "ops/cpu/scratch.h"
#include "ops/cpu/thread_pool.h"
#include "ops/cpu/vec.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

namespace hybrid::cpu::HYBRID_ISA {

// "half" layout: element i of a head turns together with element i + half.
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
const T* head_of(const TensorView& x, int64_t row, int64_t head) {
  return x.as<const T>() + row * x.strides[0] + head * x.strides[1];
}

// The slot's place in the first head of its block; the next heads follow at cache.strides[1].
template <class T>
T* slot_of(const TensorView& cache, int64_t slot) {
  const int64_t block_size = cache.shape[2];
  return cache.as<T>() + slot / block_size * cache.strides[0] + slot % block_size * cache.strides[2];
}

template <class T>
void rotate_query(const RotateAndStore& a, int64_t row, const float* cos_sin) {
  for (int64_t head = 0; head < a.q.shape[1]; ++head) {
    T* q = a.q.as<T>() + row * a.q.strides[0] + head * a.q.strides[1];
    if (a.q_weight.defined()) norm_row(q, q, a.q_weight.as<const T>(), a.q.shape[2], a.eps);
    rotate_head(q, cos_sin, a.cos_sin.shape[1] / 2);
  }
}

// to = x / scale
template <class T, class C>
void store_scaled(const T* x, C* to, int64_t dim, float scale) {
  const F32 factor(1.0f / scale);
  for (int64_t i = 0; i < dim; i += F32::width) {
    const int count = static_cast<int>(std::min<int64_t>(F32::width, dim - i));
    (F32::load(x + i, count) * factor).store(to + i, count);
  }
}

template <class T>
void write_key(const RotateAndStore& a, int64_t row, int64_t head, const float* cos_sin, T* k) {
  const int64_t dim = a.k.shape[2];
  if (a.k_weight.defined())
    norm_row(k, head_of<T>(a.k, row, head), a.k_weight.as<const T>(), dim, a.eps);
  else
    std::copy_n(head_of<T>(a.k, row, head), dim, k);
  rotate_head(k, cos_sin, a.cos_sin.shape[1] / 2);
}

template <class T, class C>
void store_key_and_value(const RotateAndStore& a, int64_t row, int64_t slot, const float* cos_sin) {
  const int64_t dim = a.k.shape[2];
  for (int64_t head = 0; head < a.k.shape[1]; ++head) {
    C *k = slot_of<C>(a.k_cache, slot) + head * a.k_cache.strides[1],
      *v = slot_of<C>(a.v_cache, slot) + head * a.v_cache.strides[1];
    if constexpr (std::is_same_v<T, C>) {
      write_key(a, row, head, cos_sin, k);
      std::copy_n(head_of<T>(a.v, row, head), dim, v);
    } else {
      T* key = static_cast<T*>(scratch(dim * static_cast<int64_t>(sizeof(T))));
      write_key(a, row, head, cos_sin, key);
      store_scaled(key, k, dim, a.k_scale);
      store_scaled(head_of<T>(a.v, row, head), v, dim, a.v_scale);
    }
  }
}

inline void rotate_and_store(const RotateAndStore& a) {
  const int64_t work = (a.q.shape[1] + 2 * a.k.shape[1]) * a.q.shape[2] * 2;
  by_cache_dtype(a.q.dtype, a.k_cache.dtype, [&]<class T, class C>() {
    pool().parallel_for(a.q.shape[0], rows_per_piece(work), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const float* cos_sin = a.cos_sin.as<float>() + a.positions.as<int32_t>()[row] * a.cos_sin.strides[0];
        rotate_query<T>(a, row, cos_sin);
        const int64_t slot = a.slots.as<int64_t>()[row];
        if (slot >= 0) store_key_and_value<T, C>(a, row, slot, cos_sin);
      }
    });
  });
}

}  // namespace hybrid::cpu::HYBRID_ISA
