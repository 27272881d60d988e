// Paged attention of sequences with one query row each.
//
//   sequence   cut into units of 256 tokens (more above 16384, so that there are at most 64; 2048 at most)
//   unit       cut into tiles of 16 tokens; warp w of the block takes tiles w, w + 4, ...
//   block      takes a run of consecutive (sequence, KV head, unit); all runs are equally long in tiles
//
// The grid is fixed and lengths are read on the device, so the launch can be captured. A unit's result is a function of
// its own tokens and units merge from first to last, hence a row's bits depend on its own length alone, however the
// runs fall. A block that owns all units of a sequence's head writes its output; else the partial results go to scratch
// and the last block to arrive merges them. The query heads of a KV head are the rows of one m16n8k16 product (16 at a
// time), so K and V are read once. Every warp feeds itself by a ring of cp.async tiles: no block barrier inside a unit,
// and the next unit's first tiles are under way while the block merges the last one's sums. Moves the K and V of all
// tokens once: memory-bound.
#include "decode_tile.cuh"
#include "device.cuh"

namespace hybrid::cuda {

namespace {

constexpr int warps = 4, threads = warps * warp_size;
constexpr int most_seqs = 1024;  // of a launch
constexpr int shortest_unit = 256, longest_unit = 2048, most_units = 64;

__host__ __device__ constexpr int unit_length(int tokens) {
  int length = shortest_unit;
  while (length < longest_unit && tokens > length * most_units) length *= 2;
  return length;
}

constexpr int partial_floats(int rows, int dim) { return (rows * (dim + 2) + 1 + 3) / 4 * 4; }

// Shared memory: rings, then the block's running result, then where its sequences' tiles start.
template <int dim>
struct Shared {
  uint4* ring;
  float* total;           // [rows][dim]
  float* total_state;     // [2][rows][2]: largest and sum, the two halves in turn
  int32_t* tiles_before;  // [seqs + 1]
  __device__ Shared(void* base, int rows) {
    ring = static_cast<uint4*>(base);
    total = reinterpret_cast<float*>(ring + warps * DecodeRing<dim>::warp_packs);
    total_state = total + rows * dim;
    tiles_before = reinterpret_cast<int32_t*>(total_state + 4 * rows);
  }
  static size_t bytes(int rows, int seqs) {
    return size_t{warps} * DecodeRing<dim>::warp_packs * 16 + (static_cast<size_t>(rows) * (dim + 4) + seqs + 1) * 4;
  }
};

// tiles_before[i] = tiles of the sequences before i
template <class T>
__device__ void count_tiles(const AttentionParams<T>& p, int32_t* tiles_before) {
  __shared__ int32_t warp_total[warps];
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int each = (p.seqs + threads - 1) / threads, begin = min(p.seqs, static_cast<int>(threadIdx.x) * each),
            end = min(p.seqs, begin + each);
  const int64_t decodes = *p.num_decodes;
  int32_t mine = 0;
  for (int s = begin; s < end; ++s) {
    const int32_t* start = p.query_start + p.first_seq + s;
    const int32_t tokens = p.first_seq + s < decodes && start[1] > start[0] ? p.seq_lens[p.first_seq + s] : 0;
    mine += (max(tokens, 0) + tile - 1) / tile;
    tiles_before[s + 1] = mine;
  }
  int32_t before = mine;
#pragma unroll
  for (int step = 1; step < warp_size; step *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, before, step);
    if (lane >= step) before += other;
  }
  if (lane == warp_size - 1) warp_total[warp] = before;
  __syncthreads();
  before -= mine;
  for (int w = 0; w < warp; ++w) before += warp_total[w];
  for (int s = begin; s < end; ++s) tiles_before[s + 1] += before;
  if (threadIdx.x == 0) tiles_before[0] = 0;
  __syncthreads();
}

// Where a block stands: a sequence's KV head (and 16 query heads of it), and what that needs.
struct Place {
  int seq, head, row0, rows;  // row0: first query head of the group, rows: how many
  int tokens, tiles, unit_tiles, units;
  int64_t slot;  // of the first unit's partial result
};

// Units [first, last) of a place.
struct Run {
  Place at;
  int first, last;
};

// A warp's tiles of a unit: begin, begin + 4, ...
struct Tiles {
  int begin, count, block;  // block: lane i has the cache block of tile number i, of at most 32
};

template <class T, int dim>
class Decode {
 public:
  __device__ Decode(const AttentionParams<T>& p, void* shared, int rows)
      : p_(p), memory_(shared, rows), most_(rows), splits_((p.group + most_rows - 1) / most_rows) {}

  __device__ void run() {
    count_tiles(p_, memory_.tiles_before);
    heads_ = p_.kv_heads * splits_;
    const int64_t total = int64_t{memory_.tiles_before[p_.seqs]} * heads_;
    begin_ = total * blockIdx.x / gridDim.x, end_ = total * (blockIdx.x + 1) / gridDim.x;
    if (begin_ == end_) return;
    // The last sequence that starts at or before begin_.
    for (int step = most_seqs / 2; step > 0; step /= 2)
      if (seq_ + step < p_.seqs && start_of(seq_ + step) <= begin_) seq_ += step;
    const int tiles = memory_.tiles_before[seq_ + 1] - memory_.tiles_before[seq_];
    head_ = static_cast<int>((begin_ - start_of(seq_)) / tiles);

    Run now;
    if (!next_run(now)) return;
    Tiles tiles_now = find_tiles(now.at, now.first);
    start(now.at, tiles_now);
    while (true) {
      Run next;
      bool more = true;
      uint32_t q[dim / 16][4];
      load_query(q, now.at);
      for (int unit = now.first; unit < now.last; ++unit) {
        sum_unit(now.at, q, tiles_now);
        if (unit + 1 < now.last) {
          tiles_now = find_tiles(now.at, unit + 1);
          start(now.at, tiles_now);
        } else if ((more = next_run(next))) {
          tiles_now = find_tiles(next.at, next.first);
          start(next.at, tiles_now);
        }
        __syncthreads();
        merge_unit(now, unit);
        __syncthreads();
      }
      if (now.last - now.first < now.at.units) finish(now);
      if (!more) return;
      now = next;
    }
  }

 private:
  __device__ int64_t start_of(int seq) const { return int64_t{memory_.tiles_before[seq]} * heads_; }

  // The next units of one place among those that start in [begin_, end_).
  __device__ bool next_run(Run& run) {
    for (; seq_ < p_.seqs && start_of(seq_) < end_; ++seq_, head_ = 0) {
      const int tiles = memory_.tiles_before[seq_ + 1] - memory_.tiles_before[seq_];
      for (; tiles > 0 && head_ < heads_; ++head_) {
        const int64_t start = start_of(seq_) + int64_t{head_} * tiles;
        if (start >= end_) return false;
        run.at = place(seq_, head_, tiles);
        const auto units_before = [&](int64_t position) {
          const int64_t offset = min(max(position - start, int64_t{0}), int64_t{tiles});
          return static_cast<int>((offset + run.at.unit_tiles - 1) / run.at.unit_tiles);
        };
        run.first = units_before(begin_), run.last = units_before(end_);
        if (run.first == run.last) continue;
        ++head_;
        return true;
      }
    }
    return false;
  }

  __device__ Place place(int seq, int head, int tiles) const {
    Place at;
    at.seq = p_.first_seq + seq;
    at.head = head / splits_;
    at.row0 = head % splits_ * most_rows;
    at.rows = min(most_rows, p_.group - at.row0);
    at.tokens = p_.seq_lens[at.seq];
    at.tiles = tiles;
    at.unit_tiles = unit_length(at.tokens) / tile;
    at.units = (tiles + at.unit_tiles - 1) / at.unit_tiles;
    // kv_start bounds the units of the sequences before: no second prefix sum.
    at.slot = (int64_t{p_.kv_start[at.seq]} << p_.block_shift) / shortest_unit + seq;
    return at;
  }

  __device__ float* partial(const Place& at, int unit) const {
    const int64_t index = ((at.slot + unit) * p_.kv_heads + at.head) * splits_ + at.row0 / most_rows;
    return p_.partials + index * partial_floats(most_, dim);
  }

  __device__ void load_query(uint32_t (&q)[dim / 16][4], const Place& at) const {
    const int lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
    const T* from =
        p_.q + p_.query_start[at.seq] * p_.q_row + (int64_t{at.head} * p_.group + at.row0 + g) * p_.q_head + 2 * t;
    const auto word = [&](int64_t offset, bool valid) {
      return valid ? *reinterpret_cast<const uint32_t*>(from + offset) : 0u;
    };
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      q[k][0] = word(k * 16, g < at.rows);
      q[k][1] = word(k * 16 + 8 * p_.q_head, g + 8 < at.rows);
      q[k][2] = word(k * 16 + 8, g < at.rows);
      q[k][3] = word(k * 16 + 8 + 8 * p_.q_head, g + 8 < at.rows);
    }
  }

  // A tile of K and V into a stage of this warp's ring. `block`: the cache block that holds it.
  __device__ void load_tile(const Place& at, int first_token, int block, uint32_t stage) const {
    const int lane = threadIdx.x % warp_size;
    const int64_t token = int64_t{first_token & ((1 << p_.block_shift) - 1)} * dim;
    const T* keys = p_.k_cache + block * p_.k_block + at.head * p_.k_head + token;
    const T* values = p_.v_cache + block * p_.v_block + at.head * p_.v_head + token;
#pragma unroll
    for (int i = 0; i < dim / 16; ++i) {
      const int pack = i * warp_size + lane, row = pack / (dim / 8), column = pack % (dim / 8);
      const uint32_t to = stage + (row * row_packs<dim> + column) * 16;
      const bool valid = first_token + row < at.tokens;
      copy_async(to, keys + pack * 8, valid);
      copy_async(to + DecodeRing<dim>::packs * 16, values + pack * 8, valid);
    }
  }

  __device__ Tiles find_tiles(const Place& at, int unit) const {
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    Tiles tiles;
    tiles.begin = unit * at.unit_tiles + warp;
    const int end = min(at.tiles, (unit + 1) * at.unit_tiles);
    tiles.count = tiles.begin < end ? (end - tiles.begin + warps - 1) / warps : 0;
    tiles.block = 0;
    if (lane < tiles.count)
      tiles.block = p_.kv_blocks[p_.kv_start[at.seq] + ((tiles.begin + lane * warps) * tile >> p_.block_shift)];
    return tiles;
  }

  __device__ uint4* ring() const { return memory_.ring + threadIdx.x / warp_size * DecodeRing<dim>::warp_packs; }
  // Where warp w leaves its sums: the ring's last stage, which `start` does not touch.
  __device__ float* sums_of_warp(int w) const {
    static_assert(DecodeRing<dim>::stage_packs * 16 >= most_rows * (dim + 2) * static_cast<int>(sizeof(float)));
    return reinterpret_cast<float*>(memory_.ring + w * DecodeRing<dim>::warp_packs +
                                    (DecodeRing<dim>::depth - 1) * DecodeRing<dim>::stage_packs);
  }

  __device__ void load(const Place& at, const Tiles& tiles, int i, int stage) const {
    const int block = __shfl_sync(0xffffffffu, tiles.block, i & 31);
    if (i < tiles.count)
      load_tile(at, (tiles.begin + i * warps) * tile, block,
                shared_address(ring()) + stage * DecodeRing<dim>::stage_packs * 16);
    commit_copies();
  }
  __device__ void start(const Place& at, const Tiles& tiles) const {
    for (int i = 0; i < DecodeRing<dim>::depth - 1; ++i) load(at, tiles, i, i);
  }

  // This warp's tiles of a unit that has been started; their sums go to sums_of_warp.
  __device__ void sum_unit(const Place& at, const uint32_t (&q)[dim / 16][4], const Tiles& tiles) const {
    using Ring = DecodeRing<dim>;
    WarpState<T, dim> state;
    int stage = 0;
    for (int i = 0; i < tiles.count; ++i) {
      wait_copies<Ring::depth - 2>();
      __syncwarp();
      load(at, tiles, i + Ring::depth - 1, stage == 0 ? Ring::depth - 1 : stage - 1);
      const uint32_t keys = shared_address(ring()) + stage * Ring::stage_packs * 16;
      state.add_tile(q, keys, keys + Ring::packs * 16, (tiles.begin + i * warps) * tile, at.tokens, p_.scale_log2);
      stage = stage == Ring::depth - 1 ? 0 : stage + 1;
    }
    wait_copies<0>();
    __syncwarp();
    state.store(sums_of_warp(threadIdx.x / warp_size), at.rows);
  }

  // One element of the unit's result from the four warps.
  __device__ Partial unit_element(const Place& at, int row, int column) const {
    const auto of_warp = [&](int w) {
      const float* from = sums_of_warp(w);
      const float2 state = *reinterpret_cast<const float2*>(from + at.rows * dim + row * 2);
      return Partial{state.x, state.y, from[row * dim + column]};
    };
    Partial sum = of_warp(0);
#pragma unroll
    for (int w = 1; w < warps; ++w) sum = merge(sum, of_warp(w));
    return sum;
  }

  __device__ void write_out(const Place& at, int row, int column, const Partial& sum) const {
    p_.out[p_.query_start[at.seq] * p_.out_row + (int64_t{at.head} * p_.group + at.row0 + row) * p_.out_head + column] =
        from_float<T>(sum.out / sum.sum);
  }

  __device__ static void write_partial(float* to, int rows, int row, int column, const Partial& sum) {
    to[row * dim + column] = sum.out;
    if (column == 0) to[rows * dim + row * 2] = sum.largest, to[rows * dim + row * 2 + 1] = sum.sum;
  }

  // The unit's sums join the block's running result if the run began with the sequence's first unit; else they go to
  // scratch on their own.
  __device__ void merge_unit(const Run& run, int unit) const {
    const Place& at = run.at;
    const float* old_state = memory_.total_state + (unit + 1) % 2 * 2 * most_;
    float* new_state = memory_.total_state + unit % 2 * 2 * most_;
    const bool is_last = unit + 1 == run.last;
    for (int e = threadIdx.x; e < at.rows * dim; e += threads) {
      const int row = e / dim, column = e % dim;
      Partial sum = unit_element(at, row, column);
      if (run.first > 0) {
        write_partial(partial(at, unit), at.rows, row, column, sum);
        continue;
      }
      if (unit > 0) sum = merge({old_state[row * 2], old_state[row * 2 + 1], memory_.total[e]}, sum);
      if (is_last && run.last == at.units) {
        write_out(at, row, column, sum);
      } else if (is_last) {
        write_partial(partial(at, 0), at.rows, row, column, sum);
      } else {
        memory_.total[e] = sum.out;
        if (column == 0) new_state[row * 2] = sum.largest, new_state[row * 2 + 1] = sum.sum;
      }
    }
  }

  // The last block to bring its units of a place merges all of them, from first to last. Slot 0 holds as many units as
  // the block that began with the first one had; it says so behind its sums.
  __device__ void finish(const Run& run) const {
    const Place& at = run.at;
    const int brought = run.last - run.first;
    __shared__ bool is_last;
    int32_t* covered = reinterpret_cast<int32_t*>(partial(at, 0) + at.rows * (dim + 2));
    if (threadIdx.x == 0 && run.first == 0) *covered = run.last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      int32_t* counter = p_.counters + (int64_t{at.seq} * p_.kv_heads + at.head) * splits_ + at.row0 / most_rows;
      is_last = atomicAdd(counter, brought) + brought == at.units;
      if (is_last) *counter = 0;
      __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    const int begin = __ldcg(covered);
    for (int e = threadIdx.x; e < at.rows * dim; e += threads) {
      const int row = e / dim, column = e % dim;
      const auto of_unit = [&](int unit) {
        const float* from = partial(at, unit);
        return Partial{__ldcg(from + at.rows * dim + row * 2), __ldcg(from + at.rows * dim + row * 2 + 1),
                       __ldcg(from + e)};
      };
      Partial sum = of_unit(0);
#pragma unroll 4
      for (int unit = begin; unit < at.units; ++unit) sum = merge(sum, of_unit(unit));
      write_out(at, row, column, sum);
    }
  }

  const AttentionParams<T>& p_;
  Shared<dim> memory_;
  int most_, splits_, heads_ = 0;
  int64_t begin_ = 0, end_ = 0;  // this block's share of all tiles, in the order sequence, head, tile
  int seq_ = 0, head_ = 0;       // where next_run goes on
};

template <class T, int dim>
__global__ void __launch_bounds__(threads) paged_decode_kernel(const __grid_constant__ AttentionParams<T> p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  extern __shared__ uint4 shared[];
  Decode<T, dim>(p, shared, min(p.group, most_rows)).run();
}

}  // namespace

template <class T>
void paged_decode(const AttentionParams<T>& all, int64_t cache_tokens, Stream stream) {
  by_head_dim(all.dim, [&]<int head_dim>() {
    AttentionParams<T> p = all;
    const int rows = std::min(p.group, most_rows);
    const int64_t places = int64_t{p.kv_heads} * ceil_div(p.group, most_rows);
    const int64_t slots = cache_tokens / shortest_unit + std::min(p.seqs, most_seqs);
    p.partials = static_cast<float*>(
        scratch(static_cast<size_t>(slots * places * partial_floats(rows, head_dim)) * sizeof(float), stream));
    p.counters = zeroed_counters(static_cast<size_t>(p.seqs * places), stream);
    for (int first = 0; first < all.seqs; first += most_seqs) {
      p.first_seq = first;
      p.seqs = std::min(all.seqs - first, most_seqs);
      const size_t bytes = Shared<head_dim>::bytes(rows, p.seqs);
      const int64_t blocks =
          std::clamp<int64_t>(shared_bytes_per_multiprocessor() / (static_cast<int64_t>(bytes) + 1024), 1, 4);
      launch(paged_decode_kernel<T, head_dim>, static_cast<unsigned>(blocks * multiprocessors()), threads, bytes,
             stream, p);
    }
  });
}

template void paged_decode<BFloat16>(const AttentionParams<BFloat16>&, int64_t, Stream);
template void paged_decode<Float16>(const AttentionParams<Float16>&, int64_t, Stream);

}  // namespace hybrid::cuda
