// What the kernels of `paged_attention` share: parameters, the softmax in base 2, and merging of partial results.
#pragma once

#include "launch.cuh"
#include "mma.cuh"
#include "ops/ops.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace hybrid::cuda {

template <class T, class C = T>
struct AttentionParams {
  T* __restrict__ out;
  const T* __restrict__ q;
  const C* __restrict__ k_cache;
  const C* __restrict__ v_cache;
  const int32_t* __restrict__ query_start;
  const int32_t* __restrict__ seq_lens;
  const int32_t* __restrict__ kv_start;
  const int32_t* __restrict__ kv_blocks;
  int64_t out_row, out_head, q_row, q_head;  // strides in elements
  int64_t k_block, k_head, v_block, v_head;  // a head's tokens are contiguous
  const int64_t* __restrict__ num_decodes;   // or null: no decodes
  int64_t rows;                              // of q
  int seqs;
  int kv_heads, group, dim, block_shift;  // group: query heads of a KV head; 2^block_shift tokens a block
  float scale_log2;                       // scale x k_scale / ln 2: softmax is in base 2
  float v_scale;
  int32_t* __restrict__ counter;  // prefill on sm_90 only: shares of the work taken
  int32_t* plan;                  // decode only: of plan_decode
  int share_rows;                 // of prefixes: packed rows of the plan's shares
  float* prefixes;                // of decodes that share a beginning: what its tokens sum to (decode_plan.cuh)
};

constexpr float minus_infinity = -__builtin_huge_valf();

// 2^x to about 2 units in the last place; 0 for minus infinity.
__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Softmax over a set of tokens, not yet normalised: largest score, sum of 2^(score - largest), and one output element
// weighted alike.
struct Partial {
  float largest, sum, out;
};

// The one way to add two, in this order of arguments: the bits of a result do not depend on who merged it where.
__device__ inline Partial merge(const Partial& a, const Partial& b) {
  const float largest = fmaxf(a.largest, b.largest);
  const float keep_a = exp2_of(a.largest - largest), keep_b = exp2_of(b.largest - largest);
  return {largest, __fmaf_rn(a.sum, keep_a, __fmul_rn(b.sum, keep_b)),
          __fmaf_rn(a.out, keep_a, __fmul_rn(b.out, keep_b))};
}

// The last of `count` ascending values value(i) that is not above x, by one warp; value(0) <= x.
template <class Value>
__device__ inline int last_not_above(int64_t x, int count, Value&& value) {
  const int lane = threadIdx.x % warp_size;
  int found = 0;
  for (int i = 0; i < count; i += warp_size) {
    const int below = __popc(__ballot_sync(0xffffffffu, i + lane < count && value(i + lane) <= x));
    found += below;
    if (below < warp_size) break;
  }
  return found - 1;
}

// A tile of rows of `dim` elements in shared memory: an odd number of 16-byte packs a row keeps ldmatrix free of bank
// conflicts.
template <int dim>
constexpr int row_packs = dim / 8 | 1;

template <class T, class C>
void paged_decode(AttentionParams<T, C> p, int64_t max_decodes, bool shares_prefixes, Stream stream);
template <class T, class C>
void paged_prefill(const AttentionParams<T, C>& p, Stream stream);
// What the beginnings that decodes share sum to, by p.plan, to p.prefixes.
template <class T, class C>
void paged_prefixes(const AttentionParams<T, C>& p, Stream stream);

// body.template operator()<dim>() for the head sizes with kernels.
template <class Body>
void by_head_dim(int dim, Body&& body) {
  switch (dim) {
    case 64:
      return body.template operator()<64>();
    case 80:
      return body.template operator()<80>();
    case 96:
      return body.template operator()<96>();
    case 128:
      return body.template operator()<128>();
    case 256:
      return body.template operator()<256>();
    default:
      require(false, "paged_attention: no CUDA kernel for head size ", dim, ", only 64, 80, 96, 128 and 256");
  }
}

}  // namespace hybrid::cuda
