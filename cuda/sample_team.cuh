// What the blocks that share a row work with: the cluster they are, order of
// candidates, block-wide answers.
//
// Every sum is of integers and every other answer a maximum or minimum, so none
// depends on how a row is split.
#pragma once

#include <cfloat>
#include <cstdint>

#include "reduce.cuh"

namespace hybrid::cuda {

constexpr int sample_threads = 512, sample_warps = sample_threads / warp_size;
constexpr int most_blocks = 8;       // of a team: the size of a cluster that every device with clusters has
constexpr int bins = 1024;           // of a histogram
constexpr int list_capacity = 2048;  // candidates that fit in shared memory
constexpr int lists = 6;             // how many times a row may need them
constexpr float low_infinity = -__builtin_huge_valf();

// The blocks of a row. Knows how to meet and where a peer's shared memory is;
// knows no sampling. Of one block on devices without clusters, or where a row
// does not fit in the shared memory of eight.
template <int blocks>
struct Team {
  static constexpr int size = blocks;

  __device__ static int rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (blocks > 1) return static_cast<int>(__clusterRelativeBlockRank());
#endif
    return 0;
  }
  // Peers have started: only then may their shared memory be written. Announced
  // first, awaited where it matters.
  __device__ static void announce() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (blocks > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  }
  __device__ static void await_peers() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (blocks > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
  }
  // All threads of all blocks; what they wrote before, all may read after. One
  // warp's fence covers its block's writes, as the barrier of the block puts
  // them before it: a fence of every warp costs far more.
  __device__ static void sync() {
    __syncthreads();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (blocks > 1) {
      if (threadIdx.x < warp_size) asm volatile("fence.acq_rel.cluster;" ::: "memory");
      announce(), await_peers();
    }
#endif
  }
  // Where a variable in this block's shared memory lies in block `other`'s.
  template <class T>
  __device__ static T* peer(T* mine, int other) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (blocks > 1) return static_cast<T*>(__cluster_map_shared_rank(mine, static_cast<unsigned>(other)));
#endif
    return mine;
  }
};

// Order-preserving map of floats to integers, and back.
__device__ inline uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float float_of(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// A NaN logit counts as -inf, +inf as the largest float. In a row that was
// cleaned NaN stands for "not a candidate": it is neither more, less nor equal
// to anything.
__device__ inline float clean(float x) { return fminf(fmaxf(x, low_infinity), FLT_MAX); }
__device__ inline float no_candidate() { return __uint_as_float(0x7fffffffu); }

// A candidate's place: ascending is from the most likely to the least, ties by
// ascending id. No two have the same.
using Place = uint64_t;
constexpr int id_bits = 20;
__device__ inline Place place_of(float x, int id) {
  // -0 and +0 are a tie
  return Place{~key_of(x + 0.0f)} << id_bits | static_cast<uint32_t>(id);
}
__device__ inline float logit_at(Place place) { return float_of(~static_cast<uint32_t>(place >> id_bits)); }
__device__ inline int id_at(Place place) { return static_cast<int>(place & ((1u << id_bits) - 1)); }

// Keeps candidates up to a place and from a logit on.
struct Filter {
  float value = low_infinity, lowest = low_infinity;
  int last_id = INT32_MAX;

  __device__ void cut_after(Place place) { value = logit_at(place), last_id = id_at(place); }
  __device__ bool keeps(float x, int id) const { return (x > value || (x == value && id <= last_id)) && x >= lowest; }
};

struct Best {
  float score = low_infinity;
  int id = INT32_MAX;
  __device__ void add(float x, int at) {
    if (x > score || (x == score && at < id)) score = x, id = at;
  }
  __device__ Best over_warp() const {
    Best best = *this;
#pragma unroll
    for (int step = warp_size / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, best.score, step);
      const int id_of_other = __shfl_xor_sync(0xffffffffu, best.id, step);
      best.add(other, id_of_other);
    }
    return best;
  }
};

// exp((x - largest) / temperature), as a float and as an integer share of 2^40.
// Places below 1 / 2^41 weigh nothing.
struct Weight {
  float largest, scale;  // scale: 1 / (temperature * ln 2)
  __device__ float operator()(float x) const {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"((x - largest) * scale));
    return y;
  }
  __device__ uint64_t mass(float x) const { return __float2ull_rn((*this)(x) * 0x1p40f); }
};

// Which bin of a histogram a candidate is in: a monotone function of its place,
// hence a cut lies in one bin.
struct Bins {
  float largest = 0, reach = 0,
        scale = 0;  // bins of equal width from largest down to largest - reach
  Place first = 0;  // or, once narrowed, of 2^shift places each
  int shift = -1;

  __device__ static Bins linear(float largest, float reach) {
    return {largest, reach, reach > 0.0f ? static_cast<float>(bins) / reach : 0.0f};
  }
  __device__ static Bins all_places() {
    Bins b;
    b.shift = 32 + id_bits - 10;
    return b;
  }
  // bins or more: in none
  __device__ int of(float x, int id) const {
    if (shift < 0) {
      const float below = largest - x;
      // (an infinite reach makes a scale of 0, and of -inf no number: fminf takes the last bin then)
      return below <= reach ? static_cast<int>(fminf(below * scale, bins - 1)) : bins;
    }
    const Place place = place_of(x, id);
    if (!(x == x) || place < first) return bins;
    return static_cast<int>(umin64((place - first) >> shift, bins));
  }
  // The places of one bin, spread over all bins.
  __device__ Bins narrowed(int bin) const {
    Bins finer;
    if (shift >= 0) {
      finer.first = first + (Place{static_cast<uint32_t>(bin)} << shift);
      finer.shift = max(0, shift - 10);
      return finer;
    }
    const uint32_t low = first_key(bin), high = bin == 0 ? key_of(largest) + 1 : first_key(bin - 1);
    finer.first = Place{~(high - 1)} << id_bits;
    const Place size = Place{high - low} << id_bits;
    finer.shift = max(0, 54 - __clzll(static_cast<long long>(size - 1)));  // 64 - clz bits, less 10
    return finer;
  }

 private:
  __device__ static uint64_t umin64(uint64_t a, uint64_t b) { return a < b ? a : b; }
  // The smallest key whose logit is in this bin or a better one.
  __device__ uint32_t first_key(int bin) const {
    uint32_t low = key_of(low_infinity), high = key_of(largest);
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      if (of(float_of(middle), 0) <= bin)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }
};

// Shared memory of a block; `parts` and `list` are also written by its peers.
struct alignas(16) Shared {
  struct alignas(16) Part {
    float largest, lowest;
    int id, unused;
  };
  Part parts[2][most_blocks];  // before and after adjustments
  Best bests[most_blocks];
  uint64_t masses[most_blocks];
  int32_t larger[most_blocks];
  Place cut;
  int32_t list_size[lists];  // each use of the list has its own
  int32_t token, lowest_id, found;
  uint64_t before;
  Best warp_best[sample_warps];
  float warp_value[2][sample_warps];
  uint64_t warp_sum[sample_warps];
  float thread_largest[sample_threads];
  uint32_t count[bins], low[bins],
      high[bins];                            // of this block's candidates; amount = high * 2^32 + low
  uint32_t slice_count[bins / most_blocks];  // of all blocks', for the bins that
                                             // this block adds up
  uint64_t slice_amount[bins / most_blocks];
  Place list[list_capacity];
};

struct Sums {
  uint64_t before, total;
};

// What the threads before this one have, and what all have.
__device__ __noinline__ inline Sums sums_of_block(uint64_t mine, Shared& shared) {
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  uint64_t sum = mine;
#pragma unroll
  for (int step = 1; step < warp_size; step *= 2) {
    const uint64_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == warp_size - 1) shared.warp_sum[warp] = sum;
  __syncthreads();
  Sums sums{sum - mine, 0};
#pragma unroll
  for (int w = 0; w < sample_warps; ++w) {
    if (w == warp) sums.before += sums.total;
    sums.total += shared.warp_sum[w];
  }
  return sums;
}

// Position of the first of n amounts at which their running sum reaches target,
// n if none does; `before`: the sum of those ahead of it. Every thread gets
// both.
template <class Amount>
__device__ int first_reaching(int n, uint64_t target, uint64_t& before, uint64_t& total, Shared& shared,
                              Amount&& amount) {
  const int each = (n + sample_threads - 1) / sample_threads, begin = static_cast<int>(threadIdx.x) * each;
  uint64_t mine = 0;
#pragma unroll 1
  for (int i = begin; i < min(n, begin + each); ++i) mine += amount(i);
  const Sums sums = sums_of_block(mine, shared);
  uint64_t sum = sums.before;
  total = sums.total;
  if (threadIdx.x == 0) shared.found = n, shared.before = 0;
  __syncthreads();
  if (sum < target && sum + mine >= target)
#pragma unroll 1
    for (int i = begin; i < min(n, begin + each); ++i) {
      const uint64_t here = amount(i);
      if (sum + here >= target) {
        shared.found = i, shared.before = sum;
        break;
      }
      sum += here;
    }
  __syncthreads();
  before = shared.before;
  return shared.found;
}

// The list of n in ascending order, by bitonic merges.
__device__ __noinline__ inline void sort_list(int n, Shared& shared) {
  int size = warp_size;
  while (size < n) size *= 2;
  for (int i = n + static_cast<int>(threadIdx.x); i < size; i += sample_threads) shared.list[i] = ~Place{0};
  __syncthreads();
  for (int run = 2; run <= size; run *= 2)
    for (int step = run / 2; step > 0; step /= 2) {
#pragma unroll 1
      for (int pair = threadIdx.x; pair < size / 2; pair += sample_threads) {
        const int i = 2 * pair - (pair & (step - 1)), j = i + step;
        const Place a = shared.list[i], b = shared.list[j];
        if ((a > b) == ((i & run) == 0)) shared.list[i] = b, shared.list[j] = a;
      }
      __syncthreads();
    }
}

}  // namespace hybrid::cuda
