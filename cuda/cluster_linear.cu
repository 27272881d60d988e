// linear for some 16 to 64 rows, on devices that have clusters: every block of a cluster of 8 takes one segment of k.
//
// With that many rows, reading x again for every tile costs more than the weights do. Here a block keeps its segment of
// x in shared memory for the whole launch. Its 8 warps take 8 or 16 columns of the output each and stream that segment
// of the weight's rows (weight_ring.cuh); the segments' sums of warp w's columns meet in the shared memory of block w
// of the cluster, two tiles' worth in turn, so that one cluster barrier a tile is enough.
#include "device.cuh"
#include "weight_ring.cuh"

namespace hybrid::cuda {

namespace {

constexpr int cluster_threads = max_segments * warp_size;

__device__ inline void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// To the same place in the shared memory of block `rank` of the cluster.
__device__ inline void store_remote(float* to, int rank, float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(to)), "r"(rank));
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
#endif
}

template <class T, int eights, class Ring, bool gated>
__global__ void __launch_bounds__(cluster_threads) cluster_linear_kernel(const __grid_constant__ LinearParams<T> p) {
  let_next_kernel_start();
  cluster_arrive();  // nobody writes to a block that does not run yet
  using Weights = WeightStream<T, Ring, gated>;
  constexpr int tiles_m = (eights + 1) / 2, padded_rows = eights * 8, outputs = padded_rows * Ring::rows;
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
  const int rank = blockIdx.x % max_segments;
  const int64_t begin = rank * p.segment, end = min(p.k, begin + p.segment);
  const int64_t clusters = gridDim.x / max_segments, turns = (Weights::tiles(p) + max_segments - 1) / max_segments;
  Weights weights(p, shared + warp * Ring::depth * Ring::stage_packs, rank,
                  blockIdx.x / max_segments * max_segments + warp, clusters * max_segments, turns * max_segments);
  float* const partial = reinterpret_cast<float*>(shared + max_segments * Ring::depth * Ring::stage_packs);
  uint4* const x = reinterpret_cast<uint4*>(partial + 2 * max_segments * outputs);
  const int x_packs = static_cast<int>(p.segment / 8);

  wait_for_previous_kernel();
  for (int row = warp; row < padded_rows; row += max_segments)
    for (int pack = lane; pack < x_packs; pack += warp_size) {
      const bool valid = row < p.rows && begin + pack * 8 < end;
      copy_async(shared_address(x + swapped(row, pack, x_packs)), p.x + (valid ? row * p.x_row + begin + pack * 8 : 0),
                 valid);
    }
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  cluster_wait();

  int buffer = 0;
  for (int64_t turn = blockIdx.x / max_segments; turn < turns; turn += clusters, buffer ^= 1) {
    float sum[tiles_m][Ring::groups][4] = {};
    for (int piece = 0; piece < weights.pieces; ++piece) {
      const uint4* weight = weights.next_piece();
#pragma unroll
      for (int j = 0; j < Ring::spans; ++j) {
        if (begin + piece * Ring::piece + j * 32 >= end) break;
        uint4 rows[2 * tiles_m] = {};
#pragma unroll
        for (int e = 0; e < eights; ++e) rows[e] = x[swapped(e * 8 + g, piece * Ring::packs + j * 4 + t, x_packs)];
#pragma unroll
        for (int b = 0; b < Ring::groups; ++b) {
          const uint4 w = weight[swapped(b * 8 + g, j * 4 + t, Ring::packs)];
#pragma unroll
          for (int m = 0; m < tiles_m; ++m) multiply_span<T>(sum[m][b], rows[2 * m], rows[2 * m + 1], w);
        }
      }
    }
    float* const sums = partial + buffer * max_segments * outputs;
#pragma unroll
    for (int e = 0; e < eights; ++e)
#pragma unroll
      for (int b = 0; b < Ring::groups; ++b)
        store_remote(sums + ((rank * eights + e) * 8 + g) * Ring::rows + b * 8 + 2 * t, warp, sum[e / 2][b][e % 2 * 2],
                     sum[e / 2][b][e % 2 * 2 + 1]);
    cluster_arrive();
    cluster_wait();
    const int64_t tile = turn * max_segments + rank;
    for (int i = threadIdx.x; i < p.rows * Weights::width; i += cluster_threads)
      store_sum<Ring, padded_rows, gated>(p, sums, i / Weights::width, i % Weights::width,
                                          tile * Weights::width + i % Weights::width);
  }
  wait_copies<0>();
}

template <class T, int eights, class Ring, bool gated>
bool launch_clusters(const LinearParams<T>& p, Stream stream) {
  const int64_t bytes = static_cast<int64_t>(max_segments * Ring::bytes) +
                        int64_t{2} * max_segments * eights * 8 * Ring::rows * int64_t{sizeof(float)} +
                        eights * 8 * p.segment * int64_t{sizeof(T)};
  const int64_t resident = shared_bytes_per_multiprocessor() / (bytes + 1024);
  if (resident == 0 || !can_overlap_launches()) return false;
  constexpr int64_t width = (gated ? Ring::rows / 2 : Ring::rows) * max_segments;
  const int64_t turns = ceil_div(gated ? p.n / 2 : p.n, width);
  const int64_t clusters = std::min(turns, multiprocessors() / max_segments * std::min<int64_t>(resident, 2));
  launch(cluster_linear_kernel<T, eights, Ring, gated>, static_cast<unsigned>(clusters * max_segments), cluster_threads,
         static_cast<size_t>(bytes), stream, p, max_segments);
  return true;
}

template <class T, bool gated>
bool few_rows(const LinearParams<T>& p, Stream stream) {
  if (p.rows <= 16) return launch_clusters<T, 2, Ring<1, 128, 3>, gated>(p, stream);
  if (p.rows <= 32) return launch_clusters<T, 4, Ring<1, 128, 3>, gated>(p, stream);
  return launch_clusters<T, 8, Ring<2, 64, 3>, gated>(p, stream);
}

}  // namespace

template <class T>
bool cluster_linear(const LinearParams<T>& p, Stream stream) {
  return few_rows<T, false>(p, stream);
}
template <class T>
bool cluster_gated_linear(const LinearParams<T>& p, Stream stream) {
  return few_rows<T, true>(p, stream);
}

template bool cluster_linear<BFloat16>(const LinearParams<BFloat16>&, Stream);
template bool cluster_linear<Float16>(const LinearParams<Float16>&, Stream);
template bool cluster_gated_linear<BFloat16>(const LinearParams<BFloat16>&, Stream);
template bool cluster_gated_linear<Float16>(const LinearParams<Float16>&, Stream);

}  // namespace hybrid::cuda
