// What the warps of linear_sm90.cu have in common, and the one that loads.
#pragma once

#include "linear.cuh"
#include "reduce.cuh"
#include "tile_copy.cuh"
#include "tile_shares.cuh"

namespace hybrid::cuda::tiles {

constexpr int group_threads = 128;
constexpr int slice = 64, row_bytes = slice * 2;  // of k
constexpr int tile_columns = 128;                 // of the output: rows of the weight
constexpr int most_stages = 12, most_shared_bytes = 227 * 1024;

template <class T>
struct Params {
  LinearParams<T> linear;
  Schedule schedule;
  int x_tiles;
  bool once;        // x has one tile, so that the weight is read once
  bool fours;       // outputs of a row can be stored four at a time
  float4* partial;  // [block][first or second tile cut][8 rows of x][thread]
  int32_t* counters;
  CUtensorMap weight_map, x_map;
};

// A tile is of `columns` of the output (gated: half gate's, half up's) and `rows` of x. Deep rings: under load a copy
// takes 1.5 us.
template <int rows_, int cluster_, bool gated_>
struct Tile {
  static constexpr int columns = tile_columns, rows = rows_, cluster = cluster_;
  static constexpr bool gated = gated_;
  static constexpr int computing_threads = columns / 64 * group_threads, threads = group_threads + computing_threads;
  static constexpr int strips = columns / 16;  // of a computing warp each
  static constexpr int weight_bytes = columns * row_bytes, x_bytes = rows * row_bytes;
  static constexpr int stage_bytes = weight_bytes + x_bytes;
  static constexpr int stages = std::min(most_stages, (most_shared_bytes - 1024 - most_stages * 16) / stage_bytes);
  static constexpr int bytes = stages * stage_bytes + Ring<stages>::barriers * 8 + 1024;  // the start is rounded up

  __device__ static int cluster_index() { return static_cast<int>(blockIdx.x) / cluster; }
  __device__ static int rank() { return static_cast<int>(blockIdx.x) % cluster; }
};

// Where things lie in shared memory: a stage is a slice of the weight, then of x.
template <class Tile>
struct Layout {
  using Stages = Ring<Tile::stages>;
  uint32_t start;
  Stages ring;

  __device__ explicit Layout(uint32_t start) : start(start), ring{start + Tile::stages * Tile::stage_bytes} {}
  __device__ uint32_t weight(uint32_t n) const { return start + Stages::stage(n) * Tile::stage_bytes; }
  __device__ uint32_t x(uint32_t n) const { return weight(n) + Tile::weight_bytes; }
};

// The slices of a cluster's shares, one after the other.
struct Slices {
  Shares shares;
  Share share;
  int at;
  bool more;

  __device__ Slices(const Schedule& schedule, int cluster) : shares(schedule, cluster) {
    more = shares.next(share), at = share.begin;
  }
  __device__ void advance() {
    if (++at == share.end) more = shares.next(share), at = share.begin;
  }
};

// One warp: fills the ring.
template <class T, class Tile>
__device__ void load_slices(const Params<T>& params, const Layout<Tile>& layout) {
  Slices ahead(params.schedule, Tile::cluster_index());
  const bool leads = threadIdx.x == 0;
  const uint64_t policy = read_once();
  uint32_t n = 0;
  const auto load_weight = [&] {
    const int tile = ahead.share.tile / params.x_tiles * Tile::cluster + Tile::rank();
    arrive_expecting(layout.ring.full(n), Tile::stage_bytes);
    const int row = Tile::gated ? 0 : tile * Tile::columns, group = Tile::gated ? tile * Tile::strips : 0;
    if (params.once)
      copy_box(layout.weight(n), &params.weight_map, ahead.at * slice, row, 0, group, layout.ring.full(n), policy);
    else
      copy_box(layout.weight(n), &params.weight_map, ahead.at * slice, row, 0, group, layout.ring.full(n));
  };
  const auto load_x = [&](const Slices& slices, uint32_t i) {
    constexpr int part = Tile::rows / Tile::cluster;
    const int row = slices.share.tile % params.x_tiles * Tile::rows + Tile::rank() * part;
    const uint32_t to = layout.x(i) + Tile::rank() * part * row_bytes;
    if constexpr (Tile::cluster == 1)
      copy_box(to, &params.x_map, slices.at * slice, row, 0, 0, layout.ring.full(i));
    else
      copy_box_to_all<Tile::cluster>(to, &params.x_map, slices.at * slice, row, 0, 0, layout.ring.full(i));
  };
  if (leads)
    for (; n < Tile::stages && ahead.more; ++n, ahead.advance()) load_weight();
  __syncwarp();
  wait_for_previous_kernel();
  if constexpr (Tile::cluster > 1) wait_for_cluster();  // the others' barriers are ready
  if (leads) {
    Slices behind(params.schedule, Tile::cluster_index());
    for (uint32_t i = 0; i < n; ++i, behind.advance()) load_x(behind, i);
    for (; ahead.more; ++n, ahead.advance()) {
      layout.ring.wait_empty(n);
      load_weight();
      load_x(ahead, n);
    }
  }
  __syncwarp();
}

}  // namespace hybrid::cuda::tiles
