// Causal attention over the paged cache.
#pragma once

#include <cmath>
#include <vector>

#include "ops/dispatch.h"
#include "ops/ops.h"

namespace hybrid::cpu::HYBRID_ISA {

template <class T>
void attend(const PagedAttention& args, int64_t sequence, int64_t row, int64_t head) {
  const int64_t dim = args.q.shape[2], block_size = args.k_cache.shape[2];
  const int64_t kv_head = head / (args.q.shape[1] / args.k_cache.shape[1]);
  const int64_t length =
      args.seq_lens.as<int32_t>()[sequence] - (args.query_start.as<int32_t>()[sequence + 1] - 1 - row);
  const int32_t* blocks = args.kv_blocks.as<int32_t>() + args.kv_start.as<int32_t>()[sequence];
  const T* q = args.q.as<T>() + row * args.q.strides[0] + head * args.q.strides[1];
  const auto entry = [&](const TensorView& cache, int64_t position) {
    return cache.as<T>() + blocks[position / block_size] * cache.strides[0] + kv_head * cache.strides[1] +
           position % block_size * cache.strides[2];
  };
  std::vector<float> scores(static_cast<size_t>(length)), sum(static_cast<size_t>(dim));
  float largest = -INFINITY, total = 0.0f;
  for (int64_t j = 0; j < length; ++j) {
    float dot = 0.0f;
    for (int64_t i = 0; i < dim; ++i) dot += static_cast<float>(q[i]) * static_cast<float>(entry(args.k_cache, j)[i]);
    scores[static_cast<size_t>(j)] = dot * args.scale;
    largest = std::fmax(largest, dot * args.scale);
  }
  for (int64_t j = 0; j < length; ++j) {
    const float weight = std::exp(scores[static_cast<size_t>(j)] - largest);
    total += weight;
    for (int64_t i = 0; i < dim; ++i)
      sum[static_cast<size_t>(i)] += weight * static_cast<float>(entry(args.v_cache, j)[i]);
  }
  T* out = args.out.as<T>() + row * args.out.strides[0] + head * args.out.strides[1];
  for (int64_t i = 0; i < dim; ++i) out[i] = static_cast<T>(sum[static_cast<size_t>(i)] / total);
}

inline void paged_attention(const PagedAttention& args) {
  by_dtype(args.q.dtype, [&]<class T>() {
    const int32_t* query_start = args.query_start.as<int32_t>();
    for (int64_t sequence = 0; sequence < args.seq_lens.shape[0]; ++sequence)
      for (int64_t row = query_start[sequence]; row < query_start[sequence + 1]; ++row)
        for (int64_t head = 0; head < args.q.shape[1]; ++head) attend<T>(args, sequence, row, head);
  });
}

}  // namespace hybrid::cpu::HYBRID_ISA
