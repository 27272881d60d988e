// The parts of sampling one row by one block: where candidates come from, block-wide answers, thresholds.
//
// As on the CPU nothing is sorted: top-k and top-p look for the threshold, by "how many (how much probability) is at
// least t". Sums are taken in a fixed order (thread, warp, block), so a row's outcome does not depend on the batch.
#pragma once

#include <cfloat>
#include <cstdint>

#include "reduce.cuh"

namespace hybrid::cuda {

constexpr int sample_threads = 1024, sample_warps = sample_threads / warp_size;
constexpr int list_capacity = 4096;  // candidates that fit in shared memory
constexpr float low_infinity = -__builtin_huge_valf();

// Order-preserving map of floats to integers, and back.
__device__ inline uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float float_of(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// A NaN logit counts as -inf, +inf as the largest float.
__device__ inline float clean(float x) { return isnan(x) ? low_infinity : fminf(x, FLT_MAX); }

// All tokens of a row, or those whose bit is set in `allowed`. A warp visits one contiguous piece.
struct RowSource {
  const float* logits;
  const uint32_t* allowed;  // null: all
  int size;

  __device__ bool has(int i) const { return allowed == nullptr || (allowed[i / 32] >> (i % 32) & 1u) != 0; }
  __device__ float logit(int i) const { return clean(logits[i]); }
  __device__ int id(int i) const { return i; }
  __device__ int piece() const { return (size + sample_threads - 1) / sample_threads * warp_size; }

  template <class Body>
  __device__ void each(Body&& body) const {
    const int begin = static_cast<int>(threadIdx.x) / warp_size * piece(), end = min(size, begin + piece());
#pragma unroll 8
    for (int i = begin + static_cast<int>(threadIdx.x) % warp_size; i < end; i += warp_size)
      if (has(i)) body(logit(i), i);
  }
};

// Candidates in shared memory, ids ascending.
struct ListSource {
  const float* logits;
  const int32_t* ids;
  int size;

  __device__ bool has(int) const { return true; }
  __device__ float logit(int i) const { return logits[i]; }
  __device__ int id(int i) const { return ids[i]; }

  template <class Body>
  __device__ void each(Body&& body) const {
    for (int i = threadIdx.x; i < size; i += sample_threads) body(logits[i], ids[i]);
  }
};

// Keep logits > value, and those equal to it up to last_id.
struct Cut {
  float value = low_infinity;
  int last_id = INT32_MAX;
  __device__ bool keeps(float x, int id) const { return x > value || (x == value && id <= last_id); }
};

// What top-k, top-p and min-p leave over.
struct Filter {
  Cut top_k, top_p;
  float lowest = low_infinity;
  __device__ bool keeps(float x, int id) const { return x >= lowest && top_k.keeps(x, id) && top_p.keeps(x, id); }
};

struct Best {
  float score = low_infinity;
  int id = INT32_MAX;
  __device__ void add(float x, int at) {
    if (x > score || (x == score && at < id)) score = x, id = at;
  }
};

// Shared memory that block-wide answers pass through.
struct Exchange {
  static constexpr int most = 8;
  int32_t count[sample_warps][most];
  float mass[sample_warps][most];
  int32_t total_count[most];
  double total_mass[most];
  Best best[sample_warps];
};

__device__ inline Best best_of_block(Best mine, Exchange& exchange) {
  const auto across_warp = [](Best b) {
#pragma unroll
    for (int step = warp_size / 2; step > 0; step /= 2) {
      const float score = __shfl_xor_sync(0xffffffffu, b.score, step);
      const int id = __shfl_xor_sync(0xffffffffu, b.id, step);
      b.add(score, id);
    }
    return b;
  };
  mine = across_warp(mine);
  __syncthreads();
  if (threadIdx.x % warp_size == 0) exchange.best[threadIdx.x / warp_size] = mine;
  __syncthreads();
  return across_warp(exchange.best[threadIdx.x % warp_size]);
}

// Counts and masses of all threads to exchange.total_*; exchange.count keeps the warps' counts.
template <int n>
__device__ void sum_over_block(const int32_t (&count)[n], const float (&mass)[n], Exchange& exchange) {
  static_assert(n <= Exchange::most);
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const int32_t warp_count = __reduce_add_sync(0xffffffffu, count[j]);
    const float warp_mass = warp_sum(mass[j]);
    if (lane == 0) exchange.count[warp][j] = warp_count, exchange.mass[warp][j] = warp_mass;
  }
  __syncthreads();
  if (threadIdx.x < n) {
    int32_t total_count = 0;
    double total_mass = 0;
    for (int w = 0; w < sample_warps; ++w) {
      total_count += exchange.count[w][threadIdx.x];
      total_mass += static_cast<double>(exchange.mass[w][threadIdx.x]);
    }
    exchange.total_count[threadIdx.x] = total_count;
    exchange.total_mass[threadIdx.x] = total_mass;
  }
  __syncthreads();
}

// exp((x - largest) * inverse_temperature)
struct Weight {
  float largest, scale;  // scale: inverse temperature / ln 2
  __device__ float operator()(float x) const {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"((x - largest) * scale));
    return y;
  }
};

// For each limit: how many candidates that `filter` keeps are >= limit, and their weights.
template <int n, class Source>
__device__ void at_least(const Source& source, const Filter& filter, const Weight& weight, const float (&limits)[n],
                         Exchange& exchange) {
  int32_t count[n] = {};
  float mass[n] = {};
  source.each([&](float x, int id) {
    if (!filter.keeps(x, id)) return;
    const float w = weight(x);
#pragma unroll
    for (int j = 0; j < n; ++j)
      if (x >= limits[j]) ++count[j], mass[j] += w;
  });
  sum_over_block(count, mass, exchange);
}

// The id of the tie number `ties` (from 1) among candidates equal to value, in ascending order of id.
template <class Source>
__device__ int id_of_tie(const Source& source, const Filter& filter, float value, int ties, Exchange& exchange) {
  __syncthreads();
  if (threadIdx.x < warp_size) {
    int found = INT32_MAX, left = ties;
    for (int first = 0; first < source.size && left > 0; first += warp_size) {
      const int i = first + threadIdx.x;
      const bool equal =
          i < source.size && source.has(i) && source.logit(i) == value && filter.keeps(value, source.id(i));
      uint32_t votes = __ballot_sync(0xffffffffu, equal);
      const int here = __popc(votes);
      if (here >= left) {
        for (int skip = 1; skip < left; ++skip) votes &= votes - 1;
        found = source.id(first + __ffs(votes) - 1);
      }
      left -= here;
    }
    if (threadIdx.x == 0) exchange.total_count[0] = found;
  }
  __syncthreads();
  return exchange.total_count[0];
}

// The smallest set of largest logits (ties: lowest ids) among what `filter` keeps whose count, or with by_mass sum of
// weights, reaches target > 0. `floor`: a value at or above which the target is reached. n thresholds are tried a pass.
template <int n, class Source>
__device__ Cut find_cut(const Source& source, const Filter& filter, const Weight& weight, bool by_mass, double target,
                        float floor, Exchange& exchange) {
  uint32_t low = key_of(floor), high = key_of(weight.largest) + 1;
  double above = 0;  // what logits >= float_of(high) amount to
  while (high - low > 1) {
    float limits[n];
    uint32_t keys[n];
#pragma unroll
    for (int j = 0; j < n; ++j) {
      keys[j] = low + static_cast<uint32_t>(uint64_t{high - low} * (j + 1) / (n + 1));
      limits[j] = float_of(keys[j]);
    }
    at_least(source, filter, weight, limits, exchange);
#pragma unroll
    for (int j = n - 1; j >= 0; --j) {
      const double reached = by_mass ? exchange.total_mass[j] : exchange.total_count[j];
      if (reached >= target) {
        if (keys[j] > low) low = keys[j];
        break;
      }
      high = keys[j], above = reached;
    }
  }
  Cut cut{float_of(low), INT32_MAX};
  int32_t equal[1] = {};
  const float nothing[1] = {};
  source.each([&](float x, int id) { equal[0] += x == cut.value && filter.keeps(x, id); });
  sum_over_block(equal, nothing, exchange);
  const double equals = exchange.total_count[0], unit = by_mass ? weight(cut.value) : 1.0;
  const double ties = unit > 0 ? ceil((target - above) / unit) : 1.0;
  if (ties < equals) cut.last_id = id_of_tie(source, filter, cut.value, max(1, static_cast<int>(ties)), exchange);
  return cut;
}

}  // namespace hybrid::cuda
