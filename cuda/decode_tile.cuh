// What one warp of paged decode does with its share of the KV tokens: its place in shared memory and its arithmetic.
#pragma once

#include "attention.cuh"
#include "cache_element.cuh"
#include "decode_plan.cuh"

namespace hybrid::cuda {

constexpr int decode_warps = 4;

// Sizes for heads of `dim` elements of C in the cache and up to `rows` query heads a KV head. A warp loads and computes
// on `step` tokens at a time; its ring holds `depth` steps, as many as fit.
template <class C, int dim, int rows>
struct DecodeShape {
  static constexpr int row_bytes = dim * sizeof(C), head_packs = row_bytes / 16;
  static constexpr int tiles = row_bytes <= 128 ? 2 : 1, step = tiles * tile;
  // K or V of a step in packs of 16 bytes. ldmatrix reads 8 rows at one column without bank conflicts: where a row is a
  // multiple of 128 bytes, columns are permuted within them; else rows have an odd number of packs.
  static constexpr bool permuted = row_bytes % 128 == 0;
  static constexpr int row_packs = permuted ? head_packs : head_packs | 1;
  static constexpr int packs = step * row_packs, stage_packs = 2 * packs;
  // What a warp sums to: rows of dim sums, then largest score and sum of weights. 4 more: no bank conflicts.
  static constexpr int row_floats = dim + 4, sums_bytes = rows * row_floats * 4;

  static constexpr int block_bytes = 228 * 1024 / decode_blocks_per_multiprocessor(dim) - 1024;
  static constexpr int depth =
      std::clamp((block_bytes - 16 - decode_warps * sums_bytes) / decode_warps / (stage_packs * 16), 2, 6);
  static constexpr int ring_packs = depth * stage_packs;  // of a warp
  static constexpr size_t shared_bytes = size_t{decode_warps} * (ring_packs * 16 + sums_bytes) + 16;

  __device__ static int pack(int row, int column) { return row * row_packs + (permuted ? column ^ (row & 7) : column); }
  // From the address of pack(row, column) to that of pack(row, column + 2 * pairs); `column` is 0 or 1. Rows start at
  // multiples of their size.
  __device__ static uint32_t columns_on(uint32_t address, int pairs) {
    return permuted ? address ^ (pairs * 32) : address + pairs * 32;
  }
};

// The transpose of an 8 x 8 matrix of 16-bit elements, a row's pair a lane.
__device__ inline uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// A warp's running softmax over its tokens of a unit. Tokens are the rows of the products and query heads, 8 at a time,
// their columns: lane 4 g + t has heads 2t and 2t + 1 of each eight, of tokens (or dims, see Element) g and g + 8.
template <class C, int dim, int rows>
struct WarpState {
  using Shape = DecodeShape<C, dim, rows>;
  using Element = CacheElement<C>;
  using Math = typename Element::Math;
  static constexpr int eights = rows / 8, tiles = Shape::tiles, slices = Element::slices;
  using Query = uint32_t[eights][dim / 16][2];

  float out[eights][dim / 16][4] = {};
  float largest[eights][2], sum[eights][2] = {};  // sum: this lane's part

  __device__ WarpState() {
#pragma unroll
    for (int e = 0; e < eights; ++e) largest[e][0] = largest[e][1] = minus_infinity;
  }

  // Tokens [first, first + step) at `keys` and `values`, those from `tokens` on are masked.
  __device__ void add(const Query& q, uint32_t keys, uint32_t values, int first, int tokens, float scale_log2) {
    const int lane = threadIdx.x % warp_size;
    float s[tiles][eights][4] = {};
    const uint32_t key = keys + Shape::pack(lane % 16, lane / 16) * 16;
#pragma unroll
    for (int k = 0; k < dim / 16; k += slices)
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        uint32_t a[slices][4];
        load_keys<C>(a, Shape::columns_on(key + i * tile * Shape::row_packs * 16, k / slices), k + slices <= dim / 16);
#pragma unroll
        for (int j = k; j < std::min(k + slices, dim / 16); ++j)
#pragma unroll
          for (int e = 0; e < eights; ++e)
            mma<Math>(s[i][e], a[j - k][0], a[j - k][1], a[j - k][2], a[j - k][3], q[e][j][0], q[e][j][1]);
      }
    if (first + Shape::step > tokens) {
#pragma unroll
      for (int i = 0; i < tiles; ++i)
#pragma unroll
        for (int e = 0; e < eights; ++e)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (first + i * tile + j / 2 * 8 + lane / 4 >= tokens) s[i][e][j] = minus_infinity;
    }
#pragma unroll
    for (int e = 0; e < eights; ++e) weigh(e, s, scale_log2);
    uint32_t p[tiles][eights][2];
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int e = 0; e < eights; ++e) {
        p[i][e][0] = transposed(pair_of<Math>(s[i][e][0], s[i][e][1]));
        p[i][e][1] = transposed(pair_of<Math>(s[i][e][2], s[i][e][3]));
      }
    const uint32_t value = values + Shape::pack(Element::crossed_row(lane), Element::crossed_pack(lane)) * 16;
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
      for (int d = 0; d < dim / 16; d += slices) {
        uint32_t a[slices][4];
        load_values<C>(a, Shape::columns_on(value + i * tile * Shape::row_packs * 16, d / slices),
                       d + slices <= dim / 16);
#pragma unroll
        for (int j = d; j < std::min(d + slices, dim / 16); ++j)
#pragma unroll
          for (int e = 0; e < eights; ++e)
            mma<Math>(out[e][j], a[j - d][0], a[j - d][1], a[j - d][2], a[j - d][3], p[i][e][0], p[i][e][1]);
      }
  }

  // For the first `heads` heads; see Shape::row_floats.
  __device__ void store(float* to, int heads) const {
    const int lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int e = 0; e < eights; ++e)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float total = sum[e][j];
#pragma unroll
        for (int step = 4; step < warp_size; step *= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
        const int head = e * 8 + 2 * t + j;
        if (head >= heads) continue;
        float* row = to + head * Shape::row_floats;
#pragma unroll
        for (int d = 0; d < dim / 16; ++d)
#pragma unroll
          for (int half = 0; half < 2; ++half) row[d * 16 + Element::sum_dim(g, half)] = out[e][d][j + 2 * half];
        if (g == 0) *reinterpret_cast<float2*>(row + dim) = make_float2(largest[e][j], total);
      }
  }

 private:
  // Scores of eight heads to weights; what was summed so far is scaled down to the new largest score.
  __device__ void weigh(int e, float (&s)[tiles][eights][4], float scale_log2) {
    float keep[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float top = fmaxf(s[0][e][j], s[0][e][j + 2]);
#pragma unroll
      for (int i = 1; i < tiles; ++i) top = fmaxf(top, fmaxf(s[i][e][j], s[i][e][j + 2]));
#pragma unroll
      for (int step = 4; step < warp_size; step *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
      top = fmaxf(largest[e][j], top * scale_log2);
      keep[j] = exp2_of(largest[e][j] - top);
      largest[e][j] = top;
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < tiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = s[i][e][j + half * 2];
          x = exp2_of(__fmaf_rn(x, scale_log2, -top));
          total += x;
        }
      sum[e][j] = __fmaf_rn(sum[e][j], keep[j], total);
    }
    if (__any_sync(0xffffffffu, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
      for (int d = 0; d < dim / 16; ++d)
#pragma unroll
        for (int j = 0; j < 4; ++j) out[e][d][j] *= keep[j % 2];
    }
  }
};

}  // namespace hybrid::cuda
