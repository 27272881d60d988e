// sample: eight blocks a row (a cluster), which keep it in their shared memory, so that it is read once. One block a
// row where there are no clusters or it does not fit, which keeps it in scratch memory.
//
//   greedy              the largest, found while reading
//   temperature         + the largest of (logit - largest) / temperature + Gumbel noise
//   top-k up to 1024    no further pass: candidates come from the threads whose largest is among the k best; one block
//                       sorts the list, cuts it by top-p and min-p, and draws
//   top-p, larger k     + a histogram (of counts, of probability) over 1024 bins, + a sort of the candidates in the bin
//   of
//                       the cut, + a draw from all; more than 2048 in that bin: a histogram of the bin first
//   log-probabilities   + a sum over the raw logits, top-k of them, and the sampled token's rank, from memory
//
// Compiled without contraction to fused multiply-adds: draws are the CPU's, bit for bit (ops/philox.h), as long as
// top-p keeps the same tokens; its probabilities may differ from the CPU's in the last bits. They are added up as
// integers: the outcome is the same however a row is split.
#include <new>

#include "device.cuh"
#include "launch.cuh"
#include "ops/ops.h"
#include "sample_row.cuh"

namespace hybrid::cuda {

namespace {

// Apart, and with its state in shared memory, so that rows that only want the largest logit do without the code and the
// registers. Not on the stack: meetings of a cluster empty the first-level cache.
template <class RowTeam>
__device__ __noinline__ void finish_row(RowSampler<RowTeam>& begun) {
  begun.finish();
}

template <int blocks>
__global__ void __launch_bounds__(sample_threads, 2) sample_kernel(const __grid_constant__ SampleParams p) {
  using RowTeam = Team<blocks>;
  RowTeam::announce();
  let_next_kernel_start();
  wait_for_previous_kernel();
  extern __shared__ uint4 memory[];
  __shared__ alignas(RowSampler<RowTeam>) unsigned char begun[sizeof(RowSampler<RowTeam>)];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  float4* kept = reinterpret_cast<float4*>(&shared + 1);
  uint32_t* allowed = reinterpret_cast<uint32_t*>(kept + p.share / 4);
  if constexpr (blocks == 1) {
    allowed = reinterpret_cast<uint32_t*>(kept);
    kept = p.scratch + blockIdx.x * p.scratch_row;
  }
  for (int row = static_cast<int>(blockIdx.x) / blocks; row < p.rows; row += static_cast<int>(gridDim.x) / blocks) {
    RowSampler<RowTeam> sampler(p, shared, kept, allowed, row);
    sampler.begin();
    if (sampler.only_greedy()) {
      sampler.finish_greedy();
    } else {
      if (threadIdx.x == 0) new (begun) RowSampler<RowTeam>(sampler);
      __syncthreads();
      finish_row(*reinterpret_cast<RowSampler<RowTeam>*>(begun));
    }
    if constexpr (blocks == 1) __syncthreads();
  }
}

}  // namespace

void sample(const Sample& a) {
  const int64_t rows = a.tokens.shape[0], vocab = a.logits.shape[1];
  const int64_t width = a.logprobs.defined() ? a.logprobs.shape[1] : 0;
  require(vocab < (int64_t{1} << id_bits), "sample: a vocabulary of ", vocab, ", the CUDA kernel takes up to ",
          (1 << id_bits) - 1);
  require(width <= list_capacity, "sample: logprobs has width ", width, ", the CUDA kernel takes up to ",
          list_capacity);
  SampleParams p{};
  p.tokens = a.tokens.as<int32_t>(), p.logprob_ids = a.logprob_ids.as<int32_t>(), p.ranks = a.ranks.as<int32_t>();
  p.logprobs = a.logprobs.as<float>(), p.logits = a.logits.as<float>();
  p.temperature = a.temperature.as<float>(), p.top_p = a.top_p.as<float>(), p.min_p = a.min_p.as<float>();
  p.repetition_penalty = a.repetition_penalty.as<float>();
  p.top_k = a.top_k.as<int32_t>(), p.positions = a.positions.as<int32_t>();
  p.num_logprobs = a.num_logprobs.as<int32_t>();
  p.adjust_start = a.adjust_start.as<int32_t>(), p.adjust_ids = a.adjust_ids.as<int32_t>();
  p.adjust_flags = a.adjust_flags.as<int32_t>(), p.adjust_add = a.adjust_add.as<float>();
  p.adjust_stride = a.adjust_ids.strides[0];
  p.seeds = a.seeds.as<uint64_t>();
  p.logits_row = a.logits.strides[0], p.logprobs_row = a.logprobs.strides[0];
  p.logprob_ids_row = a.logprob_ids.strides[0];
  p.rows = static_cast<int>(rows), p.vocab = static_cast<int>(vocab), p.width = static_cast<int>(width);

  constexpr int64_t team = most_blocks, block_overhead = 1024;
  const auto bytes_for = [](int64_t kept, int64_t masked) {
    return static_cast<int64_t>(sizeof(Shared)) + kept * 4 + ceil_div(masked, 32) * 4;
  };
  int64_t share = ceil_div(vocab, team * 4) * 4;
  const int64_t bytes = bytes_for(share, share);
  if (can_overlap_launches() && bytes + block_overhead <= shared_bytes_per_multiprocessor()) {
    p.share = static_cast<int>(share);
    launch(sample_kernel<team>, static_cast<unsigned>(rows * team), sample_threads, static_cast<size_t>(bytes),
           a.stream, p, static_cast<unsigned>(team));
    return;
  }
  share = ceil_div(vocab, 4) * 4;
  const int64_t blocks = std::min(rows, multiprocessors());
  p.share = static_cast<int>(share), p.scratch_row = share / 4;
  p.scratch = static_cast<float4*>(scratch(static_cast<size_t>(blocks * share) * sizeof(float), a.stream));
  launch(sample_kernel<1>, static_cast<unsigned>(blocks), sample_threads, static_cast<size_t>(bytes_for(0, share)),
         a.stream, p);
}

}  // namespace hybrid::cuda
