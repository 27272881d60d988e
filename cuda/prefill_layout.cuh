// What the warps of paged_prefill_sm90.cu have in common: their numbers, and where things lie in shared memory.
#pragma once

#include "prefill_share.cuh"
#include "tile_copy.cuh"

namespace hybrid::cuda::prefill {

constexpr int group_threads = 128, group_rows = 64, query_threads = 2 * warp_size;
constexpr int tile_tokens = 128, stages = 2;  // of the rings of K and V
constexpr int slots = 2;                      // shares, with their queries, that are under way
constexpr int column_bytes = 128;  // a tile's rows are cut into columns of 64 elements, each swizzled on its own

template <class T>
struct Params {
  AttentionParams<T> attention;
  int box_tokens;  // of a copy, all from one cache block
  CUtensorMap k_map, v_map;
};

// Where things lie in shared memory.
template <int dim>
struct Layout {
  // Of computing warpgroups as many as there are registers for.
  static constexpr int groups = dim == 64 ? 3 : 2, share_rows = groups * group_rows;
  static constexpr int threads = (1 + groups) * group_threads;
  static constexpr int producer_registers = groups == 3 ? 32 : 40, consumer_registers = groups == 3 ? 160 : 232;
  static constexpr int columns = dim / 64;
  static constexpr int query_column = share_rows * column_bytes, kv_column = tile_tokens * column_bytes;
  static constexpr int query_bytes = columns * query_column, kv_bytes = columns * kv_column;
  static constexpr int keys = slots * query_bytes, values = keys + stages * kv_bytes;
  static constexpr int barriers = values + stages * kv_bytes;
  static constexpr int shares = barriers + 2 * (Ring<slots>::barriers + Ring<stages>::barriers) * 8;
  static constexpr int bytes = shares + slots * static_cast<int>(sizeof(Share)) + 1024;  // the start is rounded up

  uint32_t start;
  Ring<slots> work, queries;
  Ring<stages> k, v;

  // Shares' emptiers are the computing warps, who need no more queries then either.
  __device__ explicit Layout(uint32_t start)
      : start(start),
        work{start + barriers},
        queries{work.barrier + Ring<slots>::barriers * 8},
        k{queries.barrier + Ring<slots>::barriers * 8},
        v{k.barrier + Ring<stages>::barriers * 8} {}
  __device__ void init_barriers() const {
    constexpr int computing_warps = groups * group_threads / warp_size;
    work.init(1, computing_warps);
    queries.init(query_threads + warp_size, 1);  // and the warp of V, for having read the share
    k.init(1, computing_warps);
    v.init(1, computing_warps);
    publish_barriers();
  }
  __device__ uint32_t query_tile(uint32_t n) const { return start + n % slots * query_bytes; }
  __device__ uint32_t key_tile(uint32_t n) const { return start + keys + n % stages * kv_bytes; }
  __device__ uint32_t value_tile(uint32_t n) const { return start + values + n % stages * kv_bytes; }
};

}  // namespace hybrid::cuda::prefill
