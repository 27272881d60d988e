// How elements of the KV cache, of type C, become operands of products. 16-bit ones are; a Float8 becomes a Float16,
// which holds every one of them and has an instruction for it from sm_89 on. Queries and weights of such products are
// Float16 as well: more exact than bf16 up to 65504.
//
// ldmatrix moves units of 16 bits, which are two neighbours of Float8: a lane gets four of a key row where it gets two
// of 16 bits, and two dims of two tokens each where values are transposed. Which dim stands where in a product is free
// as long as the other operand, or who reads the result, goes by it:
//   keys     lane t has dims 4t .. 4t + 3 of 16: the first two as columns 2t, 2t + 1, the others as 2t + 8, 2t + 9
//   values   row g of 16 is dim 2g, row g + 8 dim 2g + 1
#pragma once

#include "mma.cuh"
#include "ops/float8.h"

namespace hybrid::cuda {

template <class C>
struct CacheElement {
  using Math = C;  // what products are of
  static constexpr int per_pack = 8;
  static constexpr int slices = 1;  // of 16 elements in two packs of 16 bytes: one load, and so many products
  // Of 16 dims: where pair `pair` of lane t begins in a query, and which one row (or column) g + 8 half of a sum is.
  __device__ static constexpr int query_dim(int t, int pair) { return 2 * t + 8 * pair; }
  __device__ static constexpr int sum_dim(int g, int half) { return g + 8 * half; }
  // The row and the pack that a lane names for load_values() and load_keys_second(); for others lane % 16, lane / 16.
  __device__ static constexpr int crossed_row(int lane) { return lane / 16 * 8 + lane % 8; }
  __device__ static constexpr int crossed_pack(int lane) { return lane / 8 % 2; }
};
template <>
struct CacheElement<Float8> {
  using Math = Float16;
  static constexpr int per_pack = 16;
  static constexpr int slices = 2;
  __device__ static constexpr int query_dim(int t, int pair) { return 4 * t + 2 * pair; }
  __device__ static constexpr int sum_dim(int g, int half) { return 2 * g + half; }
  __device__ static constexpr int crossed_row(int lane) { return lane % 16; }
  __device__ static constexpr int crossed_pack(int lane) { return lane / 16; }
};

// The two Float8 in the low half of x as two Float16.
__device__ inline uint32_t widened(uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(x)));
  return pair;
#else
  // Exponent and mantissa are those of an f16 that is 2^8 times smaller.
  const uint32_t spread = __byte_perm(x, 0, 0x1404), magnitude = spread & 0x7f007f00u;
  const uint32_t nan = __vcmpeq2(magnitude, 0x7f007f00u) & 0x7fff7fffu;
  const uint32_t small = magnitude >> 1 | (spread & 0x80008000u) | nan;
  const __half2 pair = __hmul2(reinterpret_cast<const __half2&>(small), __float2half2_rn(256.0f));
  return reinterpret_cast<const uint32_t&>(pair);
#endif
}
// The same as two of T.
template <class T>
__device__ inline uint32_t widened_to(uint32_t x) {
  const uint32_t pair = widened(x);
  if constexpr (std::is_same_v<T, Float16>) return pair;
  const float2 two = __half22float2(reinterpret_cast<const __half2&>(pair));
  return pair_of<T>(two.x, two.y);
}
__device__ inline float to_float(Float8 x) {
  const uint32_t pair = widened(x.bits);
  return __low2float(reinterpret_cast<const __half2&>(pair));
}
// A pair of queries of T as a pair of M.
template <class T, class M>
__device__ inline uint32_t query_pair(uint32_t pair) {
  if constexpr (std::is_same_v<T, M>)
    return pair;
  else  // of bf16
    return pair_of<M>(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Two floats as two Float8, the first in the low byte: as Float8(float).
__device__ inline uint32_t narrowed(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  const auto bits = [](float x) {
    const uint32_t u = __float_as_uint(x), magnitude = u & 0x7fffffffu, sign = u >> 24 & 0x80u;
    if (magnitude > 0x7f800000u) return 0x7fu;
    if (magnitude >= 0x43e00000u) return sign | 0x7eu;
    if (magnitude < 0x3c800000u) return sign | (__float_as_uint(__fadd_rn(fabsf(x), 0x1p14f)) & 0xfu);
    return sign | (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  };
  return bits(low) | bits(high) << 8;
#endif
}

// Keys of 16 tokens, of as many slices of dims as two packs have (or of the first pack only, unless `both`), as the
// first operand of a product: tokens are its rows.
template <class C>
__device__ inline void load_keys(uint32_t (&a)[CacheElement<C>::slices][4], uint32_t address, bool both) {
  if constexpr (CacheElement<C>::slices == 1) {
    load_matrices(a[0], address);
  } else {
    uint32_t x[4] = {};
    both ? load_matrices(x, address) : load_two_matrices(x, address);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      a[s][0] = widened(x[2 * s]), a[s][2] = widened(x[2 * s] >> 16);
      a[s][1] = widened(x[2 * s + 1]), a[s][3] = widened(x[2 * s + 1] >> 16);
    }
  }
}
// The same of values: dims are the rows.
template <class C>
__device__ inline void load_values(uint32_t (&a)[CacheElement<C>::slices][4], uint32_t address, bool both) {
  if constexpr (CacheElement<C>::slices == 1) {
    load_transposed(a[0], address);
  } else {
    uint32_t x[4] = {};
    both ? load_transposed(x, address) : load_two_transposed(x, address);
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Dims 2g and 2g + 1 of token 2t, then of token 2t + 1.
        const uint32_t by_dim = __byte_perm(x[2 * s + half], 0, 0x3120);
        a[s][2 * half] = widened(by_dim), a[s][2 * half + 1] = widened(by_dim >> 16);
      }
  }
}

template <int slices>
__device__ inline void swap_middles(uint32_t (&x)[slices][4]) {
#pragma unroll
  for (int s = 0; s < slices; ++s) {
    const uint32_t second = x[s][1];
    x[s][1] = x[s][2], x[s][2] = second;
  }
}
// As the second operands of two products: [0] and [1] are the first eight tokens (or dims, see sum_dim()), [2] and [3]
// the others. 16-bit ones are loaded in this order, as a product takes neighbouring registers.
template <class C>
__device__ inline void load_keys_second(uint32_t (&b)[CacheElement<C>::slices][4], uint32_t address, bool both) {
  if constexpr (CacheElement<C>::slices == 1)
    load_matrices(b[0], address);
  else
    load_keys<C>(b, address, both), swap_middles(b);
}
template <class C>
__device__ inline void load_values_second(uint32_t (&b)[CacheElement<C>::slices][4], uint32_t address, bool both) {
  if constexpr (CacheElement<C>::slices == 1)
    load_transposed(b[0], address);
  else
    load_values<C>(b, address, both), swap_middles(b);
}

}  // namespace hybrid::cuda
