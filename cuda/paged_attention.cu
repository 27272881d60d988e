// paged_attention: which kernel takes which sequences, and the plain kernel for float.
//
// 16-bit types: sequences with one query row go to paged_decode.cuh, the others to paged_prefill.cu. Each is
// batch-invariant on its own; the same row computed by both agrees to rounding, not to the bit.
#include <bit>

#include "attention.cuh"
#include "cache_element.cuh"
#include "ops/dispatch.h"

namespace hybrid::cuda {

namespace {

constexpr int warps = 4, most_dim = 256;

// A block a (query row, head): warp w takes tiles w, w + 4, ... of 32 tokens, a lane a token for the scores and every
// 32nd column for the sums. For correctness, not for speed.
template <class C>
__global__ void float_attention_kernel(const __grid_constant__ AttentionParams<float, C> p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  __shared__ float query[most_dim], sums[warps][most_dim], states[warps][2];
  const int dim = p.dim, row = blockIdx.x, head = blockIdx.y, lane = threadIdx.x % warp_size,
            warp = threadIdx.x / warp_size;
  const int seq = last_not_above(row, p.seqs, [&](int s) { return s == 0 ? 0 : p.query_start[s]; });
  if (row < p.query_start[seq] || row >= p.query_start[seq + 1]) return;
  const int visible = p.seq_lens[seq] - (p.query_start[seq + 1] - 1 - row);
  for (int d = threadIdx.x; d < dim; d += warps * warp_size)
    query[d] = p.q[row * p.q_row + head * p.q_head + d] * p.scale_log2;
  __syncthreads();

  const int32_t* blocks = p.kv_blocks + p.kv_start[seq];
  const int kv_head = head / p.group;
  float out[most_dim / warp_size] = {}, largest = minus_infinity, sum = 0.0f;
  for (int first = warp * warp_size; first < visible; first += warps * warp_size) {
    const int token = first + lane, tokens = min(warp_size, visible - first);
    const int64_t block = token < visible ? blocks[token >> p.block_shift] : 0;
    const int64_t offset = int64_t{token & ((1 << p.block_shift) - 1)} * dim;
    float score = minus_infinity;
    if (token < visible) {
      const C* key = p.k_cache + block * p.k_block + kv_head * p.k_head + offset;
      score = 0.0f;
      for (int d = 0; d < dim; ++d) score = fmaf(query[d], to_float(key[d]), score);
    }
    const float top = fmaxf(largest, warp_max(score)), keep = exp2_of(largest - top), weight = exp2_of(score - top);
    largest = top;
    sum = fmaf(sum, keep, warp_sum(weight));
    const int64_t value = block * p.v_block + kv_head * p.v_head + offset;
#pragma unroll
    for (int i = 0; i < most_dim / warp_size; ++i) out[i] *= keep;
    for (int t = 0; t < tokens; ++t) {
      const float w = __shfl_sync(0xffffffffu, weight, t);
      const C* from = p.v_cache + __shfl_sync(0xffffffffu, value, t);
#pragma unroll
      for (int i = 0; i < most_dim / warp_size; ++i)
        if (i * warp_size + lane < dim) out[i] = fmaf(w, to_float(from[i * warp_size + lane]), out[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < most_dim / warp_size; ++i)
    if (i * warp_size + lane < dim) sums[warp][i * warp_size + lane] = out[i];
  if (lane == 0) states[warp][0] = largest, states[warp][1] = sum;
  __syncthreads();
  for (int d = threadIdx.x; d < dim; d += warps * warp_size) {
    Partial total{states[0][0], states[0][1], sums[0][d]};
    for (int w = 1; w < warps; ++w) total = merge(total, {states[w][0], states[w][1], sums[w][d]});
    p.out[row * p.out_row + head * p.out_head + d] = total.out / total.sum * p.v_scale;
  }
}

template <class T, class C>
AttentionParams<T, C> params_of(const PagedAttention& a) {
  const int64_t block_size = a.k_cache.shape[2], dim = a.q.shape[2];
  require(block_size >= 16 && std::has_single_bit(static_cast<uint64_t>(block_size)), "paged_attention: block size ",
          block_size, ", expected a power of two of at least 16");
  for (const TensorView* t : {&a.q, &a.out, &a.k_cache, &a.v_cache})
    for (int i = 0; i + 1 < t->ndim; ++i)
      require(t->strides[i] * item_size(t->dtype) % 16 == 0 && reinterpret_cast<uintptr_t>(t->data) % 16 == 0,
              "paged_attention: rows of q, out and the cache must be 16-byte aligned, a stride is ", t->strides[i]);
  for (const TensorView* t : {&a.k_cache, &a.v_cache})
    require(t->strides[2] == dim,
            "paged_attention: the tokens of a cache block's head must be contiguous, their stride is ", t->strides[2]);
  const float log2_e = 1.4426950408889634f;
  return {a.out.as<T>(),
          a.q.as<T>(),
          a.k_cache.as<C>(),
          a.v_cache.as<C>(),
          a.query_start.as<int32_t>(),
          a.seq_lens.as<int32_t>(),
          a.kv_start.as<int32_t>(),
          a.kv_blocks.as<int32_t>(),
          a.out.strides[0],
          a.out.strides[1],
          a.q.strides[0],
          a.q.strides[1],
          a.k_cache.strides[0],
          a.k_cache.strides[1],
          a.v_cache.strides[0],
          a.v_cache.strides[1],
          a.num_decodes.as<int64_t>(),
          a.q.shape[0],
          static_cast<int>(a.seq_lens.shape[0]),
          static_cast<int>(a.k_cache.shape[1]),
          static_cast<int>(a.q.shape[1] / a.k_cache.shape[1]),
          static_cast<int>(dim),
          std::countr_zero(static_cast<uint64_t>(block_size)),
          a.scale * a.k_scale * log2_e,
          a.v_scale,
          nullptr,
          a.plan.as<int32_t>(),
          0,
          nullptr};
}

}  // namespace

void paged_attention(const PagedAttention& a) {
  by_cache_dtype(a.q.dtype, a.k_cache.dtype, [&]<class T, class C>() {
    AttentionParams<T, C> p = params_of<T, C>(a);
    if constexpr (sizeof(T) == 4) {
      require(p.dim <= most_dim, "paged_attention: head size ", p.dim, " is more than ", most_dim);
      if (p.seqs > 0)
        launch(float_attention_kernel<C>, dim3(static_cast<unsigned>(p.rows), static_cast<unsigned>(a.q.shape[1])),
               warps * warp_size, 0, a.stream, p);
    } else {
      if (a.max_decodes > 0) paged_decode(p, a.max_decodes, a.shares_prefixes, a.stream);
      if (a.max_prompts > 0) paged_prefill(p, a.stream);
    }
  });
}

}  // namespace hybrid::cuda
