// Paged attention of sequences with one query row each.
//
//   plan       cuts every sequence into units by its length alone and gives each block a run of them (decode_plan.cuh)
//   unit       cut into steps of 16 or 32 tokens; warp w of the block takes steps w, w + 4, ...
//   block      reads its run of units as one stream of steps
//
// The grid is fixed and lengths are read on the device, so the launch can be captured. A unit's result is a function of
// its own tokens and units merge from first to last, hence a row's bits depend on its own length alone, however the
// runs fall. A block that has all units of a sequence's head writes its output; else the partial results go to scratch
// and the last block to arrive merges them. The query heads of a KV head are columns of one m16n8k16 product (two for
// more than 8, at most 16 a block), so K and V are read once. Every warp feeds itself by a ring of cp.async that runs
// on over units and sequences. Moves the K and V of all tokens once: memory-bound.
//
// A beginning that decodes share is no part of their units (decode_plan.cuh): paged_prefixes, launched ahead, has
// summed it up for each row, and the row's first unit is merged to that. How it was cut depends on who shares it, and
// so do the bits of these rows.
//
// What may be read before wait_for_previous_kernel(): plan_decode started no kernel before it and all work ahead of it
// had ended, so the plan, the block tables and the keys and values of earlier steps are final when this kernel starts.
// Of the cache, this step's earlier kernels write the newest token of each sequence only. So the ring is filled at once
// with steps that do not hold it: in the best case all K and V are here when the layer's query is.
#pragma once

#include "decode_feed.cuh"

namespace hybrid::cuda {

namespace decode {

constexpr int warps = decode_warps, threads = warps * warp_size;

__host__ __device__ constexpr int slot_floats(int rows, int dim) { return rows * dim + (rows + 1) / 2 * 4; }

// Four neighbouring elements of a Partial.
struct Partial4 {
  float largest, sum;
  float4 out;
};

__device__ inline float4 weigh(const float4& a, float keep_a, const float4& b, float keep_b) {
  return {__fmaf_rn(a.x, keep_a, __fmul_rn(b.x, keep_b)), __fmaf_rn(a.y, keep_a, __fmul_rn(b.y, keep_b)),
          __fmaf_rn(a.z, keep_a, __fmul_rn(b.z, keep_b)), __fmaf_rn(a.w, keep_a, __fmul_rn(b.w, keep_b))};
}
__device__ inline Partial4 merge(const Partial4& a, const Partial4& b) {
  const float largest = fmaxf(a.largest, b.largest);
  const float keep_a = exp2_of(a.largest - largest), keep_b = exp2_of(b.largest - largest);
  return {largest, __fmaf_rn(a.sum, keep_a, __fmul_rn(b.sum, keep_b)), weigh(a.out, keep_a, b.out, keep_b)};
}

template <class T, class C, int dim, int most>
class Decode {
  using Shape = DecodeShape<C, dim, most>;
  using State = WarpState<C, dim, most>;
  using Feed = Feed<T, C, dim, Shape>;
  static constexpr int elements = (most * dim / 4 + threads - 1) / threads;  // groups of four of a thread

 public:
  __device__ Decode(const DecodeParams<T, C>& p, uint4* shared)
      : p_(p),
        lane_(threadIdx.x % warp_size),
        warp_(threadIdx.x / warp_size),
        plan_(p.plan),
        ring_(shared_address(shared + warp_ * Shape::ring_packs)),
        sums_(reinterpret_cast<float*>(shared + warps * Shape::ring_packs)),
        is_last_(reinterpret_cast<bool*>(sums_ + warps * most * Shape::row_floats)) {}

  __device__ void run() {
    const int2 start = __ldcg(reinterpret_cast<const int2*>(plan_.starts + blockIdx.x));
    end_ = __ldcg(&plan_.starts[blockIdx.x + 1].begin);
    units_ = __ldcg(plan_.units), row_parts_ = __ldcg(plan_.row_parts);
    int position = start.x;
    if (position == end_) return wait_for_previous_kernel();
    at_ = {position % units_, position / units_};
    Feed feed(p_, plan_, units_, at_, end_ - position, ring_);
    int early = 0;
    for (; early < Shape::depth - 1 && feed.is_final(); ++early) feed.load(early);
    now_ = read_unit(plan_, at_.unit);
    begin_unit();
    first_ = now_.index();
    origin_ = first_ > 0 ? start.y : blockIdx.x;
    origin_end_ = __ldcg(&plan_.starts[origin_ + 1].begin);
    wait_for_previous_kernel();
    for (; early < Shape::depth - 1; ++early) feed.load(early);

    typename State::Query q;
    load_query(q);
    fetch_prefix(0, total_);
    while (true) {
      Position next_at = at_;
      next_at.advance(units_);
      const DecodeUnit next = read_unit(plan_, next_at.unit);
      sum_unit(q, feed);
      fetch_prefix(1, second_);
      __syncthreads();
      const bool more = ++position < end_;
      const int done = now_.index() + 1;
      merge_unit(!more);
      __syncthreads();
      if (done - first_ < now_.units() && (done == now_.units() || !more)) finish(position - done);
      if (!more) return;
      now_ = next, at_ = next_at;
      begin_unit();
      if (now_.index() == 0) {
        load_query(q);
        fetch_prefix(0, total_);
        first_ = 0, origin_ = blockIdx.x, origin_end_ = end_;
      }
    }
  }

 private:
  __device__ void begin_unit() {
    head_ = at_.place / p_.splits, row0_ = at_.place % p_.splits * most_rows;
    rows_ = min(most_rows, p_.group - row0_);
  }

  __device__ void load_query(typename State::Query& q) const {
    const int g = lane_ / 4, t = lane_ % 4;
    const T* from = p_.q + now_.row * p_.q_row + (int64_t{head_} * p_.group + row0_ + g) * p_.q_head;
#pragma unroll
    for (int e = 0; e < State::eights; ++e) {
      const bool valid = e * 8 + g < rows_;
#pragma unroll
      for (int i = 0; i < dim / 8; ++i) {
        const int column = i / 2 * 16 + State::Element::query_dim(t, i % 2);
        q[e][i / 2][i % 2] = query_pair<T, typename State::Math>(
            valid ? *reinterpret_cast<const uint32_t*>(from + e * 8 * p_.q_head + column) : 0u);
      }
    }
  }

  // This warp's steps of a unit; what they sum to goes to shared memory.
  __device__ void sum_unit(const typename State::Query& q, Feed& feed) {
    State state;
    const int end = now_.end();
    for (int token = now_.first() + warp_ * Shape::step; token < end; token += warps * Shape::step) {
      wait_copies<Shape::depth - 2>();
      __syncwarp();
      feed.load(stage_ == 0 ? Shape::depth - 1 : stage_ - 1);
      const uint32_t keys = ring_ + stage_ * Shape::stage_packs * 16;
      state.add(q, keys, keys + Shape::packs * 16, token, now_.tokens, p_.scale_log2);
      stage_ = stage_ == Shape::depth - 1 ? 0 : stage_ + 1;
    }
    state.store(sums_ + warp_ * most * Shape::row_floats, rows_);
  }

  // body(number, row, first of four columns, index of these four) of this thread.
  template <class Body>
  __device__ void for_elements(Body&& body) const {
#pragma unroll
    for (int n = 0; n < elements; ++n) {
      const int i = n * threads + static_cast<int>(threadIdx.x);
      if (i < rows_ * (dim / 4)) body(n, i / (dim / 4), i % (dim / 4) * 4, i);
    }
  }

  // The warps' sums of a unit as one.
  __device__ Partial4 unit_sum(int row, int column) const {
    const float* from = sums_ + row * Shape::row_floats;
    float2 state[warps];
    Partial4 all{minus_infinity, 0.0f, {}};
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      state[w] = *reinterpret_cast<const float2*>(from + w * most * Shape::row_floats + dim);
      all.largest = fmaxf(all.largest, state[w].x);
    }
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      const float keep = exp2_of(state[w].x - all.largest);
      all.sum = __fmaf_rn(state[w].y, keep, all.sum);
      all.out =
          weigh(*reinterpret_cast<const float4*>(from + w * most * Shape::row_floats + column), keep, all.out, 1.0f);
    }
    return all;
  }

  __device__ void write_out(int row, int column, const float4& out, float sum) const {
    const int64_t at = now_.row * p_.out_row + (int64_t{head_} * p_.group + row0_ + row) * p_.out_head + column;
    *reinterpret_cast<uint2*>(p_.out + at) = make_uint2(pair_of<T>(out.x / sum * p_.v_scale, out.y / sum * p_.v_scale),
                                                        pair_of<T>(out.z / sum * p_.v_scale, out.w / sum * p_.v_scale));
  }

  // Of a unit of the sequence's head at hand, in the slots of the block that has its first unit.
  __device__ float* slot(int unit) const {
    const int rows = min(p_.group, most_rows);
    return p_.partials + (int64_t{origin_} * most_units + unit) * slot_floats(rows, dim);
  }

  // Part i of what paged_prefixes summed up for the unit's row.
  __device__ Partial4 prefix(int i, int row, int column) const {
    const int heads = p_.kv_heads * p_.group, head = head_ * p_.group + row0_ + row;
    const float* part = p_.prefixes + (int64_t{now_.row} * row_parts_ + i) * part_floats(heads, dim);
    const float2 state = __ldcg(reinterpret_cast<const float2*>(part + heads * dim) + head);
    return {state.x, state.y, __ldcg(reinterpret_cast<const float4*>(part + head * dim + column))};
  }
  // Before the first unit of a sequence's head: part 0 is on its way while the unit is summed up, part 1 while the
  // block waits for its last warp, when registers are free.
  __device__ void fetch_prefix(int part, Partial4 (&to)[elements]) {
    if (now_.index() == 0 && part < now_.parts())
      for_elements([&](int n, int row, int column, int) { to[n] = prefix(part, row, column); });
  }
  __device__ Partial4 add_prefix(int n, const Partial4& unit, int row, int column) const {
    Partial4 all = total_[n];
    if (now_.parts() > 1) all = merge(all, second_[n]);
    for (int i = 2; i < now_.parts(); ++i) all = merge(all, prefix(i, row, column));
    return merge(all, unit);
  }

  // The unit's sums join the block's running result if that began with the sequence's first unit; else they go to
  // scratch on their own.
  __device__ void merge_unit(bool is_last_here) {
    const int unit = now_.index();
    const bool is_alone = first_ > 0, is_last = unit + 1 == now_.units();
    for_elements([&](int n, int row, int column, int i) {
      Partial4 sum = unit_sum(row, column);
      if (unit == 0 && now_.parts() > 0) sum = add_prefix(n, sum, row, column);
      if (!is_alone && unit > 0) sum = merge(total_[n], sum);
      total_[n] = sum;
      if (!is_alone && is_last) {
        write_out(row, column, sum.out, sum.sum);
      } else if (is_alone || is_last_here) {
        float* to = slot(is_alone ? unit : 0);
        __stcg(reinterpret_cast<float4*>(to) + i, sum.out);
        if (column == 0) __stcg(reinterpret_cast<float2*>(to + rows_ * dim) + row, make_float2(sum.largest, sum.sum));
      }
    });
  }

  // The last block to bring its units of a sequence's head merges all of them, from first to last. Slot 0 holds as many
  // units as the block that began with the first one had; the others hold one each. `start`: position of the first.
  __device__ void finish(int start) const {
    if (threadIdx.x == 0) {
      const int units = now_.units(), brought = now_.index() + 1 - first_;
      *is_last_ = add_acquire_release(p_.counters + origin_, brought) + brought == units;
      if (*is_last_) p_.counters[origin_] = 0;
    }
    __syncthreads();
    if (!*is_last_) return;
    const int covered = origin_end_ - start, count = now_.units() - covered + 1;
    const auto from = [&](int i) { return slot(i == 0 ? 0 : covered + i - 1); };
    constexpr int batch = 8;
    float4 parts[batch];
    const auto fetch = [&](int first, int e) {
#pragma unroll
      for (int i = 0; i < batch; ++i)
        if (first + i < count) parts[i] = __ldcg(reinterpret_cast<const float4*>(from(first + i)) + e);
    };
    // On their way while the states are looked at.
    if (static_cast<int>(threadIdx.x) < rows_ * (dim / 4)) fetch(0, threadIdx.x);
    find_keeps(count, from);
    __syncthreads();
    const float4* keeps = reinterpret_cast<const float4*>(sums_);
    for_elements([&](int n, int row, int column, int e) {
      float4 out{};
      float sum = 0.0f;
      if (n > 0) fetch(0, e);
      for (int first = 0; first < count; first += batch) {
        if (first > 0) fetch(first, e);
#pragma unroll
        for (int i = 0; i < batch; ++i)
          if (first + i < count) {
            const float4 keep = keeps[row * most_units + first + i];
            out = weigh(out, keep.x, parts[i], keep.y);
            sum = __fmaf_rn(sum, keep.x, keep.z);
          }
      }
      write_out(row, column, out, sum);
    });
    __syncthreads();
  }

  // For each row and slot: what merging it to those before keeps of them and of it, and its sum's share.
  template <class From>
  __device__ void find_keeps(int count, From&& from) const {
    float4* keeps = reinterpret_cast<float4*>(sums_);  // [rows][most_units]
    static_assert(most_units * 16 <= warps * Shape::row_floats * 4 && most_units == warp_size);
    for (int row = warp_; row < rows_; row += warps) {
      float2 state = make_float2(minus_infinity, 0.0f);
      if (lane_ < count) state = __ldcg(reinterpret_cast<const float2*>(from(lane_) + rows_ * dim) + row);
      float largest = state.x;
#pragma unroll
      for (int step = 1; step < warp_size; step *= 2) {
        const float other = __shfl_up_sync(0xffffffffu, largest, step);
        if (lane_ >= step) largest = fmaxf(largest, other);
      }
      float before = __shfl_up_sync(0xffffffffu, largest, 1);
      if (lane_ == 0) before = minus_infinity;
      const float keep = exp2_of(state.x - largest);
      keeps[row * most_units + lane_] = make_float4(exp2_of(before - largest), keep, __fmul_rn(state.y, keep), 0.0f);
    }
  }

  // All that this block wrote is seen by who sees the sum, and all that others added for is seen by this block.
  __device__ static int add_acquire_release(int32_t* counter, int value) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
    return before;
  }

  const DecodeParams<T, C>& p_;
  int lane_, warp_;
  PlanView plan_;
  uint32_t ring_;
  float* sums_;  // [warps][most][row_floats]; while units of other blocks are merged: what is kept of them
  bool* is_last_;
  int units_ = 0, row_parts_ = 0, end_ = 0;  // of the plan; where the block's run ends
  int stage_ = 0;                            // next to be read
  // The unit at hand, and which query heads of which KV head.
  Position at_;
  DecodeUnit now_;
  int head_, row0_, rows_;
  int first_, origin_, origin_end_;  // unit that the block began this head with; who has the first one, until where
  Partial4 total_[elements];         // from the first unit on; before it, part 0 of what lies ahead
  Partial4 second_[elements];        // part 1 of that
};

template <class T, class C, int dim, int most>
__global__ void __launch_bounds__(threads, decode_blocks_per_multiprocessor(dim))
    paged_decode_kernel(const __grid_constant__ DecodeParams<T, C> p) {
  let_next_kernel_start();
  extern __shared__ __align__(1024) uint4 shared[];
  Decode<T, C, dim, most>(p, shared).run();
}

}  // namespace decode

template <class T, class C>
void paged_decode(AttentionParams<T, C> p, int64_t max_decodes, bool shares_prefixes, Stream stream) {
  by_head_dim(p.dim, [&]<int head_dim>() {
    const int rows = std::min(p.group, most_rows);
    const int64_t blocks = decode_blocks(head_dim), splits = ceil_div(p.group, most_rows);
    const auto floats_bytes = [](int64_t floats) { return static_cast<size_t>(ceil_div(floats, 64) * 256); };
    const size_t partial_bytes = floats_bytes(blocks * most_units * decode::slot_floats(rows, head_dim)),
                 prefix_bytes =
                     shares_prefixes ? floats_bytes(most_sharers * part_floats(p.kv_heads * p.group, head_dim)) : 0,
                 plan_bytes = p.plan == nullptr ? static_cast<size_t>(decode_plan_size(max_decodes)) * 4 : 0;
    char* memory = static_cast<char*>(scratch(partial_bytes + prefix_bytes + plan_bytes, stream));
    if (p.plan == nullptr) {
      p.plan = reinterpret_cast<int32_t*>(memory + partial_bytes + prefix_bytes);
      launch_plan_decode(p.plan,
                         {.query_start = p.query_start,
                          .seq_lens = p.seq_lens,
                          .kv_start = p.kv_start,
                          .num_decodes = p.num_decodes,
                          .seqs = static_cast<int>(std::min<int64_t>(p.seqs, max_decodes)),
                          .places = static_cast<int>(p.kv_heads * splits),
                          .blocks = static_cast<int>(blocks)},
                         stream);
    }
    if (shares_prefixes) {
      p.prefixes = reinterpret_cast<float*>(memory + partial_bytes);
      paged_prefixes(p, stream);
    }
    const DecodeParams<T, C> params{p, reinterpret_cast<float*>(memory),
                                    zeroed_counters(static_cast<size_t>(blocks), stream), static_cast<int>(splits)};
    const auto start = [&]<int most>() {
      launch(decode::paged_decode_kernel<T, C, head_dim, most>, static_cast<unsigned>(blocks), decode::threads,
             DecodeShape<C, head_dim, most>::shared_bytes, stream, params);
    };
    rows <= 8 ? start.template operator()<8>() : start.template operator()<16>();
  });
}

}  // namespace hybrid::cuda
