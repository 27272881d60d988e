// linear for up to 32 rows: the weights stream through once, from memory to tensor core fragments. Memory-bound.
//
// Blocks stay for the whole launch and take tiles of 16 or more output columns (rows of the weight) in turn. A block's
// 8 warps take one segment of k each, every one with a ring of its own (weight_ring.cuh), and meet in shared memory at
// the end of a tile, while the next tile's weights are under way. x comes from L1 and L2 straight to registers.
#include "device.cuh"
#include "weight_ring.cuh"

namespace hybrid::cuda {

namespace {

constexpr int threads = max_segments * warp_size;

template <class T, int eights, class Ring, bool gated>
__global__ void __launch_bounds__(threads) skinny_linear_kernel(const __grid_constant__ LinearParams<T> p) {
  let_next_kernel_start();
  using Weights = WeightStream<T, Ring, gated>;
  constexpr int tiles_m = (eights + 1) / 2;  // of 16 rows of x
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
  const int64_t begin = warp * p.segment, end = min(p.k, begin + p.segment), tiles = Weights::tiles(p);
  Weights weights(p, shared + warp * Ring::depth * Ring::stage_packs, warp, blockIdx.x, gridDim.x, tiles);
  wait_for_previous_kernel();

  float* const partial = reinterpret_cast<float*>(shared + max_segments * Ring::depth * Ring::stage_packs);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float sum[tiles_m][Ring::groups][4] = {};
    for (int piece = 0; piece < weights.pieces; ++piece) {
      const int64_t at = begin + piece * Ring::piece;
      uint4 x[Ring::spans][2 * tiles_m] = {};
#pragma unroll
      for (int j = 0; j < Ring::spans; ++j)
#pragma unroll
        for (int e = 0; e < eights; ++e) {
          const int64_t row = e * 8 + g, k = at + j * 32 + t * 8;
          if (row < p.rows && k < end) x[j][e] = *reinterpret_cast<const uint4*>(p.x + row * p.x_row + k);
        }
      const uint4* weight = weights.next_piece();
#pragma unroll
      for (int j = 0; j < Ring::spans; ++j) {
        if (at + j * 32 >= end) break;
#pragma unroll
        for (int b = 0; b < Ring::groups; ++b) {
          const uint4 w = weight[swapped(b * 8 + g, j * 4 + t, Ring::packs)];
#pragma unroll
          for (int m = 0; m < tiles_m; ++m) multiply_span<T>(sum[m][b], x[j][2 * m], x[j][2 * m + 1], w);
        }
      }
    }
    __syncthreads();  // the last tile's sums have been read
#pragma unroll
    for (int e = 0; e < eights; ++e)
#pragma unroll
      for (int b = 0; b < Ring::groups; ++b)
        *reinterpret_cast<float2*>(partial + ((warp * eights + e) * 8 + g) * Ring::rows + b * 8 + 2 * t) =
            make_float2(sum[e / 2][b][e % 2 * 2], sum[e / 2][b][e % 2 * 2 + 1]);
    __syncthreads();
    for (int i = threadIdx.x; i < p.rows * Weights::width; i += threads)
      store_sum<Ring, eights * 8, gated>(p, partial, i / Weights::width, i % Weights::width,
                                         tile * Weights::width + i % Weights::width);
  }
  wait_copies<0>();
}

template <class T, int eights, class Ring, bool gated>
bool launch_ring(const LinearParams<T>& p, Stream stream) {
  constexpr size_t bytes = max_segments * Ring::bytes + size_t{max_segments} * eights * 8 * Ring::rows * sizeof(float);
  const int64_t resident = shared_bytes_per_multiprocessor() / static_cast<int64_t>(bytes + 1024);
  if (resident == 0) return false;
  const int64_t tiles = gated ? ceil_div(p.n / 2, Ring::rows / 2) : ceil_div(p.n, Ring::rows);
  launch(skinny_linear_kernel<T, eights, Ring, gated>,
         static_cast<unsigned>(std::min(tiles, multiprocessors() * resident)), threads, bytes, stream, p);
  return true;
}

// The best rings of those measured on an H100; the small one is for devices with less shared memory.
template <class T, bool gated>
void skinny(const LinearParams<T>& p, Stream stream) {
  const auto run = [&]<int eights, class Best>() {
    if (!launch_ring<T, eights, Best, gated>(p, stream)) launch_ring<T, eights, Ring<2, 64, 2>, gated>(p, stream);
  };
  if (p.rows <= 8)
    run.template operator()<1, Ring<2, 128, 3>>();
  else if (p.rows <= 16 && p.n * p.k >= int64_t{16} << 20)
    run.template operator()<2, Ring<4, 128, 3>>();
  else if (p.rows <= 16)
    run.template operator()<2, Ring<2, 64, 5>>();
  else
    run.template operator()<4, Ring<2, 64, 5>>();
}

}  // namespace

template <class T>
void skinny_linear(const LinearParams<T>& p, Stream stream) {
  skinny<T, false>(p, stream);
}
template <class T>
void skinny_gated_linear(const LinearParams<T>& p, Stream stream) {
  skinny<T, true>(p, stream);
}

template void skinny_linear<BFloat16>(const LinearParams<BFloat16>&, Stream);
template void skinny_linear<Float16>(const LinearParams<Float16>&, Stream);
template void skinny_gated_linear<BFloat16>(const LinearParams<BFloat16>&, Stream);
template void skinny_gated_linear<Float16>(const LinearParams<Float16>&, Stream);

}  // namespace hybrid::cuda
