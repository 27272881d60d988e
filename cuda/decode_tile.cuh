// What one warp of paged decode does with one tile of 16 KV tokens: its place in shared memory and its arithmetic.
#pragma once

#include "attention.cuh"

namespace hybrid::cuda {

constexpr int tile = 16, most_rows = 16;  // KV tokens and query heads of one product

// A warp's stages of K and V tiles in shared memory.
template <int dim>
struct DecodeRing {
  static constexpr int packs = tile * row_packs<dim>;  // of K or V of a tile
  static constexpr int stage_packs = 2 * packs;
  static constexpr int depth = std::clamp(26112 / (stage_packs * 16), 2, 5);
  static constexpr int warp_packs = depth * stage_packs;
};

// A warp's running softmax over its tiles of a unit.
template <class T, int dim>
struct WarpState {
  float out[dim / 8][4] = {};
  float largest[2] = {minus_infinity, minus_infinity},
        sum[2] = {0.0f, 0.0f};  // rows g and g + 8; sum: this lane's part

  // Tokens [first, first + 16) at `keys` and `values`, those from `tokens` on are masked.
  __device__ void add_tile(const uint32_t (&q)[dim / 16][4], uint32_t keys, uint32_t values, int first, int tokens,
                           float scale_log2) {
    const int lane = threadIdx.x % warp_size, t = lane % 4;
    float s[2][4] = {};
    const uint32_t key = keys + ((lane / 16 * 8 + lane % 8) * row_packs<dim> + lane / 8 % 2) * 16;
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      uint32_t b[4];
      load_matrices(b, key + k * 32);
      mma<T>(s[0], q[k][0], q[k][1], q[k][2], q[k][3], b[0], b[1]);
      mma<T>(s[1], q[k][0], q[k][1], q[k][2], q[k][3], b[2], b[3]);
    }
    float keep[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float top = largest[row];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[n][row * 2 + j];
          x = first + n * 8 + 2 * t + j < tokens ? x * scale_log2 : minus_infinity;
          top = fmaxf(top, x);
        }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      keep[row] = exp2_of(largest[row] - top);
      largest[row] = top;
      float tile_sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[n][row * 2 + j];
          x = exp2_of(x - top);
          tile_sum += x;
        }
      sum[row] = __fmaf_rn(sum[row], keep[row], tile_sum);
    }
    if (__any_sync(0xffffffffu, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
      for (int d = 0; d < dim / 8; ++d)
#pragma unroll
        for (int j = 0; j < 4; ++j) out[d][j] *= keep[j / 2];
    }
    const uint32_t a0 = pair_of<T>(s[0][0], s[0][1]), a1 = pair_of<T>(s[0][2], s[0][3]),
                   a2 = pair_of<T>(s[1][0], s[1][1]), a3 = pair_of<T>(s[1][2], s[1][3]);
    const uint32_t value = values + ((lane / 8 % 2 * 8 + lane % 8) * row_packs<dim> + lane / 16) * 16;
#pragma unroll
    for (int d = 0; d < dim / 16; ++d) {
      uint32_t b[4];
      load_transposed(b, value + d * 32);
      mma<T>(out[2 * d], a0, a1, a2, a3, b[0], b[1]);
      mma<T>(out[2 * d + 1], a0, a1, a2, a3, b[2], b[3]);
    }
  }

  // To shared memory as [rows][dim] and behind it [rows][largest, sum].
  __device__ void store(float* to, int rows) {
    const int lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const int row = g + half * 8;
      if (row >= rows) continue;
#pragma unroll
      for (int d = 0; d < dim / 8; ++d)
        *reinterpret_cast<float2*>(to + row * dim + d * 8 + 2 * t) =
            make_float2(out[d][half * 2], out[d][half * 2 + 1]);
      if (t == 0) *reinterpret_cast<float2*>(to + rows * dim + row * 2) = make_float2(largest[half], total);
    }
  }
};

}  // namespace hybrid::cuda
