// sample: one block of 1024 threads a row, the row read from memory (then L2) once per question asked about it.
//
//   greedy               1 pass: the largest
//   temperature          + 1 pass: largest of (logit - largest) / temperature + Gumbel noise
//   top-k, top-p         + 1 pass over 8 thresholds + 1 that moves the few candidates above one of them to shared
//   memory,
//                        where the exact threshold is found and the draw made
//   the same, but more than 4096 candidates remain: the search goes on in memory, 7 thresholds a pass
//   log-probabilities    + 3 passes over the raw logits, which adjustments are undone for
//
// Compiled without contraction to fused multiply-adds: draws are the CPU's, bit for bit (ops/philox.h), as long as
// top-p keeps the same tokens; its probabilities may differ from the CPU's in the last bits.
#include "device.cuh"
#include "launch.cuh"
#include "ops/ops.h"
#include "ops/philox.h"
#include "sample_row.cuh"

namespace hybrid::cuda {

namespace {

constexpr float greedy_below = 1e-5f;  // dividing by less overflows
constexpr float log2_e = 1.4426950408889634f;

struct SampleParams {
  int32_t *tokens, *logprob_ids, *ranks;
  float *logprobs, *logits;
  const float *temperature, *top_p, *min_p, *repetition_penalty;
  const int32_t *top_k, *positions, *num_logprobs, *adjust_start, *adjust_ids, *adjust_flags;
  const float* adjust_add;
  const uint64_t* seeds;
  float* saved;  // raw logits of the entries, to undo adjustments
  int64_t logits_row, logprobs_row, logprob_ids_row;
  int vocab, width;
};

struct SharedRow {
  Exchange exchange;
  float list_logits[list_capacity];
  int32_t list_ids[list_capacity];
};

// Candidates as shares of the way from the largest logit down to the mean: a ladder that fits any scale of logits.
struct Ladder {
  static constexpr int steps = 8;  // the last one holds everything
  float limits[steps];
  int32_t counts[steps];
  double masses[steps];
};

class RowSampler {
 public:
  __device__ RowSampler(const SampleParams& p, SharedRow& shared, uint32_t* mask)
      : p_(p),
        shared_(shared),
        mask_(mask),
        row_(blockIdx.x),
        logits_(p.logits + row_ * p.logits_row),
        begin_(p.adjust_start[row_]),
        end_(p.adjust_start[row_ + 1]) {}

  __device__ void run() {
    const bool wanted = p_.logprobs != nullptr && p_.num_logprobs[row_] >= 0;
    double log_sum = 0;
    if (wanted) log_sum = write_top_logprobs();
    const bool restricted = adjust();
    const int token = pick(restricted);
    if (threadIdx.x == 0) p_.tokens[row_] = token;
    if (wanted) {
      restore();
      write_sampled_logprob(token, log_sum);
    } else if (p_.logprobs != nullptr) {
      clear_logprobs(0);
      if (threadIdx.x == 0) p_.ranks[row_] = 0;
    }
  }

 private:
  __device__ RowSource everything() const { return {logits_, nullptr, p_.vocab}; }

  // Entries of a row are independent if their ids ascend; else one thread takes them in order.
  __device__ bool ascending() const {
    bool mine = true;
    for (int i = begin_ + 1 + static_cast<int>(threadIdx.x); i < end_; i += sample_threads)
      mine = mine && p_.adjust_ids[i - 1] < p_.adjust_ids[i];
    return __syncthreads_and(mine) != 0;
  }
  template <class Body>
  __device__ void each_entry(bool parallel, Body&& body) const {
    if (parallel)
      for (int i = begin_ + static_cast<int>(threadIdx.x); i < end_; i += sample_threads) body(i);
    else if (threadIdx.x == 0)
      for (int i = begin_; i < end_; ++i) body(i);
  }

  // Penalties and additions; returns whether the row may only pick ids with flag 2, which mask_ then holds.
  __device__ bool adjust() {
    if (begin_ == end_) return false;
    parallel_ = ascending();
    const float penalty = p_.repetition_penalty[row_];
    bool restricts = false;
    each_entry(parallel_, [&](int i) {
      float x = logits_[p_.adjust_ids[i]];
      p_.saved[i] = x;
      if ((p_.adjust_flags[i] & 1) != 0) x = x > 0.0f ? x / penalty : x * penalty;
      logits_[p_.adjust_ids[i]] = x + p_.adjust_add[i];
      restricts = restricts || (p_.adjust_flags[i] & 2) != 0;
    });
    if (__syncthreads_or(restricts) == 0) return false;
    for (int i = threadIdx.x; i < (p_.vocab + 31) / 32; i += sample_threads) mask_[i] = 0;
    __syncthreads();
    each_entry(true, [&](int i) {
      if ((p_.adjust_flags[i] & 2) != 0) atomicOr(mask_ + p_.adjust_ids[i] / 32, 1u << (p_.adjust_ids[i] % 32));
    });
    __syncthreads();
    return true;
  }
  // Undoes adjust(), last first: an id may have several entries.
  __device__ void restore() {
    if (begin_ == end_) return;
    __syncthreads();
    if (parallel_)
      each_entry(true, [&](int i) { logits_[p_.adjust_ids[i]] = p_.saved[i]; });
    else if (threadIdx.x == 0)
      for (int i = end_ - 1; i >= begin_; --i) logits_[p_.adjust_ids[i]] = p_.saved[i];
    __syncthreads();
  }

  // The ladder's counts and masses, its limits between the largest logit and the mean of the finite ones.
  __device__ Ladder climb(const RowSource& source, const Weight& weight, float mean) {
    const float shares[Ladder::steps - 1] = {1.0f / 16, 1.0f / 8, 3.0f / 16, 1.0f / 4, 3.0f / 8, 1.0f / 2, 3.0f / 4};
    Ladder ladder;
#pragma unroll
    for (int j = 0; j < Ladder::steps; ++j)
      ladder.limits[j] = j + 1 == Ladder::steps ? low_infinity : weight.largest - (weight.largest - mean) * shares[j];
    at_least(source, Filter{}, weight, ladder.limits, shared_.exchange);
#pragma unroll
    for (int j = 0; j < Ladder::steps; ++j) {
      ladder.counts[j] = shared_.exchange.total_count[j];
      ladder.masses[j] = shared_.exchange.total_mass[j];
    }
    return ladder;
  }

  // The candidates of step j of the ladder just climbed, to shared memory in ascending order of id.
  __device__ ListSource gather(const RowSource& source, int step, float limit, int count) {
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int at = 0;
    for (int w = 0; w < warp; ++w) at += shared_.exchange.count[w][step];
    const int begin = warp * source.piece(), end = min(source.size, begin + source.piece());
#pragma unroll 4
    for (int first = begin; first < end; first += warp_size) {
      const int i = first + lane;
      const float x = i < end && source.has(i) ? source.logit(i) : 0.0f;
      const bool keep = i < end && source.has(i) && x >= limit;
      const uint32_t votes = __ballot_sync(0xffffffffu, keep);
      if (keep) {
        const int to = at + __popc(votes & ((1u << lane) - 1u));
        shared_.list_logits[to] = x, shared_.list_ids[to] = i;
      }
      at += __popc(votes);
    }
    __syncthreads();
    return {shared_.list_logits, shared_.list_ids, count};
  }

  // Largest logit with its id, and, on request, the mean of the finite ones and the number of candidates.
  __device__ Best survey(const RowSource& source, bool all, float& mean, int& size) {
    Best best;
    int32_t count[2] = {};
    float sum[2] = {};
    source.each([&](float x, int id) {
      best.add(x, id);
      ++count[0];
      if (x > low_infinity) ++count[1], sum[0] += x;
    });
    best = best_of_block(best, shared_.exchange);
    if (!all) return best;
    sum_over_block(count, sum, shared_.exchange);
    size = shared_.exchange.total_count[0];
    mean = static_cast<float>(shared_.exchange.total_mass[0] / max(1, shared_.exchange.total_count[1]));
    return best;
  }

  __device__ int pick(bool restricted) {
    const RowSource source{logits_, restricted ? mask_ : nullptr, p_.vocab};
    const float temperature = p_.temperature[row_], top_p = p_.top_p[row_];
    const int top_k = p_.top_k[row_];
    const bool greedy = !(temperature >= greedy_below), cuts = !greedy && (top_k > 0 || top_p < 1.0f);
    float mean = 0;
    int size = 0;
    const Best best = survey(source, cuts, mean, size);
    if (greedy || !(best.score > low_infinity)) return best.id;
    inverse_ = 1.0f / temperature;
    const Weight weight{best.score, inverse_ * log2_e};
    const bool cut_k = cuts && top_k > 0 && top_k < size, cut_p = top_p < 1.0f;
    if (!cut_k && !cut_p) return draw(source, weight, Filter{});
    const Ladder ladder = climb(source, weight, mean);
    const double everything = ladder.masses[Ladder::steps - 1];
    int step = 0;
    const auto reached = [&](int j) {
      return cut_k ? ladder.counts[j] >= top_k : ladder.masses[j] >= share(top_p, everything);
    };
    float limit = ladder.limits[0];
    int count = ladder.counts[0];
    bool found = reached(0);
#pragma unroll
    for (int j = 1; j < Ladder::steps; ++j)
      if (!found) step = j, limit = ladder.limits[j], count = ladder.counts[j], found = reached(j);
    if (count <= list_capacity)
      return choose<1>(gather(source, step, limit, count), weight, cut_k, cut_p, limit, everything);
    return choose<7>(source, weight, cut_k, cut_p, limit, everything);
  }

  __device__ static double share(float p, double total) { return static_cast<double>(fmaxf(p, FLT_MIN)) * total; }

  // Top-k, top-p, min-p and the draw among candidates of which all that can be kept are >= floor.
  template <int thresholds, class Source>
  __device__ int choose(const Source& source, const Weight& weight, bool cut_k, bool cut_p, float floor, double total) {
    Filter filter;
    if (cut_k) {
      filter.top_k = find_cut<thresholds>(source, filter, weight, false, p_.top_k[row_], floor, shared_.exchange);
      if (cut_p) {
        const float all[1] = {low_infinity};
        at_least(source, filter, weight, all, shared_.exchange);
        total = shared_.exchange.total_mass[0];
        floor = filter.top_k.value;
      }
    }
    if (cut_p)
      filter.top_p =
          find_cut<thresholds>(source, filter, weight, true, share(p_.top_p[row_], total), floor, shared_.exchange);
    return draw(source, weight, filter);
  }

  // The noise to within 0.1: enough to see that a token cannot win.
  __device__ static float rough_gumbel(uint32_t bits) {
    const float v = (static_cast<float>(bits) + 0.5f) * 0x1p-32f;
    return -__logf(v < 0.001f ? v : -__logf(fmaxf(1.0f - v, 0x1p-25f)));
  }
  __device__ void contend(Best& best, float x, int id, const Weight& weight, uint32_t bits) const {
    const float score = (x - weight.largest) * inverse_;
    if (score + rough_gumbel(bits) + 0.2f >= best.score) best.add(gumbel(bits) + score, id);
  }

  __device__ int draw(const RowSource& source, const Weight& weight, Filter filter) {
    filter.lowest = lowest(weight);
    const uint64_t seed = p_.seeds[row_];
    const auto position = static_cast<uint32_t>(p_.positions[row_]);
    Best best;
    for (int first = static_cast<int>(threadIdx.x) * 4; first < source.size; first += sample_threads * 4) {
      float x[4];
      bool keep[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int id = first + j;
        x[j] = id < source.size ? source.logit(id) : 0.0f;
        keep[j] = id < source.size && source.has(id) && filter.keeps(x[j], id);
      }
      if (!(keep[0] || keep[1] || keep[2] || keep[3])) continue;
      const PhiloxWords bits = philox(static_cast<uint32_t>(first) / 4, position, 0, 0, seed);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (keep[j]) contend(best, x[j], first + j, weight, bits[static_cast<size_t>(j)]);
    }
    return best_of_block(best, shared_.exchange).id;
  }
  __device__ int draw(const ListSource& source, const Weight& weight, Filter filter) {
    filter.lowest = lowest(weight);
    const uint64_t seed = p_.seeds[row_];
    const auto position = static_cast<uint32_t>(p_.positions[row_]);
    Best best;
    source.each([&](float x, int id) {
      if (filter.keeps(x, id))
        best.add(gumbel_of_token(seed, position, static_cast<uint32_t>(id)) + (x - weight.largest) * inverse_, id);
    });
    return best_of_block(best, shared_.exchange).id;
  }

  // min-p as a bound on the logits.
  __device__ float lowest(const Weight& weight) const {
    const double share = p_.min_p[row_];
    if (!(share > 0.0)) return low_infinity;
    const double below = static_cast<double>(p_.temperature[row_]) * log(fmin(1.0, share));
    return static_cast<float>(static_cast<double>(weight.largest) + below);
  }

  __device__ float* logprobs() const { return p_.logprobs + row_ * p_.logprobs_row; }
  __device__ int32_t* logprob_ids() const { return p_.logprob_ids + row_ * p_.logprob_ids_row; }
  __device__ void clear_logprobs(int from) const {
    for (int i = from + static_cast<int>(threadIdx.x); i < p_.width; i += sample_threads)
      logprobs()[i] = 0.0f, logprob_ids()[i] = -1;
  }

  // Columns 1 .. n: the most likely tokens of the raw logits. Returns the logarithm of the sum of their exponentials.
  __device__ double write_top_logprobs() {
    const RowSource source = everything();
    float mean = 0;
    int size = 0;
    const Best best = survey(source, true, mean, size);
    const int n = min(min(p_.num_logprobs[row_], p_.vocab), p_.width - 1);
    clear_logprobs(1 + n);
    const bool finite = best.score > low_infinity;  // else log-probabilities are -inf, not NaN
    const Weight weight{best.score, finite ? log2_e : 0.0f};
    const Ladder ladder = climb(source, weight, mean);
    const double log_sum = finite ? static_cast<double>(best.score) + log(ladder.masses[Ladder::steps - 1]) : 0.0;
    if (n == 0) return log_sum;
    int step = -1;
    float limit = low_infinity;
#pragma unroll
    for (int j = Ladder::steps - 1; j >= 0; --j)
      if (ladder.counts[j] >= n && ladder.counts[j] <= list_capacity) step = j, limit = ladder.limits[j];
    if (step >= 0) {
      const ListSource list = gather(source, step, limit, count_of(ladder, step));
      write_top(list, find_cut<1>(list, Filter{}, weight, false, n, limit, shared_.exchange), log_sum);
    } else {
      const Cut cut = find_cut<7>(source, Filter{}, weight, false, n, low_infinity, shared_.exchange);
      write_top(collect(source, cut, n), cut, log_sum);
    }
    return log_sum;
  }
  __device__ static int count_of(const Ladder& ladder, int step) {
    int count = 0;
#pragma unroll
    for (int j = 0; j < Ladder::steps; ++j)
      if (j == step) count = ladder.counts[j];
    return count;
  }

  // The kept candidates of a list, each to the column that is its rank among them.
  __device__ void write_top(const ListSource& list, const Cut& cut, double log_sum) const {
    list.each([&](float x, int id) {
      if (!cut.keeps(x, id)) return;
      int rank = 0;
      for (int j = 0; j < list.size; ++j) {
        const float other = list.logits[j];
        rank += other > x || (other == x && list.ids[j] < id);
      }
      logprobs()[1 + rank] = static_cast<float>(static_cast<double>(x) - log_sum);
      logprob_ids()[1 + rank] = id;
    });
    __syncthreads();
  }

  // The n candidates that the cut keeps, to shared memory in any order.
  __device__ ListSource collect(const RowSource& source, const Cut& cut, int n) {
    __syncthreads();
    if (threadIdx.x == 0) shared_.exchange.total_count[0] = 0;
    __syncthreads();
    source.each([&](float x, int id) {
      if (!cut.keeps(x, id)) return;
      const int at = atomicAdd(&shared_.exchange.total_count[0], 1);
      shared_.list_logits[at] = x, shared_.list_ids[at] = id;
    });
    __syncthreads();
    return {shared_.list_logits, shared_.list_ids, n};
  }

  __device__ void write_sampled_logprob(int token, double log_sum) {
    const float logit = clean(logits_[token]);
    int32_t larger[1] = {};
    const float nothing[1] = {};
    everything().each([&](float x, int) { larger[0] += x > logit; });
    sum_over_block(larger, nothing, shared_.exchange);
    if (threadIdx.x != 0) return;
    logprobs()[0] = static_cast<float>(static_cast<double>(logit) - log_sum);
    logprob_ids()[0] = token;
    p_.ranks[row_] = 1 + shared_.exchange.total_count[0];
  }

  const SampleParams& p_;
  SharedRow& shared_;
  uint32_t* mask_;
  int64_t row_;
  float* logits_;
  int begin_, end_;
  bool parallel_ = true;
  float inverse_ = 0.0f;
};

__global__ void __launch_bounds__(sample_threads) sample_kernel(const __grid_constant__ SampleParams p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  extern __shared__ uint4 shared[];
  SharedRow& row = *reinterpret_cast<SharedRow*>(shared);
  RowSampler(p, row, reinterpret_cast<uint32_t*>(&row + 1)).run();
}

}  // namespace

void sample(const Sample& a) {
  const int64_t vocab = a.logits.shape[1], width = a.logprobs.defined() ? a.logprobs.shape[1] : 0;
  require(vocab < (int64_t{1} << 20), "sample: a vocabulary of ", vocab, ", the CUDA kernel takes up to ",
          (1 << 20) - 1);
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
  p.seeds = a.seeds.as<uint64_t>();
  p.saved = static_cast<float*>(scratch(static_cast<size_t>(a.adjust_ids.shape[0]) * sizeof(float), a.stream));
  p.logits_row = a.logits.strides[0], p.logprobs_row = a.logprobs.strides[0];
  p.logprob_ids_row = a.logprob_ids.strides[0];
  p.vocab = static_cast<int>(vocab), p.width = static_cast<int>(width);
  const size_t mask_bytes = static_cast<size_t>(ceil_div(vocab, 32)) * sizeof(uint32_t);
  launch(sample_kernel, static_cast<unsigned>(a.tokens.shape[0]), sample_threads, sizeof(SharedRow) + mask_bytes,
         a.stream, p);
}

}  // namespace hybrid::cuda
