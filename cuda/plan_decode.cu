// plan_decode: cuts the decodes of a step into units and divides them over the blocks of paged_decode
// (decode_plan.cuh).
//
// One block: beginnings that decodes share are cut into shares of work; then a prefix sum over the sequences, then
// every sequence's thread lists its units and every other thread finds where a block starts. Unlike other kernels it
// lets its successor start only when its result is written: whatever is launched behind it may read the plan, the
// columns it read and everything else that earlier kernels wrote before waiting for its own predecessor. paged_decode
// does: old keys and values are on their way while the layer still computes the new ones.
#include <bit>

#include "decode_plan.cuh"
#include "launch.cuh"
#include "paged_prefill.cuh"
#include "reduce.cuh"

namespace hybrid::cuda {

namespace {

constexpr int threads = 1024;
constexpr int64_t most_seqs = 16384;  // prefix sums in shared memory

struct PlanParams {
  int32_t* plan;
  DecodeColumns columns;
};

// Sums of the values of all threads before this one; `total`: of all.
__device__ uint64_t sum_before(uint64_t mine, uint64_t& total) {
  __shared__ uint64_t warp_sums[warp_size];
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const auto scan = [lane](uint64_t x) {
#pragma unroll
    for (int step = 1; step < warp_size; step *= 2) {
      const uint64_t other = __shfl_up_sync(0xffffffffu, x, step);
      if (lane >= step) x += other;
    }
    return x;
  };
  const uint64_t in_warp = scan(mine);
  if (lane == warp_size - 1) warp_sums[warp] = in_warp;
  __syncthreads();
  if (warp == 0) warp_sums[lane] = scan(warp_sums[lane]);
  __syncthreads();
  const uint64_t before = in_warp - mine + (warp > 0 ? warp_sums[warp - 1] : 0);
  total = warp_sums[warp_size - 1];
  __syncthreads();
  return before;
}

// The last i in [0, count) with value(i) <= x; value(0) <= x and values ascend.
template <class Value>
__device__ int last_at_most(int64_t x, int count, Value&& value) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (value(middle) <= x ? low : high) = middle;
  }
  return low;
}

// Decodes with the same beginning.
struct Group {
  int32_t first, tokens, parts;  // first decode; how many tokens are read for all, in how many parts
};

// Cuts the beginnings of groups into shares that keep all multiprocessors busy; by the whole block. Longer shares cost
// less to merge. A thread a group.
__device__ void plan_prefixes(const PlanView& plan, const DecodeColumns& p, int decodes, int count, Group* groups) {
  constexpr int shortest = 4, longest = 16;  // share, in granules
  constexpr int most_parts = 32;             // of a row; they are merged one after the other
  static_assert(most_sharers <= threads);
  const int g = threadIdx.x;
  Group group{};
  int seqs = 0, tiles = 0;  // a tile: rows of a share
  if (g < count) {
    group.first = p.prefix_start[g], seqs = p.prefix_start[g + 1] - group.first;
    group.tokens = seqs > 1 ? p.prefix_lens[g] & -p.granule : 0;
    tiles = (seqs * p.group + p.share_rows - 1) / p.share_rows;
  }
  const int granules = group.tokens / p.granule;
  uint64_t total;
  sum_before(static_cast<uint64_t>(tiles) * granules, total);
  int64_t most = static_cast<int64_t>(total) * p.kv_heads / p.multiprocessors + 1;
  most = min(int64_t{longest}, max(int64_t{shortest}, most));
  int length = 1;
  uint64_t before;
  for (;; most *= 2) {
    group.parts = static_cast<int>((granules + most - 1) / most);
    if (granules > 0) {
      length = (granules + group.parts - 1) / group.parts;
      group.parts = (granules + length - 1) / length;
    }
    before = sum_before(static_cast<uint64_t>(tiles) * group.parts, total);
    if (!__syncthreads_or(total > most_sharers || group.parts > most_parts || group.parts * decodes > most_sharers))
      break;
  }
  __shared__ int row_parts;
  if (g == 0) row_parts = 0;
  __syncthreads();
  atomicMax(&row_parts, group.parts);
  if (g < count) groups[g] = group;
  __syncthreads();
  if (g == 0) *plan.prefix_shares = static_cast<int32_t>(total), *plan.row_parts = row_parts;
  PrefixShare* out = plan.prefix_share + before;
  for (int part = 0; part < group.parts; ++part)
    for (int tile = 0; tile < tiles; ++tile) {
      const int first_token = part * length * p.granule;
      *out++ = {p.query_start[group.first],
                tile * p.share_rows,
                seqs * p.group,
                p.kv_start[group.first] + (first_token >> p.block_shift),
                min(length * p.granule, group.tokens - first_token),
                part,
                {}};
    }
}

__global__ void __launch_bounds__(threads) plan_decode_kernel(const __grid_constant__ PlanParams params) {
  wait_for_previous_kernel();
  // Before sequence s, in the high half the tiles and in the low half the units of all earlier ones.
  extern __shared__ uint64_t before[];
  const PlanView plan(params.plan);
  const DecodeColumns& p = params.columns;
  const int seqs = static_cast<int>(min(int64_t{p.seqs}, *p.num_decodes));
  Group* groups = reinterpret_cast<Group*>(before + p.seqs + 1);
  const int prefixes = p.prefix_start != nullptr && seqs > 0 ? static_cast<int>(*p.num_prefixes) : 0;
  if (p.prefix_start != nullptr) plan_prefixes(plan, p, seqs, prefixes, groups);
  const auto group_of = [&](int s) {
    if (prefixes == 0) return Group{};
    return groups[last_at_most(s, prefixes, [&](int g) { return int64_t{groups[g].first}; })];
  };
  uint64_t total = 0;
  for (int first = 0; first < seqs; first += threads) {
    const int s = first + static_cast<int>(threadIdx.x);
    DecodeUnit unit{};
    int units = 0;
    if (s < seqs) {
      unit.row = p.query_start[s], unit.kv_start = p.kv_start[s];
      unit.tokens = p.query_start[s + 1] > unit.row ? max(p.seq_lens[s], 0) : 0;
      if (const Group group = group_of(s); group.tokens > 0) {
        unit.kv_start += group.tokens >> p.block_shift, unit.tokens -= group.tokens;
        unit.packed = group.parts << 24;
      }
      const int log2 = unit_log2(unit.tokens);
      units = static_cast<int>((int64_t{unit.tokens} + (1 << log2) - 1) >> log2);
      unit.packed |= units << 8 | log2 << 16;
    }
    const uint64_t mine = (static_cast<uint64_t>((int64_t{unit.tokens} + tile - 1) / tile) << 32) | units;
    uint64_t all;
    const uint64_t start = total + sum_before(mine, all);
    if (s < seqs) before[s] = start;
    for (int i = 0; i < units; ++i, ++unit.packed) plan.unit[static_cast<uint32_t>(start) + i] = unit;
    total += all;
  }
  if (threadIdx.x == 0) before[seqs] = total, *plan.units = static_cast<int32_t>(total);
  __syncthreads();

  const int64_t tiles = static_cast<int64_t>(total >> 32);
  const int units = static_cast<int>(total);
  const auto first_unit = [&](int s) { return static_cast<int>(static_cast<uint32_t>(before[s])); };
  const auto first_tile = [&](int s) { return static_cast<int64_t>(before[s] >> 32); };
  // The first unit that starts at or behind this block's share of the tiles, and its index among its sequence's.
  const auto start_of = [&](int block, int& index) {
    const int64_t share = tiles * p.places * block / p.blocks;
    index = 0;
    if (share == tiles * p.places) return p.places * units;
    const int head = static_cast<int>(share / tiles);
    const int64_t at = share % tiles;
    const int s = last_at_most(at, seqs, first_tile);
    const int64_t offset = at - first_tile(s), unit_tiles = (1 << unit_log2(p.seq_lens[s] - group_of(s).tokens)) / tile;
    const int here = first_unit(s + 1) - first_unit(s);
    index = static_cast<int>((offset + unit_tiles - 1) / unit_tiles);
    const int unit = first_unit(s) + index;
    if (index == here) index = 0;
    return head * units + unit;
  };
  __shared__ int32_t begins[PlanView::most_blocks + 1];
  int index = 0;
  const int block = threadIdx.x;  // there are fewer than threads
  if (block <= p.blocks) begins[block] = start_of(block, index);
  __syncthreads();
  if (block <= p.blocks)
    plan.starts[block] = {begins[block],
                          last_at_most(begins[block] - index, p.blocks + 1, [&](int b) { return int64_t{begins[b]}; })};
  __threadfence();
  __syncthreads();
  let_next_kernel_start();
}

}  // namespace

void launch_plan_decode(int32_t* plan, const DecodeColumns& c, Stream stream) {
  require(c.seqs <= most_seqs, "plan_decode: ", c.seqs, " sequences, at most ", most_seqs, " fit");
  launch(plan_decode_kernel, 1, threads,
         static_cast<size_t>(c.seqs + 1) * sizeof(uint64_t) + (c.prefix_start != nullptr ? threads * sizeof(Group) : 0),
         stream, PlanParams{plan, c});
}

void plan_decode(const PlanDecode& a) {
  if (a.max_decodes == 0) return;
  require(reinterpret_cast<uintptr_t>(a.plan.data) % 16 == 0, "plan_decode: plan must be 16-byte aligned");
  DecodeColumns c{.query_start = a.query_start.as<int32_t>(),
                  .seq_lens = a.seq_lens.as<int32_t>(),
                  .kv_start = a.kv_start.as<int32_t>(),
                  .num_decodes = a.num_decodes.as<int64_t>(),
                  .seqs = static_cast<int>(std::min(a.max_decodes, a.seq_lens.shape[0])),
                  .places = decode_places(a.heads, a.kv_heads),
                  .blocks = static_cast<int>(decode_blocks(a.head_dim))};
  if (a.num_prefixes.defined()) {
    require(a.block_size > 0 && std::has_single_bit(static_cast<uint64_t>(a.block_size)), "plan_decode: block size ",
            a.block_size, ", expected a power of two");
    c.block_shift = std::countr_zero(static_cast<uint64_t>(a.block_size));
    c.group = static_cast<int>(a.heads / a.kv_heads), c.kv_heads = static_cast<int>(a.kv_heads);
    c.share_rows = prefill_share_rows(a.head_dim), c.multiprocessors = static_cast<int>(multiprocessors());
    c.granule = static_cast<int>(std::max<int64_t>(128, a.block_size));
    // Every group of two or more then has as many shares as decodes at most.
    if (c.seqs <= most_sharers && 2 * c.group <= c.share_rows) {
      c.prefix_start = a.prefix_start.as<int32_t>(), c.prefix_lens = a.prefix_lens.as<int32_t>();
      c.num_prefixes = a.num_prefixes.as<int64_t>();
    }
  }
  launch_plan_decode(a.plan.as<int32_t>(), c, a.stream);
}

}  // namespace hybrid::cuda
