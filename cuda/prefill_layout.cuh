// What the warps of prefill_sm90.cuh have in common: their numbers, and where things lie in shared memory.
#pragma once

#include "prefill_share.cuh"
#include "tile_copy.cuh"

namespace hybrid::cuda::prefill {

constexpr int group_threads = 128, group_rows = 64, query_threads = 2 * warp_size;
constexpr int tile_tokens = 128;
constexpr int slots = 2;           // shares, with their queries, that are under way
constexpr int column_bytes = 128;  // a tile's rows are cut into columns of 64 elements, each swizzled on its own

template <class T, class C>
struct Params {
  AttentionParams<T, C> attention;
  int box_tokens;     // of a copy, all from one cache block
  bool maps_queries;  // whether the copy engine brings them, by q_map
  CUtensorMap k_map, v_map, q_map;
};

// Where things lie in shared memory. `widens`: the cache is of Float8, and tiles of it come to rings of their own
// first.
template <int dim, bool widens>
struct Layout {
  // Of computing warpgroups as many as there are registers for.
  static constexpr int groups = dim == 64 ? 3 : 2, share_rows = groups * group_rows;
  static constexpr int threads = (1 + groups) * group_threads;
  static constexpr int producer_registers = groups == 3 ? 32 : 40, consumer_registers = groups == 3 ? 160 : 232;
  static constexpr int columns = dim / 64;
  // Of the rings: as many as there is memory for. K is needed a step before V.
  static constexpr int k_stages = dim == 64 ? 4 : widens ? 2 : 3, v_stages = dim == 64 ? 4 : 2;
  // Stages hold a whole tile, or half of one.
  static constexpr int raw_stages = widens ? 2 : 0, raw_bytes = 8192, raw_tokens = raw_bytes / dim;
  static constexpr int query_column = share_rows * column_bytes, kv_column = tile_tokens * column_bytes;
  static constexpr int query_bytes = columns * query_column, kv_bytes = columns * kv_column;
  static constexpr int keys = slots * query_bytes, values = keys + k_stages * kv_bytes;
  static constexpr int raw = values + v_stages * kv_bytes;
  static constexpr int barriers = raw + 2 * raw_stages * raw_bytes;
  static constexpr int shares = barriers + (2 * Ring<slots>::barriers + Ring<k_stages>::barriers +
                                            Ring<v_stages>::barriers + 2 * Ring<raw_stages>::barriers) *
                                               8;
  static constexpr int bytes = shares + slots * static_cast<int>(sizeof(Share)) + 1024;  // the start is rounded up

  uint32_t start;
  Ring<slots> work, queries;
  Ring<k_stages> k;
  Ring<v_stages> v;
  Ring<raw_stages> raw_k, raw_v;

  // Shares' emptiers are the computing warps, who need no more queries then either.
  __device__ explicit Layout(uint32_t start)
      : start(start),
        work{start + barriers},
        queries{work.barrier + Ring<slots>::barriers * 8},
        k{queries.barrier + Ring<slots>::barriers * 8},
        v{k.barrier + Ring<k_stages>::barriers * 8},
        raw_k{v.barrier + Ring<v_stages>::barriers * 8},
        raw_v{raw_k.barrier + Ring<raw_stages>::barriers * 8} {}
  __device__ void init_barriers(bool maps_queries) const {
    constexpr int computing_warps = groups * group_threads / warp_size;
    work.init(1, computing_warps);
    // Who loads queries, and others for having read the share: the warp of V, or the two that widen.
    if constexpr (widens) {
      queries.init(3 * warp_size, 1);
      raw_k.init(1, 1);
      raw_v.init(1, 1);
    } else {
      queries.init(warp_size + (maps_queries ? warp_size : query_threads), 1);
    }
    k.init(1, computing_warps);
    v.init(1, computing_warps);
    publish_barriers();
  }
  __device__ uint32_t query_tile(uint32_t n) const { return start + n % slots * query_bytes; }
  __device__ uint32_t key_tile(uint32_t n) const { return start + keys + n % k_stages * kv_bytes; }
  __device__ uint32_t value_tile(uint32_t n) const { return start + values + n % v_stages * kv_bytes; }
  __device__ uint32_t raw_keys() const { return start + raw; }
  __device__ uint32_t raw_values() const { return start + raw + raw_stages * raw_bytes; }
};

}  // namespace hybrid::cuda::prefill
