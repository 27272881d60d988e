// Paged attention of sequences with one query row each.
//
//   plan       cuts every sequence into units by its length alone and gives each block a run of them (decode_plan.cuh)
//   unit       cut into tiles of 16 tokens; warp w of the block takes tiles w, w + 4, ...
//   block      reads its run of units as one stream of tiles
//
// The grid is fixed and lengths are read on the device, so the launch can be captured. A unit's result is a function of
// its own tokens and units merge from first to last, hence a row's bits depend on its own length alone, however the
// runs fall. A block that has all units of a sequence's head writes its output; else the partial results go to scratch
// and the last block to arrive merges them. The query heads of a KV head are the rows of one m16n8k16 product (16 at a
// time), so K and V are read once. Every warp feeds itself by a ring of cp.async tiles that runs on over units and
// sequences. Moves the K and V of all tokens once: memory-bound.
//
// What may be read before wait_for_previous_kernel(): plan_decode started no kernel before it and all work ahead of it
// had ended, so the plan, the block tables and the keys and values of earlier steps are final when this kernel starts.
// Of the cache, this step's earlier kernels write the newest token of each sequence only. So the ring is filled at once
// with tiles that do not hold it: in the best case all K and V are here when the layer's query is.
#include "decode_tile.cuh"

namespace hybrid::cuda {

namespace {

constexpr int warps = 4, threads = warps * warp_size;

template <class T>
struct DecodeParams : AttentionParams<T> {
  int32_t* plan;
  float* partials;    // most_units slots for each block that has the first unit of a sequence's head and not the last
  int32_t* counters;  // of such: units that have arrived
  int splits;         // (16 query heads) of a KV head
};

__host__ __device__ constexpr int slot_floats(int rows, int dim) { return rows * dim + (rows + 1) / 2 * 4; }

// Shared memory: rings, what the warps summed over a unit, and the block's running result.
template <int dim>
struct Shared {
  static constexpr int row_floats = WarpState<BFloat16, dim>::row_floats;
  uint4* ring;
  float* sums;          // [warps][rows][row_floats]; while units of other blocks are merged: their weights
  float4* total;        // [rows][dim / 4], each element of one thread only
  float2* total_state;  // [rows][dim / 4]: largest and sum, of the same thread
  __device__ Shared(void* base, int rows) {
    ring = static_cast<uint4*>(base);
    sums = reinterpret_cast<float*>(ring + warps * DecodeRing<dim>::warp_packs);
    total = reinterpret_cast<float4*>(sums + warps * rows * row_floats);
    total_state = reinterpret_cast<float2*>(total + rows * dim / 4);
  }
  static size_t bytes(int rows) {
    return size_t{warps} * DecodeRing<dim>::warp_packs * 16 +
           static_cast<size_t>(rows) * (warps * row_floats * 4 + dim / 4 * 24);
  }
};

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

// A unit and the KV head and query heads of it that a position of the plan stands for.
struct Work {
  DecodeUnit unit;
  int head, row0;  // row0: first query head of the group
  int tiles;       // of the unit
  __device__ int first_token() const { return unit.index * unit_length(unit.tokens); }
};

template <class T, int dim>
class Decode {
  using Layout = TileLayout<dim>;
  using Ring = DecodeRing<dim>;
  using State = WarpState<T, dim>;

 public:
  __device__ Decode(const DecodeParams<T>& p, void* shared, int rows)
      : p_(p),
        memory_(shared, rows),
        most_(rows),
        lane_(threadIdx.x % warp_size),
        warp_(threadIdx.x / warp_size),
        plan_(p.plan),
        ring_(shared_address(memory_.ring + warp_ * Ring::warp_packs)) {}

  __device__ void run() {
    const int2 start = __ldcg(reinterpret_cast<const int2*>(plan_.starts + blockIdx.x));
    begin_ = start.x, origin_ = start.y, end_ = __ldcg(&plan_.starts[blockIdx.x + 1].begin);
    units_ = __ldcg(plan_.units);
    if (begin_ == end_) return wait_for_previous_kernel();
    open_stream();
    int early = 0;
    for (; early < Ring::depth - 1 && is_tile_final(); ++early) load_tile(early);
    wait_for_previous_kernel();
    for (; early < Ring::depth - 1; ++early) load_tile(early);

    uint32_t q[dim / 16][4];
    Work now = work_at(begin_, unit_at(begin_));
    first_ = now.unit.index;
    load_query(q, now);
    for (int position = begin_;;) {
      DecodeUnit next{};
      const bool more = position + 1 < end_;
      if (more) next = unit_at(position + 1);
      sum_unit(now, q);
      __syncthreads();
      const int units = units_of(now);
      const bool is_place_done = now.unit.index + 1 == units || !more;
      merge_unit(now, units, is_place_done);
      __syncthreads();
      if (is_place_done && now.unit.index + 1 - first_ < units) finish(now, position, units);
      if (!more) return;
      now = work_at(++position, next);
      if (now.unit.index == 0) load_query(q, now), first_ = 0;
    }
  }

 private:
  // The plan.

  __device__ DecodeUnit unit_at(int position) const {
    const int4 u = __ldcg(reinterpret_cast<const int4*>(plan_.unit + position % units_));
    return {u.x, u.y, u.z, u.w};
  }
  __device__ Work work_at(int position, const DecodeUnit& unit) const {
    const int place = position / units_, length = unit_length(unit.tokens);
    return {unit, place / p_.splits, place % p_.splits * most_rows,
            (min(unit.tokens - unit.index * length, length) + tile - 1) / tile};
  }
  __device__ static int units_of(const Work& work) {
    const int length = unit_length(work.unit.tokens);
    return work.unit.tokens / length + (work.unit.tokens % length > 0);
  }
  __device__ int rows_of(const Work& work) const { return min(most_rows, p_.group - work.row0); }
  // Tiles of a unit that are this warp's: warp, warp + 4, ...
  __device__ int tiles_of_warp(const Work& work) const { return (work.tiles - warp_ + warps - 1) / warps; }

  // The stream of tiles to load: one unit being loaded, the next one's block table and the description of the one after
  // it on their way.

  __device__ void open_stream() {
    at_ = begin_;
    source_ = work_at(at_, unit_at(at_));
    blocks_ = find_blocks(source_, 0);
    ahead_ = unit_at(min(at_ + 1, end_ - 1));
    blocks_ahead_ = find_blocks(work_at(min(at_ + 1, end_ - 1), ahead_), 0);
    far_ = unit_at(min(at_ + 2, end_ - 1));
    skip_empty();
  }
  __device__ void next_source() {
    ++at_, tile_ = 0;
    if (at_ >= end_) return;
    source_ = work_at(at_, ahead_);
    blocks_ = blocks_ahead_, ahead_ = far_;
    blocks_ahead_ = find_blocks(work_at(min(at_ + 1, end_ - 1), ahead_), 0);
    far_ = unit_at(min(at_ + 2, end_ - 1));
  }
  __device__ void skip_empty() {
    while (at_ < end_ && tile_ == tiles_of_warp(source_)) next_source();
  }
  // Lane i gets the cache block of this warp's tile number from + i.
  __device__ int find_blocks(const Work& work, int from) const {
    const int i = from + lane_;
    if (i >= tiles_of_warp(work)) return 0;
    const int token = work.first_token() + (warp_ + i * warps) * tile;
    return __ldcg(p_.kv_blocks + work.unit.kv_start + (token >> p_.block_shift));
  }
  // Is the next tile without the newest token?
  __device__ bool is_tile_final() const {
    return at_ < end_ && source_.first_token() + (warp_ + tile_ * warps) * tile + tile < source_.unit.tokens;
  }
  // The next tile of K and V into a stage. One group of copies, empty behind the last one.
  __device__ void load_tile(int stage) {
    if (at_ < end_) {
      if (tile_ > 0 && tile_ % warp_size == 0) blocks_ = find_blocks(source_, tile_);
      const int block = __shfl_sync(0xffffffffu, blocks_, tile_ % warp_size);
      const int first = source_.first_token() + (warp_ + tile_ * warps) * tile;
      const int64_t token = int64_t{first & ((1 << p_.block_shift) - 1)} * dim;
      const T* keys = p_.k_cache + block * p_.k_block + source_.head * p_.k_head + token;
      const T* values = p_.v_cache + block * p_.v_block + source_.head * p_.v_head + token;
      const uint32_t to = ring_ + stage * Ring::stage_packs * 16;
#pragma unroll
      for (int i = 0; i < dim / 16; ++i) {
        const int pack = i * warp_size + lane_, row = pack / (dim / 8);
        const uint32_t place = to + Layout::pack(row, pack % (dim / 8)) * 16;
        const bool valid = first + row < source_.unit.tokens;
        copy_async(place, keys + pack * 8, valid);
        copy_async(place + Layout::packs * 16, values + pack * 8, valid);
      }
      ++tile_;
      skip_empty();
    }
    commit_copies();
  }

  __device__ void load_query(uint32_t (&q)[dim / 16][4], const Work& work) const {
    const int g = lane_ / 4, t = lane_ % 4, rows = rows_of(work);
    const T* from =
        p_.q + work.unit.row * p_.q_row + (int64_t{work.head} * p_.group + work.row0 + g) * p_.q_head + 2 * t;
    const auto word = [&](int64_t offset, bool valid) {
      return valid ? *reinterpret_cast<const uint32_t*>(from + offset) : 0u;
    };
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      q[k][0] = word(k * 16, g < rows);
      q[k][1] = word(k * 16 + 8 * p_.q_head, g + 8 < rows);
      q[k][2] = word(k * 16 + 8, g < rows);
      q[k][3] = word(k * 16 + 8 + 8 * p_.q_head, g + 8 < rows);
    }
  }

  // This warp's tiles of a unit; what they sum to goes to shared memory.
  __device__ void sum_unit(const Work& work, const uint32_t (&q)[dim / 16][4]) {
    State state;
    const int count = tiles_of_warp(work);
    int first = work.first_token() + warp_ * tile;
    for (int i = 0; i < count; ++i, first += warps * tile) {
      wait_copies<Ring::depth - 2>();
      __syncwarp();
      load_tile(stage_ == 0 ? Ring::depth - 1 : stage_ - 1);
      const uint32_t keys = ring_ + stage_ * Ring::stage_packs * 16;
      state.add_tile(q, keys, keys + Layout::packs * 16, first, work.unit.tokens, p_.scale_log2);
      stage_ = stage_ == Ring::depth - 1 ? 0 : stage_ + 1;
    }
    state.store(memory_.sums + warp_ * most_ * State::row_floats, rows_of(work));
  }

  // body(row, first of four columns, index of these four) of this thread.
  template <class Body>
  __device__ void for_elements(int rows, Body&& body) const {
    for (int i = threadIdx.x; i < rows * (dim / 4); i += threads) body(i / (dim / 4), i % (dim / 4) * 4, i);
  }

  __device__ Partial4 unit_sum(int row, int column) const {
    const auto of_warp = [&](int w) {
      const float* from = memory_.sums + (w * most_ + row) * State::row_floats;
      const float2 state = *reinterpret_cast<const float2*>(from + dim);
      return Partial4{state.x, state.y, *reinterpret_cast<const float4*>(from + column)};
    };
    Partial4 sum = of_warp(0);
#pragma unroll
    for (int w = 1; w < warps; ++w) sum = merge(sum, of_warp(w));
    return sum;
  }

  __device__ void write_out(const Work& work, int row, int column, const float4& out, float sum) const {
    const int64_t at =
        work.unit.row * p_.out_row + (int64_t{work.head} * p_.group + work.row0 + row) * p_.out_head + column;
    *reinterpret_cast<uint2*>(p_.out + at) =
        make_uint2(pair_of<T>(out.x / sum, out.y / sum), pair_of<T>(out.z / sum, out.w / sum));
  }

  // The block that has the first unit of the sequence's head that `now` belongs to names its slots.
  __device__ float* slot(int origin, int unit) const {
    return p_.partials + (int64_t{origin} * most_units + unit) * slot_floats(most_, dim);
  }
  __device__ int origin_of() const { return first_ > 0 ? origin_ : blockIdx.x; }

  // The unit's sums join the block's running result if that began with the sequence's first unit; else they go to
  // scratch on their own.
  __device__ void merge_unit(const Work& work, int units, bool is_last_here) const {
    const int unit = work.unit.index, rows = rows_of(work);
    for_elements(rows, [&](int row, int column, int i) {
      Partial4 sum = unit_sum(row, column);
      const bool is_alone = first_ > 0;
      if (!is_alone && unit > 0)
        sum = merge({memory_.total_state[i].x, memory_.total_state[i].y, memory_.total[i]}, sum);
      if (!is_alone && unit + 1 == units) {
        write_out(work, row, column, sum.out, sum.sum);
      } else if (is_alone || is_last_here) {
        float* to = slot(origin_of(), is_alone ? unit : 0);
        __stcg(reinterpret_cast<float4*>(to) + i, sum.out);
        if (column == 0) __stcg(reinterpret_cast<float2*>(to + rows * dim) + row, make_float2(sum.largest, sum.sum));
      } else {
        memory_.total[i] = sum.out, memory_.total_state[i] = make_float2(sum.largest, sum.sum);
      }
    });
  }

  // The last block to bring its units of a sequence's head merges all of them, from first to last. Slot 0 holds as many
  // units as the block that began with the first one had; the others hold one each.
  __device__ void finish(const Work& work, int position, int units) const {
    __shared__ bool is_last;
    const int origin = origin_of(), rows = rows_of(work);
    if (threadIdx.x == 0) {
      __threadfence();
      const int brought = work.unit.index + 1 - first_;
      is_last = atomicAdd(p_.counters + origin, brought) + brought == units;
      if (is_last) p_.counters[origin] = 0;
      __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    const int covered = __ldcg(&plan_.starts[origin + 1].begin) - (position - work.unit.index);
    const int count = units - covered + 1;
    const auto from = [&](int i) { return slot(origin, i == 0 ? 0 : covered + i - 1); };
    // What merging would keep of the sums so far and of this slot, for all at once.
    float4* keep = reinterpret_cast<float4*>(memory_.sums);  // [rows][most_units]
    static_assert(most_units * 16 <= warps * State::row_floats * 4 && most_units == 2 * warp_size);
    for (int row = warp_; row < rows; row += warps) {
      float before = minus_infinity;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = half * warp_size + lane_;
        float2 state = make_float2(minus_infinity, 0.0f);
        if (i < count) state = __ldcg(reinterpret_cast<const float2*>(from(i) + rows * dim) + row);
        float largest = fmaxf(state.x, before);
#pragma unroll
        for (int step = 1; step < warp_size; step *= 2) {
          const float other = __shfl_up_sync(0xffffffffu, largest, step);
          if (lane_ >= step) largest = fmaxf(largest, other);
        }
        float previous = __shfl_up_sync(0xffffffffu, largest, 1);
        if (lane_ == 0) previous = before;
        const float keep_this = exp2_of(state.x - largest);
        if (i < count)
          keep[row * most_units + i] =
              make_float4(exp2_of(previous - largest), keep_this, __fmul_rn(state.y, keep_this), 0.0f);
        before = __shfl_sync(0xffffffffu, largest, warp_size - 1);
      }
    }
    __syncthreads();
    for_elements(rows, [&](int row, int column, int e) {
      float4 out{};
      float sum = 0.0f;
#pragma unroll 8
      for (int i = 0; i < count; ++i) {
        const float4 part = __ldcg(reinterpret_cast<const float4*>(from(i)) + e), k = keep[row * most_units + i];
        out = weigh(out, k.x, part, k.y);
        sum = __fmaf_rn(sum, k.x, k.z);
      }
      write_out(work, row, column, out, sum);
    });
    __syncthreads();
  }

  const DecodeParams<T>& p_;
  Shared<dim> memory_;
  int most_, lane_, warp_;
  PlanView plan_;
  uint32_t ring_;
  int begin_ = 0, end_ = 0, origin_ = 0, units_ = 0;
  int first_ = 0;  // unit that this block began the current sequence's head with
  int stage_ = 0;  // next to be read
  // What is to be loaded next: tile number tile_ of this warp in unit source_ at position at_.
  int at_ = 0, tile_ = 0, blocks_ = 0, blocks_ahead_ = 0;
  Work source_;
  DecodeUnit ahead_, far_;
};

template <class T, int dim>
__global__ void __launch_bounds__(threads) paged_decode_kernel(const __grid_constant__ DecodeParams<T> p) {
  let_next_kernel_start();
  extern __shared__ __align__(1024) uint4 shared[];
  Decode<T, dim>(p, shared, min(p.group, most_rows)).run();
}

}  // namespace

template <class T>
void paged_decode(const AttentionParams<T>& attention, int64_t max_decodes, int32_t* plan, Stream stream) {
  by_head_dim(attention.dim, [&]<int head_dim>() {
    const int rows = std::min(attention.group, most_rows);
    const int64_t blocks = decode_blocks(), splits = ceil_div(attention.group, most_rows);
    const size_t partial_bytes = static_cast<size_t>(blocks * most_units * slot_floats(rows, head_dim)) * sizeof(float),
                 plan_bytes = plan == nullptr ? static_cast<size_t>(decode_plan_size(max_decodes)) * 4 : 0;
    char* memory = static_cast<char*>(scratch(partial_bytes + plan_bytes, stream));
    if (plan == nullptr) {
      plan = reinterpret_cast<int32_t*>(memory + partial_bytes);
      launch_plan_decode(plan,
                         {attention.query_start, attention.seq_lens, attention.kv_start, attention.num_decodes,
                          static_cast<int>(std::min<int64_t>(attention.seqs, max_decodes)),
                          static_cast<int>(attention.kv_heads * splits)},
                         stream);
    }
    launch(paged_decode_kernel<T, head_dim>, static_cast<unsigned>(blocks), threads, Shared<head_dim>::bytes(rows),
           stream,
           DecodeParams<T>{attention, plan, reinterpret_cast<float*>(memory),
                           zeroed_counters(static_cast<size_t>(blocks), stream), static_cast<int>(splits)});
  });
}

template void paged_decode<BFloat16>(const AttentionParams<BFloat16>&, int64_t, int32_t*, Stream);
template void paged_decode<Float16>(const AttentionParams<Float16>&, int64_t, int32_t*, Stream);

}  // namespace hybrid::cuda
