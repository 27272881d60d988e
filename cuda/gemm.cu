// linear for more than 32 rows: tiles of x and of the weight in shared memory, four stages of 64 along k by cp.async.
//
// A 64-wide slice of an operand lies as two panels [rows][32], row r of the second panel swapped with r ^ 1: 8 lanes of
// every 16-byte access, writing or reading, then hit 128 different bytes modulo 128. A segment's sums are kept apart
// from the total (see linear.cuh), which doubles the accumulators and is why tiles stop at 128 x 128. Compute-bound
// from a few hundred rows: 2 x rows x n x k operations on mma.sync.
#include "device.cuh"
#include "linear.cuh"
#include "reduce.cuh"

namespace hybrid::cuda {

namespace {

constexpr int slice = 64, stages = 4;

// Offset, in 16-byte packs, of pack `pack` (of 8) of row `row` in an operand's slice of `rows` rows.
template <int rows>
__device__ inline int pack_offset(int row, int pack) {
  const int panel = pack / 4;
  return (panel * rows + (row ^ panel)) * 4 + pack % 4;
}

template <class T, int rows, int threads>
__device__ inline void load_slice(uint4* to, const T* from, int64_t stride, int64_t first, int64_t limit, int64_t k0,
                                  int64_t k) {
  const int pack = threadIdx.x % 8;
#pragma unroll
  for (int row = threadIdx.x / 8; row < rows; row += threads / 8) {
    const bool valid = first + row < limit && k0 + pack * 8 < k;
    const T* source = valid ? from + (first + row) * stride + k0 + pack * 8 : from;
    copy_async(shared_address(to + pack_offset<rows>(row, pack)), source, valid);
  }
}

// tile_m x tile_n outputs a block, warp_m x warp_n a warp.
template <class T, int tile_m, int tile_n, int warp_m, int warp_n>
__global__ void __launch_bounds__((tile_m / warp_m) * (tile_n / warp_n) * warp_size)
    tiled_linear_kernel(const __grid_constant__ LinearParams<T> p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  constexpr int threads = (tile_m / warp_m) * (tile_n / warp_n) * warp_size;
  constexpr int m_tiles = warp_m / 16, n_tiles = warp_n / 8, stage_packs = (tile_m + tile_n) * 8;
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
  const int m0 = warp % (tile_m / warp_m) * warp_m, n0 = warp / (tile_m / warp_m) * warp_n;
  const int64_t row0 = int64_t{blockIdx.x} * tile_m, column0 = int64_t{blockIdx.y} * tile_n;
  const int64_t slices = (p.k + slice - 1) / slice, segment_slices = p.segment / slice;

  const auto load = [&](int64_t i) {
    uint4* to = shared + i % stages * stage_packs;
    if (i < slices) {
      load_slice<T, tile_m, threads>(to, p.x, p.x_row, row0, p.rows, i * slice, p.k);
      load_slice<T, tile_n, threads>(to + tile_m * 8, p.weight, p.k, column0, p.n, i * slice, p.k);
    }
    commit_copies();
  };
  for (int i = 0; i < stages - 1; ++i) load(i);

  float total[m_tiles][n_tiles][4] = {}, sum[m_tiles][n_tiles][4] = {};
  int64_t flush = segment_slices;
  for (int64_t i = 0; i < slices; ++i) {
    wait_copies<stages - 2>();
    __syncthreads();
    load(i + stages - 1);
    const uint4* x = shared + i % stages * stage_packs;
    const uint4* w = x + tile_m * 8;
#pragma unroll
    for (int panel = 0; panel < 2; ++panel) {
      uint4 a[m_tiles][2], b[n_tiles];
#pragma unroll
      for (int m = 0; m < m_tiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          a[m][half] = x[pack_offset<tile_m>(m0 + m * 16 + half * 8 + g, panel * 4 + t)];
#pragma unroll
      for (int n = 0; n < n_tiles; ++n) b[n] = w[pack_offset<tile_n>(n0 + n * 8 + g, panel * 4 + t)];
#pragma unroll
      for (int m = 0; m < m_tiles; ++m)
#pragma unroll
        for (int n = 0; n < n_tiles; ++n) multiply_span<T>(sum[m][n], a[m][0], a[m][1], b[n]);
    }
    if (i + 1 == flush || i + 1 == slices) {
      flush += segment_slices;
#pragma unroll
      for (int m = 0; m < m_tiles; ++m)
#pragma unroll
        for (int n = 0; n < n_tiles; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) total[m][n][j] += sum[m][n][j], sum[m][n][j] = 0.0f;
    }
  }
#pragma unroll
  for (int m = 0; m < m_tiles; ++m)
#pragma unroll
    for (int n = 0; n < n_tiles; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        store_output(p, row0 + m0 + m * 16 + j / 2 * 8 + g, column0 + n0 + n * 8 + 2 * t + j % 2, total[m][n][j]);
}

template <class T, int tile_m, int tile_n, int warp_m, int warp_n>
void launch_tiled(const LinearParams<T>& p, Stream stream) {
  constexpr unsigned threads = (tile_m / warp_m) * (tile_n / warp_n) * warp_size;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, tile_m)), static_cast<unsigned>(ceil_div(p.n, tile_n)));
  require(grid.y <= 65535, "linear: n = ", p.n, " is more than ", 65535 * tile_n, " columns");
  launch(tiled_linear_kernel<T, tile_m, tile_n, warp_m, warp_n>, grid, threads,
         size_t{stages} * (tile_m + tile_n) * slice * sizeof(T), stream, p);
}

}  // namespace

template <class T>
void tiled_linear(const LinearParams<T>& p, Stream stream) {
  if (ceil_div(p.rows, 128) * ceil_div(p.n, 128) >= multiprocessors())
    launch_tiled<T, 128, 128, 64, 32>(p, stream);
  else
    launch_tiled<T, 64, 64, 32, 32>(p, stream);
}

template void tiled_linear<BFloat16>(const LinearParams<BFloat16>&, Stream);
template void tiled_linear<Float16>(const LinearParams<Float16>&, Stream);

}  // namespace hybrid::cuda
