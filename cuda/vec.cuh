// Pack: 16 bytes of T as one memory transaction, computed on as floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/check.h"
#include "ops/float16.h"
#include "ops/tensor.h"

namespace hybrid::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
  BFloat16 r;
  r.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
  return r;
}
template <>
__device__ inline Float16 from_float<Float16>(float x) {
  Float16 r;
  r.bits = __half_as_ushort(__float2half_rn(x));
  return r;
}

template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  uint32_t words[4];

  __device__ static Pack load(const T* p) { return *reinterpret_cast<const Pack*>(p); }
  __device__ void store(T* p) const { *reinterpret_cast<Pack*>(p) = *this; }
  __device__ void widen(float (&to)[size]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        to[i] = __uint_as_float(words[i]);
      } else if constexpr (std::is_same_v<T, BFloat16>) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      } else {
        const float2 two = __half22float2(reinterpret_cast<const __half2&>(words[i]));
        to[2 * i] = two.x, to[2 * i + 1] = two.y;
      }
    }
  }
  // Rounds to nearest even, two values an instruction.
  __device__ static Pack narrow(const float (&from)[size]) {
    Pack r;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, float>)
        r.words[i] = __float_as_uint(from[i]);
      else if constexpr (std::is_same_v<T, BFloat16>)
        reinterpret_cast<__nv_bfloat162&>(r.words[i]) = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
      else
        reinterpret_cast<__half2&>(r.words[i]) = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
    }
    return r;
  }
};

// Packs fit every row of `t`: its address and its strides are multiples of 16 bytes.
inline void require_packs(const char* op, const TensorView& t) {
  require(reinterpret_cast<uintptr_t>(t.data) % 16 == 0, op, ": a tensor at address ", t.data,
          " is not aligned to 16 bytes");
  for (int i = 0; i + 1 < t.ndim; ++i)
    require(t.strides[i] * item_size(t.dtype) % 16 == 0 || t.shape[i] == 1, op, ": a stride of ", t.strides[i], " x ",
            item_size(t.dtype), " bytes is not a multiple of 16 bytes");
}

}  // namespace hybrid::cuda
