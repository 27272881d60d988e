// linear on Hopper for more rows than gemv.cu takes: out^T = weight . x^T, 64 rows of the weight as the rows of a
// warpgroup product, the rows of x as its columns.
//
// A block stays on its multiprocessor. One warp has the copy engine fill a ring with slices of 64 along k of a tile of
// the weight and of x; two warpgroups multiply 64 rows of the weight each. No kernel writes weights, so the ring's
// weights are asked for before the wait for the previous kernel. Blocks of a cluster take neighbouring tiles of the
// weight at the same time, and each reads a part of x for all.
// Tiles that are too few to go round are cut along k (tile_shares.cuh). Each block leaves its part of the sums in
// memory; those whose last work it is wait for the others and add up a part of the tile each, in the order of k. Nobody
// waits for work that another has not begun, and all run at a time, so the waits end: a launch has a block a
// multiprocessor at most, and a cluster of two is a pair that all of a Hopper's multiprocessors come in.
// Memory-bound up to some 256 rows, then compute-bound: 2 x rows x n x k operations.
#include "device.cuh"
#include "linear_consumer.cuh"
#include "linear_sm90.cuh"

namespace hybrid::cuda {

namespace tiles {

// Only sm_90a has these instructions; has_wgmma() keeps other devices, and builds without sm_90a, away from here.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads, 1) warpgroup_linear_kernel(const __grid_constant__ Params<T> params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr bool clustered = Tile::cluster > 1;
  extern __shared__ uint4 shared[];
  const Layout<Tile> layout((shared_address(shared) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    layout.ring.init(1, Tile::cluster * Tile::strips);
    publish_barriers();
    prefetch_map(&params.weight_map);
    prefetch_map(&params.x_map);
  }
  __syncthreads();
  if constexpr (clustered) arrive_in_cluster();
  let_next_kernel_start();
  if (threadIdx.x < group_threads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x < warp_size)
      load_slices<T, Tile>(params, layout);
    else if constexpr (clustered)
      wait_for_cluster();
    // Nobody leaves while others copy to it or release its stages.
    if constexpr (clustered) arrive_in_cluster(), wait_for_cluster();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    wait_for_previous_kernel();
    if constexpr (clustered) wait_for_cluster();
    Consumer<T, Tile>(params, layout).run();
    if constexpr (clustered) arrive_in_cluster(), wait_for_cluster();
  }
#endif
}

// A tensor of T in rows of k, to be copied in boxes of `slice` x box_1 x box_2 x box_3.
CUtensorMap map_of(const void* data, const cuuint64_t (&shape)[4], const cuuint64_t (&strides)[3],
                   const cuuint32_t (&box)[4]) {
  const cuuint32_t steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(data), shape, strides, box,
                           steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(result == CUDA_SUCCESS, "linear: the driver refuses a tensor map, error ", static_cast<int>(result),
          ", rows of ", shape[0], " elements, ", strides[0], " bytes apart");
  return map;
}

template <class T, class Tile>
void launch_tiles(Params<T> params, Stream stream) {
  const LinearParams<T>& p = params.linear;
  const auto k = static_cast<cuuint64_t>(p.k), row = k * sizeof(T), n = static_cast<cuuint64_t>(p.n);
  if constexpr (Tile::gated)  // 8 rows of the gate, then 8 of up
    params.weight_map = map_of(p.weight, {k, 8, 2, n / 16}, {row, n / 2 * row, 8 * row}, {slice, 8, 2, Tile::strips});
  else
    params.weight_map = map_of(p.weight, {k, n, 1, 1}, {row, row, row}, {slice, Tile::columns, 1, 1});
  const cuuint64_t x_row = static_cast<cuuint64_t>(p.x_row) * sizeof(T);
  params.x_map = map_of(p.x, {k, static_cast<cuuint64_t>(p.rows), 1, 1}, {x_row, x_row, x_row},
                        {slice, Tile::rows / Tile::cluster, 1, 1});
  const Schedule& s = params.schedule;
  if (s.cutters > 0) {
    const int64_t parts = int64_t{2} * s.cutters * Tile::cluster;
    params.partial =
        static_cast<float4*>(scratch(static_cast<size_t>(parts * Tile::rows * Tile::columns) * sizeof(float), stream));
    params.counters = zeroed_counters(static_cast<size_t>(s.cut_tiles) * Tile::cluster * Tile::strips, stream);
  }
  launch(warpgroup_linear_kernel<T, Tile>, static_cast<unsigned>(s.clusters * Tile::cluster), Tile::threads,
         Tile::bytes, stream, params, Tile::cluster);
}

Schedule schedule_of(const TilePlan& plan, int64_t tiles, int64_t slices) {
  const int64_t clusters = std::min<int64_t>(plan.clusters, tiles * slices);
  const int64_t left = tiles % clusters, cutters = std::min(clusters, left * slices);
  const bool cut = cutters > left;
  return {static_cast<int>(tiles), static_cast<int>(slices), static_cast<int>(clusters),
          static_cast<int>(cut ? left : 0), static_cast<int>(cut ? cutters : 0)};
}

template <class T, bool gated>
void launch_plan(const Params<T>& params, const TilePlan& plan, Stream stream) {
  if (plan.rows == 32) return launch_tiles<T, Tile<32, 1, gated>>(params, stream);
  if (plan.rows == 64) return launch_tiles<T, Tile<64, 1, gated>>(params, stream);
  if (!gated || plan.rows == 128) return launch_tiles<T, Tile<128, 1, gated>>(params, stream);
  if constexpr (gated) {
    if (plan.rows == 192) return launch_tiles<T, Tile<192, 1, gated>>(params, stream);
    if (plan.cluster == 1) return launch_tiles<T, Tile<256, 1, gated>>(params, stream);
    launch_tiles<T, Tile<256, 2, gated>>(params, stream);
  }
}

// Where an H100 was faster with these kernels than with cuBLASLt (and silu_mul), by what was measured: Llama-3.1-8B,
// Llama-3.2-1B and Qwen2.5-0.5B at up to 2048 rows. What is not fused and small enough to be cut along k is not among
// them: adding up costs more than the library's choice wastes.
bool is_faster(bool gated, int64_t rows, int64_t n, int64_t k) {
  if (gated) return rows <= 128 || (rows <= 256 && k >= 2048) || (rows > 1792 && rows <= 2048 && k >= 4096);
  return n * k >= 50'000'000 && (rows <= 32 || (rows <= 64 && k >= 4096) || (rows <= 128 && k >= 2 * n));
}

}  // namespace tiles

std::optional<TilePlan> plan_tiles(bool gated, int64_t rows, int64_t n, int64_t k) {
  if (!has_wgmma() || (gated && n % 16 != 0) || !tiles::is_faster(gated, rows, n, k)) return std::nullopt;
  TilePlan plan{256, 1, 0};
  for (const int size : {192, 128, 64, 32})
    if (rows <= size) plan.rows = size;
  if (rows > 256) plan.cluster = 2;
  const int64_t all = multiprocessors() / plan.cluster, slices = ceil_div(k, tiles::slice);
  const int64_t count = ceil_div(ceil_div(n, tiles::tile_columns), plan.cluster) * ceil_div(rows, plan.rows);
  if (gated && rows <= 256)  // whole tiles, the same number for each
    plan.clusters = static_cast<int>(ceil_div(count, ceil_div(count, all)));
  else if (count < all)  // cut into equal parts, of ten slices or more
    plan.clusters = static_cast<int>(count * std::clamp<int64_t>(slices / 10, 1, all / count));
  else
    plan.clusters = static_cast<int>(all);
  return plan;
}

template <class T>
void warpgroup_linear(const LinearParams<T>& p, bool gated, const TilePlan& plan, Stream stream) {
  if (p.rows == 0) return;
  const int64_t x_tiles = ceil_div(p.rows, plan.rows),
                weight_tiles = ceil_div(ceil_div(p.n, tiles::tile_columns), plan.cluster);
  tiles::Params<T> params{};
  params.linear = p;
  params.schedule = tiles::schedule_of(plan, weight_tiles * x_tiles, ceil_div(p.k, tiles::slice));
  params.x_tiles = static_cast<int>(x_tiles);
  params.once = x_tiles == 1;
  params.fours = p.out_row % 4 == 0 && (gated ? p.n / 2 : p.n) % 4 == 0 && reinterpret_cast<uintptr_t>(p.out) % 8 == 0;
  (gated ? tiles::launch_plan<T, true> : tiles::launch_plan<T, false>)(params, plan, stream);
}

template void warpgroup_linear<BFloat16>(const LinearParams<BFloat16>&, bool, const TilePlan&, Stream);
template void warpgroup_linear<Float16>(const LinearParams<Float16>&, bool, const TilePlan&, Stream);

}  // namespace hybrid::cuda
