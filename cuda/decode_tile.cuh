// What one warp of paged decode does with one tile of 16 KV tokens: its place in shared memory and its arithmetic.
#pragma once

#include "attention.cuh"
#include "decode_plan.cuh"

namespace hybrid::cuda {

// A tile of K or V in shared memory, in packs of 16 bytes. ldmatrix reads 8 rows at one column without bank conflicts:
// where a row is a multiple of 128 bytes, columns are permuted within them; else rows have an odd number of packs.
template <int dim>
struct TileLayout {
  static constexpr bool permuted = dim % 64 == 0;
  static constexpr int row_packs = permuted ? dim / 8 : dim / 8 | 1;
  static constexpr int packs = tile * row_packs;
  __device__ static int pack(int row, int column) {
    return row * row_packs + (permuted ? column ^ (row & 7) : column);
  }
  // From the address of pack(row, column) to that of pack(row, column + 2 * steps); `column` is 0 or 1. A tile's rows
  // start at multiples of their size.
  __device__ static uint32_t step(uint32_t address, int steps) {
    return permuted ? address ^ (steps * 32) : address + steps * 32;
  }
};

// A warp's ring of K and V tiles.
template <int dim>
struct DecodeRing {
  static constexpr int stage_packs = 2 * TileLayout<dim>::packs;
  static constexpr int depth = std::clamp(24576 / (stage_packs * 16), 2, 6);
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
    using Layout = TileLayout<dim>;
    const int lane = threadIdx.x % warp_size, t = lane % 4;
    float s[2][4] = {};
    const uint32_t key = keys + Layout::pack(lane / 16 * 8 + lane % 8, lane / 8 % 2) * 16;
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      uint32_t b[4];
      load_matrices(b, Layout::step(key, k));
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
    const uint32_t value = values + Layout::pack(lane / 8 % 2 * 8 + lane % 8, lane / 16) * 16;
#pragma unroll
    for (int d = 0; d < dim / 16; ++d) {
      uint32_t b[4];
      load_transposed(b, Layout::step(value, d));
      mma<T>(out[2 * d], a0, a1, a2, a3, b[0], b[1]);
      mma<T>(out[2 * d + 1], a0, a1, a2, a3, b[2], b[3]);
    }
  }

  // To shared memory: rows of `row_floats`, dim sums and then largest score and sum of weights.
  static constexpr int row_floats = dim + 8;  // 8 more: no bank conflicts
  __device__ void store(float* to, int rows) {
    const int lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      if (g + half * 8 >= rows) continue;
      float* row = to + (g + half * 8) * row_floats;
#pragma unroll
      for (int d = 0; d < dim / 8; ++d)
        *reinterpret_cast<float2*>(row + d * 8 + 2 * t) = make_float2(out[d][half * 2], out[d][half * 2 + 1]);
      if (t == 0) *reinterpret_cast<float2*>(row + dim) = make_float2(largest[half], total);
    }
  }
};

}  // namespace hybrid::cuda
