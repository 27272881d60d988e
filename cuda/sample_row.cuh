// How a token of a row is picked, by the blocks of a team.
#pragma once

#include "ops/philox.h"
#include "sample_share.cuh"

namespace hybrid::cuda {

constexpr float greedy_below = 1e-5f;  // dividing by less overflows
constexpr float log2_e = 1.4426950408889634f;
// Nothing this many temperatures below the largest logit is ever drawn: Gumbel noise lies between -2.9 and 22.9.
constexpr float out_of_reach = 32.0f;

// Picks a row's token and reports its log-probabilities. Knows the order of the work; refuses to know how the row got
// here and how its blocks share it.
template <class Team>
class RowSampler : public RowShare<Team> {
 public:
  using RowShare<Team>::RowShare;

  // Reads the row and finds its largest logit.
  __device__ void begin() {
    if (threadIdx.x < lists) shared_.list_size[threadIdx.x] = 0;
    const Mine mine = load();
    Team::await_peers();
    extent_ = survey(mine, 0);
  }
  __device__ bool only_greedy() const {
    return !(temperature_ >= greedy_below) && entries_begin_ == entries_end_ && num_logprobs_ < 0;
  }
  __device__ void finish_greedy() {
    set_token(extent_.best_id);
    if (p_.logprobs != nullptr) clear_logprobs_of_row();
  }
  __device__ void finish() {
    const bool wanted = num_logprobs_ >= 0;
    double log_sum = 0;
    if (wanted) log_sum = write_top_logprobs();
    if (entries_begin_ != entries_end_) {
      const Extent adjusted = survey(adjust(), 1);
      if (threadIdx.x == 0) extent_ = adjusted;  // the block has one of these by now
      __syncthreads();
    }
    if (temperature_ >= greedy_below && extent_.largest > low_infinity)
      draw();
    else
      set_token(extent_.best_id);
    if (wanted)
      write_sampled_logprob(log_sum);
    else if (p_.logprobs != nullptr)
      clear_logprobs_of_row();
  }

 private:
  using RowShare<Team>::p_;
  using RowShare<Team>::shared_;
  using RowShare<Team>::values_;
  using RowShare<Team>::row_;
  using RowShare<Team>::logits_;
  using RowShare<Team>::first_id_;
  using RowShare<Team>::size_;
  using RowShare<Team>::quads_;
  using RowShare<Team>::entries_begin_;
  using RowShare<Team>::entries_end_;
  using RowShare<Team>::num_logprobs_;
  using RowShare<Team>::temperature_;
  using RowShare<Team>::extent_;
  using RowShare<Team>::leads;
  using RowShare<Team>::raw_quad;
  using RowShare<Team>::load;
  using RowShare<Team>::each;
  using RowShare<Team>::adjust;
  using RowShare<Team>::survey;
  using RowShare<Team>::warp_min;

  // --- Lists, histograms, cuts

  // Puts candidates for which wanted(x, id) holds on the leader's list; returns
  // how many there are. Those beyond its capacity are only counted.
  template <class Wanted>
  __device__ int fill_list(int use, bool look, Wanted&& wanted) {
    int32_t* size = shared_.list_size + use;
    int32_t* size_at_leader = Team::peer(size, 0);
    Place* list = Team::peer(shared_.list, 0);
    if (look)
      each([&](float x, int id) {
        if (!wanted(x, id)) return;
        const int at = atomicAdd(size_at_leader, 1);
        if (at < list_capacity) list[at] = place_of(x, id);
      });
    Team::sync();
    return *size_at_leader;
  }

  // The histogram of what the filter keeps, summed over the blocks into
  // everyone's count, low and high.
  __device__ void fill_histogram(const Bins& b, const Filter& filter, bool by_weight, const Weight& weight) {
    __syncthreads();  // who still looks at the last one
    for (int i = threadIdx.x; i < bins; i += sample_threads) shared_.count[i] = shared_.low[i] = shared_.high[i] = 0;
    __syncthreads();
    each([&](float x, int id) {
      const int bin = b.of(x, id);
      if (bin >= bins || !filter.keeps(x, id)) return;
      atomicAdd(shared_.count + bin, 1u);
      if (!by_weight) return;
      const uint64_t mass = weight.mass(x);
      if (mass == 0) return;
      const uint32_t low = static_cast<uint32_t>(mass), before = atomicAdd(shared_.low + bin, low);
      const uint32_t high = static_cast<uint32_t>(mass >> 32) + (before + low < before ? 1u : 0u);
      if (high != 0) atomicAdd(shared_.high + bin, high);
    });
    Team::sync();
    if constexpr (Team::size > 1) {
      constexpr int slice = bins / Team::size;
      if (threadIdx.x < slice) {
        const int bin = Team::rank() * slice + static_cast<int>(threadIdx.x);
        uint32_t count = 0;
        uint64_t amount = 0;
#pragma unroll
        for (int other = 0; other < Team::size; ++other) {
          count += Team::peer(shared_.count, other)[bin];
          amount += Team::peer(shared_.low, other)[bin];
          amount += uint64_t{Team::peer(shared_.high, other)[bin]} << 32;
        }
        shared_.slice_count[threadIdx.x] = count, shared_.slice_amount[threadIdx.x] = amount;
      }
      Team::sync();
      for (int bin = threadIdx.x; bin < bins; bin += sample_threads) {
        const uint64_t amount = Team::peer(shared_.slice_amount, bin / slice)[bin % slice];
        shared_.count[bin] = Team::peer(shared_.slice_count, bin / slice)[bin % slice];
        shared_.low[bin] = static_cast<uint32_t>(amount), shared_.high[bin] = static_cast<uint32_t>(amount >> 32);
      }
      __syncthreads();
    }
  }

  // The filter cut to the smallest set of first places whose count reaches the target, or, by weight, whose weight does
  // that share of all that it kept. The same filter if all together do not.
  __device__ __noinline__ Filter cut(Filter filter, bool by_weight, Weight weight, double target, float reach,
                                     int use) {
    Bins b = extent_.largest > low_infinity
                 ? Bins::linear(extent_.largest, fminf(extent_.largest - extent_.lowest, reach))
                 : Bins::all_places();
    uint64_t left = static_cast<uint64_t>(target);  // to be reached among those not yet passed
    int bin = 0;
    for (bool first = true;; first = false) {
      fill_histogram(b, filter, by_weight, weight);
      const auto amount = [&](int i) {
        return by_weight ? uint64_t{shared_.high[i]} << 32 | shared_.low[i] : uint64_t{shared_.count[i]};
      };
      uint64_t before = 0, total = 0;
      if (first && by_weight) {
        first_reaching(bins, ~uint64_t{0}, before, total, shared_, amount);
        left = max(uint64_t{1}, static_cast<uint64_t>(ceil(target * static_cast<double>(total))));
      }
      bin = first_reaching(bins, left, before, total, shared_, amount);
      if (bin == bins) return filter;
      left -= before;
      if (shared_.count[bin] <= list_capacity) break;
      b = b.narrowed(bin);
    }
    const int n = fill_list(use, true, [&](float x, int id) { return b.of(x, id) == bin && filter.keeps(x, id); });
    if (leads()) {
      sort_list(n, shared_);
      uint64_t before = 0, total = 0;
      const int last = first_reaching(n, left, before, total, shared_, [&](int i) {
        return by_weight ? weight.mass(logit_at(shared_.list[i])) : uint64_t{1};
      });
      if (threadIdx.x < Team::size) *Team::peer(&shared_.cut, threadIdx.x) = shared_.list[min(last, n - 1)];
    }
    Team::sync();
    filter.cut_after(shared_.cut);
    return filter;
  }

  // The first k places, and perhaps more, in order on the leader's list;
  // returns how many there are. May leave out what is further than `reach`
  // below the largest.
  //
  // At least k candidates are as good as the k-th best of the threads' largest,
  // and few more than k: so only threads that have one look at their candidates
  // again.
  __device__ __noinline__ int select_top(int k, float reach, int use) {
    float largest[Team::size], lowest = no_candidate();
#pragma unroll
    for (int b = 0; b < Team::size; ++b) largest[b] = Team::peer(shared_.thread_largest, b)[threadIdx.x];
    for (int i = threadIdx.x; i < bins; i += sample_threads) shared_.count[i] = 0;
#pragma unroll
    for (int b = 0; b < Team::size; ++b)
      if (largest[b] > low_infinity) lowest = fminf(lowest, largest[b]);
    lowest = warp_min(lowest);
    if (threadIdx.x % warp_size == 0) shared_.warp_value[1][threadIdx.x / warp_size] = lowest;
    __syncthreads();
    lowest = warp_min(shared_.warp_value[1][threadIdx.x % sample_warps]);
    const Bins b = Bins::linear(extent_.largest, fminf(extent_.largest - lowest, reach));
#pragma unroll
    for (int other = 0; other < Team::size; ++other) {
      const int bin = b.of(largest[other], 0);
      if (bin < bins) atomicAdd(shared_.count + bin, 1u);
    }
    __syncthreads();
    uint64_t before = 0, total = 0;
    const int last = first_reaching(bins, static_cast<uint64_t>(k), before, total, shared_,
                                    [&](int i) { return uint64_t{shared_.count[i]}; });
    const float mine = shared_.thread_largest[threadIdx.x];
    int n = 0;
    if (last < bins)
      n = fill_list(use, b.of(mine, 0) <= last, [&](float x, int id) { return b.of(x, id) <= last; });
    else  // fewer threads than k have one
      n = fill_list(use, extent_.largest - mine <= reach, [&](float x, int) { return extent_.largest - x <= reach; });
    const bool short_of = n < k && !(reach < FLT_MAX);  // -inf, where that counts
    if (n > list_capacity || short_of) {
      const Filter filter = cut({}, false, {}, k, reach, use + 1);
      n = fill_list(use + 2, true,
                    [&](float x, int id) { return filter.keeps(x, id) && !(extent_.largest - x > reach); });
    }
    if (leads()) sort_list(n, shared_);
    return n;
  }

  // --- The draw

  __device__ void draw() {
    const float temperature = temperature_, top_p = p_.top_p[row_];
    const int top_k = p_.top_k[row_];
    const Weight weight{extent_.largest, inverse_ * log2_e};
    const float reach = out_of_reach * temperature;
    const double share = fmaxf(top_p, FLT_MIN);
    Filter filter;
    filter.lowest = lowest_kept(temperature);
    if (top_k > 0 && top_k <= list_capacity / 2) {
      const int n = min(top_k, select_top(top_k, reach, 3));
      if (leads()) draw_of_list(n, weight, top_p < 1.0f ? share : 0.0, filter.lowest);
      Team::sync();
      return;
    }
    const float lowest = filter.lowest;
    filter.lowest = low_infinity;
    if (top_k > 0 && top_k < p_.vocab) filter = cut(filter, false, weight, top_k, reach, 3);
    if (top_p < 1.0f) filter = cut(filter, true, weight, share, reach, 4);
    filter.lowest = lowest;
    draw_of_share(weight, filter);
  }

  // min-p as a bound on the logits.
  __device__ float lowest_kept(float temperature) const {
    const double share = p_.min_p[row_];
    if (!(share > 0.0)) return low_infinity;
    return static_cast<float>(static_cast<double>(extent_.largest) +
                              static_cast<double>(temperature) * log(fmin(1.0, share)));
  }

  // By the leader: of the first n places on its list, less what top-p cuts
  // (top_p > 0) and what is below `lowest`.
  __device__ void draw_of_list(int n, const Weight& weight, double top_p, float lowest) {
    if (top_p > 0.0) {
      const auto mass = [&](int i) { return weight.mass(logit_at(shared_.list[i])); };
      uint64_t before = 0, total = 0;
      first_reaching(n, ~uint64_t{0}, before, total, shared_, mass);
      const auto target = static_cast<uint64_t>(ceil(top_p * static_cast<double>(total)));
      n = min(n, 1 + first_reaching(n, max(uint64_t{1}, target), before, total, shared_, mass));
    }
    const uint64_t seed = p_.seeds[row_];
    const auto position = static_cast<uint32_t>(p_.positions[row_]);
    Best best;
    for (int i = threadIdx.x; i < n; i += sample_threads) {
      const float x = logit_at(shared_.list[i]);
      const int id = id_at(shared_.list[i]);
      if (x >= lowest)
        best.add(gumbel_of_token(seed, position, static_cast<uint32_t>(id)) + (x - extent_.largest) * inverse_, id);
    }
    set_token(over_block(best).id);
  }

  // The largest of (logit - largest) / temperature + noise, over all that the
  // filter keeps.
  __device__ __noinline__ void draw_of_share(Weight weight, Filter filter) {
    const uint64_t seed = p_.seeds[row_];
    const auto position = static_cast<uint32_t>(p_.positions[row_]);
    Best best;
    // What the best token scores, which is always kept, is to be beaten.
    float to_beat = gumbel_of_token(seed, position, static_cast<uint32_t>(extent_.best_id));
    const float lowest = fmaxf(filter.value, filter.lowest);
    for (int first = threadIdx.x / warp_size * warp_size; first < quads_; first += sample_threads) {
      const int q = first + static_cast<int>(threadIdx.x) % warp_size;
      Quad quad;
      float limit = -1.0f;
      if (q < quads_) {
        quad = values_[q];
        const float largest = quad.largest();
        // A noise of g or more takes a uniform number of at most exp(-g). 2^32
        // times that, with some slack:
        if (largest >= lowest)
          limit = exp2_rough((largest - extent_.largest) * weight.scale - to_beat * log2_e + 32.01f);
      }
      bool hopeful = limit >= 0.5f;
      PhiloxWords bits{};
      if (hopeful) {
        bits = philox(static_cast<uint32_t>(first_id_ / 4 + q), position, 0, 0, seed);
        const uint32_t least = min(min(bits[0], bits[1]), min(bits[2], bits[3]));
        hopeful = static_cast<float>(least) <= limit;
      }
      if (!__any_sync(0xffffffffu, hopeful)) continue;
      if (hopeful)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int id = first_id_ + 4 * q + j;
          if (static_cast<float>(bits[static_cast<size_t>(j)]) <= limit && filter.keeps(quad.x[j], id))
            best.add(gumbel(bits[static_cast<size_t>(j)]) + (quad.x[j] - extent_.largest) * inverse_, id);
        }
      to_beat = fmaxf(to_beat, warp_max(best.score));
    }
    best = over_block(best);
    if (threadIdx.x == 0) Team::peer(shared_.bests, 0)[Team::rank()] = best;
    Team::sync();
    if (!leads()) return;
    Best winner;
#pragma unroll
    for (int b = 0; b < Team::size; ++b) winner.add(shared_.bests[b].score, shared_.bests[b].id);
    set_token(winner.id);
  }
  __device__ static float exp2_rough(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  __device__ Best over_block(const Best& mine) {
    const Best best = mine.over_warp();
    __syncthreads();
    if (threadIdx.x % warp_size == 0) shared_.warp_best[threadIdx.x / warp_size] = best;
    __syncthreads();
    return shared_.warp_best[threadIdx.x % sample_warps].over_warp();
  }
  __device__ void set_token(int token) {
    if (!leads() || threadIdx.x != 0) return;
    p_.tokens[row_] = token;
    shared_.token = token;
  }

  // --- Log-probabilities

  __device__ float* logprobs() const { return p_.logprobs + row_ * p_.logprobs_row; }
  __device__ int32_t* logprob_ids() const { return p_.logprob_ids + row_ * p_.logprob_ids_row; }
  __device__ void clear_logprobs_of_row() const {
    if (!leads()) return;
    clear_logprobs(0);
    if (threadIdx.x == 0) p_.ranks[row_] = 0;
  }
  __device__ void clear_logprobs(int from) const {
    for (int i = from + static_cast<int>(threadIdx.x); i < p_.width; i += sample_threads)
      logprobs()[i] = 0.0f, logprob_ids()[i] = -1;
  }

  // Columns 1 .. n: the most likely tokens of the raw logits. The leader gets
  // the logarithm of the sum of their exponentials.
  __device__ __noinline__ double write_top_logprobs() {
    const bool finite = extent_.largest > low_infinity;  // else log-probabilities are -inf, not NaN
    const Weight weight{extent_.largest, finite ? log2_e : 0.0f};
    uint64_t mine = 0;
    each([&](float x, int) {
      if (x == x) mine += weight.mass(x);
    });
    const uint64_t all = sums_of_block(mine, shared_).total;
    if (threadIdx.x == 0) Team::peer(shared_.masses, 0)[Team::rank()] = all;
    Team::sync();
    const int n = min(min(num_logprobs_, p_.vocab), p_.width - 1);
    if (n > 0) select_top(n, -low_infinity, 0);
    double log_sum = 0;
    if (leads()) {
      clear_logprobs(1 + n);
      uint64_t total = 0;
#pragma unroll
      for (int b = 0; b < Team::size; ++b) total += shared_.masses[b];
      if (finite) log_sum = static_cast<double>(extent_.largest) + log(static_cast<double>(total) * 0x1p-40);
      for (int i = threadIdx.x; i < n; i += sample_threads) {
        logprobs()[1 + i] = static_cast<float>(static_cast<double>(logit_at(shared_.list[i])) - log_sum);
        logprob_ids()[1 + i] = id_at(shared_.list[i]);
      }
    }
    Team::sync();  // the list is free again
    return log_sum;
  }

  __device__ __noinline__ void write_sampled_logprob(double log_sum) {
    Team::sync();
    const int token = *Team::peer(&shared_.token, 0);
    const float logit = clean(logits_[token]);
    uint64_t larger = 0;
    for (int q = threadIdx.x; q < quads_; q += sample_threads) {
      const Quad quad = raw_quad(q);
#pragma unroll
      for (float x : quad.x) larger += x > logit;
    }
    const uint64_t all = sums_of_block(larger, shared_).total;
    if (threadIdx.x == 0) Team::peer(shared_.larger, 0)[Team::rank()] = static_cast<int32_t>(all);
    Team::sync();
    if (!leads() || threadIdx.x != 0) return;
    logprobs()[0] = static_cast<float>(static_cast<double>(logit) - log_sum);
    logprob_ids()[0] = token;
    int32_t rank = 1;
#pragma unroll
    for (int b = 0; b < Team::size; ++b) rank += shared_.larger[b];
    p_.ranks[row_] = rank;
  }

  float inverse_ = 1.0f / temperature_;
};

}  // namespace hybrid::cuda
