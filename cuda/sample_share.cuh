// The share of a row that one block answers for: reads it, keeps it near, adjusts it.
#pragma once

#include "sample_team.cuh"

namespace hybrid::cuda {

struct SampleParams {
  int32_t *tokens, *logprob_ids, *ranks;
  float* logprobs;
  const float *logits, *temperature, *top_p, *min_p, *repetition_penalty;
  const int32_t *top_k, *positions, *num_logprobs, *adjust_start, *adjust_ids, *adjust_flags;
  const float* adjust_add;
  const uint64_t* seeds;
  float4* scratch;  // where a team of one keeps its share; `scratch_row` apart
  int64_t logits_row, logprobs_row, logprob_ids_row, scratch_row, adjust_stride;
  int rows, vocab, width, share;
};

// Four neighbouring tokens of the block's share; what is beyond its end or not
// allowed is no candidate.
struct alignas(16) Quad {
  float x[4];
  __device__ float largest() const { return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])); }
  __device__ float lowest() const { return fminf(fminf(x[0], x[1]), fminf(x[2], x[3])); }
};

// What one thread has seen: its largest with its quad, and its lowest.
struct Mine {
  float largest = no_candidate(), lowest = no_candidate();
  int quad = -1;
  __device__ void note(const Quad& seen, int q, bool own = true) {
    const float x = own ? seen.largest() : no_candidate();
    if (x > largest || (largest != largest && x == x)) largest = x, quad = q;
    lowest = fminf(lowest, seen.lowest());
  }
};

// The row's largest logit with the lowest id that has it, and its lowest.
struct Extent {
  float largest = 0, lowest = 0;
  int best_id = INT32_MAX;
};

// A block's share of a row, and what its team found out about the row. Knows what all threads of the block agree on,
// and may lie in their shared memory; what each has for itself is passed on. Knows nothing of how a token is picked.
template <class Team>
class RowShare {
 public:
  __device__ RowShare(const SampleParams& p, Shared& shared, float4* values, uint32_t* allowed, int row)
      : p_(p),
        shared_(shared),
        values_(reinterpret_cast<Quad*>(values)),
        allowed_(allowed),
        row_(row),
        logits_(p.logits + row * p.logits_row),
        first_id_(min(p.vocab, Team::rank() * p.share)),
        size_(min(p.vocab, first_id_ + p.share) - first_id_),
        quads_((size_ + 3) / 4),
        entries_begin_(p.adjust_start[row]),
        entries_end_(p.adjust_start[row + 1]),
        num_logprobs_(p.logprobs != nullptr ? p.num_logprobs[row] : -1),
        temperature_(p.temperature[row]) {}

 protected:
  __device__ static bool leads() { return Team::rank() == 0; }

  // Of four tokens; their address is that of a float4, or not.
  template <bool aligned>
  __device__ Quad raw_whole_quad(int q) const {
    const float* from = logits_ + first_id_ + 4 * q;
    if constexpr (aligned) {
      const float4 v = __ldcs(reinterpret_cast<const float4*>(from));
      return {v.x, v.y, v.z, v.w};
    }
    return {__ldcs(from), __ldcs(from + 1), __ldcs(from + 2), __ldcs(from + 3)};
  }
  __device__ Quad raw_quad(int q) const {
    Quad quad;
#pragma unroll
    for (int j = 0; j < 4; ++j) quad.x[j] = 4 * q + j < size_ ? clean(logits_[first_id_ + 4 * q + j]) : no_candidate();
    return quad;
  }

  __device__ Mine load() {
    Mine mine;
    if (reinterpret_cast<uintptr_t>(logits_ + first_id_) % 16 == 0)
      load_whole<true>(mine);
    else
      load_whole<false>(mine);
    if (size_ % 4 != 0 && threadIdx.x == size_ / 4 % sample_threads) {  // the last one is not whole
      const Quad quad = raw_quad(quads_ - 1);
      mine.note(quad, quads_ - 1);
      values_[quads_ - 1] = quad;
    }
    return mine;
  }
  template <bool aligned>
  __device__ void load_whole(Mine& mine) {
    constexpr int at_once = 5;
    const int whole = size_ / 4;
    // Beyond the end the last one again, not noted: all loads are under way before the first is looked at.
    for (int first = threadIdx.x; first < whole; first += at_once * sample_threads) {
      Quad quads[at_once];
#pragma unroll
      for (int u = 0; u < at_once; ++u) quads[u] = raw_whole_quad<aligned>(min(first + u * sample_threads, whole - 1));
#pragma unroll
      for (int u = 0; u < at_once; ++u) {
        const int q = min(first + u * sample_threads, whole - 1);
#pragma unroll
        for (float& x : quads[u].x) x = clean(x);
        mine.note(quads[u], q, first + u * sample_threads < whole);
        values_[q] = quads[u];
      }
    }
  }
  template <class Body>
  __device__ void each(Body&& body) const {
#pragma unroll 1
    for (int q = threadIdx.x; q < quads_; q += sample_threads) {
      const Quad quad = values_[q];
#pragma unroll
      for (int j = 0; j < 4; ++j) body(quad.x[j], first_id_ + 4 * q + j);
    }
  }

  // --- Penalties and additions

  __device__ int32_t id_of(int entry) const { return p_.adjust_ids[entry * p_.adjust_stride]; }
  __device__ int32_t flags_of(int entry) const { return p_.adjust_flags[entry * p_.adjust_stride]; }

  // Entries of a row are independent if their ids ascend; else one thread takes
  // them in order.
  __device__ bool ascending() const {
    bool mine = true;
    for (int i = entries_begin_ + 1 + static_cast<int>(threadIdx.x); i < entries_end_; i += sample_threads)
      mine = mine && id_of(i - 1) < id_of(i);
    return __syncthreads_and(mine) != 0;
  }
  // Those of this block's tokens: body(entry, place in the share).
  template <class Body>
  __device__ void each_entry(bool parallel, Body&& body) const {
    const int begin = entries_begin_ + (parallel ? static_cast<int>(threadIdx.x) : 0);
    if (!parallel && threadIdx.x != 0) return;
    for (int i = begin; i < entries_end_; i += parallel ? sample_threads : 1) {
      const int at = id_of(i) - first_id_;
      if (at >= 0 && at < size_) body(i, at);
    }
  }
  __device__ __noinline__ Mine adjust() {
    const bool parallel = ascending();
    const float penalty = p_.repetition_penalty[row_];
    float* values = reinterpret_cast<float*>(values_);
    each_entry(parallel, [&](int, int at) { values[at] = logits_[first_id_ + at]; });
    each_entry(parallel, [&](int i, int at) {
      float x = values[at];
      if ((flags_of(i) & 1) != 0) x = x > 0.0f ? x / penalty : x * penalty;
      values[at] = x + p_.adjust_add[i * p_.adjust_stride];
    });
    each_entry(parallel, [&](int, int at) { values[at] = clean(values[at]); });
    bool restricts = false;
    for (int i = entries_begin_ + static_cast<int>(threadIdx.x); i < entries_end_; i += sample_threads)
      restricts = restricts || (flags_of(i) & 2) != 0;
    if (__syncthreads_or(restricts) != 0) keep_allowed();
    Mine mine;
    for (int q = threadIdx.x; q < quads_; q += sample_threads) mine.note(values_[q], q);
    return mine;
  }
  // The row may only pick ids that have flag 2.
  __device__ void keep_allowed() {
    for (int i = threadIdx.x; i < (size_ + 31) / 32; i += sample_threads) allowed_[i] = 0;
    __syncthreads();
    each_entry(true, [&](int i, int at) {
      if ((flags_of(i) & 2) != 0) atomicOr(allowed_ + at / 32, 1u << (at % 32));
    });
    __syncthreads();
    for (int q = threadIdx.x; q < quads_; q += sample_threads) {
      const uint32_t bits = allowed_[q / 8] >> (4 * (q % 8));
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if ((bits >> j & 1u) == 0) values_[q].x[j] = no_candidate();
    }
  }

  // --- Answers of all blocks

  // From what each thread has seen; every thread gets it.
  __device__ Extent survey(const Mine& mine, int use) {
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    float largest = warp_max(mine.largest), lowest = warp_min(mine.lowest);
    shared_.thread_largest[threadIdx.x] = mine.largest;
    if (lane == 0) shared_.warp_value[0][warp] = largest, shared_.warp_value[1][warp] = lowest;
    if (threadIdx.x == 0) shared_.lowest_id = INT32_MAX;
    __syncthreads();
    largest = warp_max(shared_.warp_value[0][lane % sample_warps]);
    lowest = warp_min(shared_.warp_value[1][lane % sample_warps]);
    if (mine.largest == largest) {
      const Quad quad = values_[mine.quad];
      int first = 3;
#pragma unroll
      for (int j = 2; j >= 0; --j)
        if (quad.x[j] == largest) first = j;
      atomicMin(&shared_.lowest_id, first_id_ + 4 * mine.quad + first);
    }
    __syncthreads();
    if (threadIdx.x < Team::size)
      Team::peer(shared_.parts[use], threadIdx.x)[Team::rank()] = {largest, lowest, shared_.lowest_id, 0};
    Team::sync();
    Best best;
    lowest = no_candidate();
#pragma unroll
    for (int b = 0; b < Team::size; ++b) {
      const Shared::Part part = shared_.parts[use][b];
      best.add(part.largest, part.id);
      lowest = fminf(lowest, part.lowest);
    }
    return {best.score, lowest, best.id};
  }
  __device__ static float warp_min(float x) { return -warp_max(-x); }

  const SampleParams& p_;
  Shared& shared_;
  Quad* values_;
  uint32_t* allowed_;
  int64_t row_;
  const float* logits_;
  int first_id_, size_, quads_, entries_begin_, entries_end_, num_logprobs_;
  float temperature_;
  Extent extent_;
};

}  // namespace hybrid::cuda
