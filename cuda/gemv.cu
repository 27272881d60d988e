// linear for up to 32 rows: the weights stream through once, from memory to tensor core fragments. Memory-bound.
//
// Blocks stay for the whole launch and take tiles of 8 or more output columns (rows of the weight) in turn. A block's 8
// warps take one segment of k each and meet in shared memory at the end of a tile. Every warp keeps a ring of its own
// there, filled by cp.async: no barrier in the loop, and the next tile's weights are under way while this one's sums
// meet. What a ring fetches at a time is one contiguous piece of each row, whole lines of memory. x comes from L1 and
// L2 straight to registers.
//
// No kernel writes weights, so the rings fill before the wait for the previous kernel: in a chain of launches the
// memory never idles while small kernels run between two products.
#include "device.cuh"
#include "linear.cuh"
#include "reduce.cuh"

namespace hybrid::cuda {

namespace {

constexpr int threads = max_segments * warp_size;

// groups: of 8 rows of the weight in a tile. piece: elements of k that a stage holds of each. depth: stages.
template <int groups_, int piece_, int depth_>
struct Ring {
  static constexpr int groups = groups_, piece = piece_, depth = depth_;
  static constexpr int rows = 8 * groups, packs = piece / 8, rows_at_once = warp_size / packs;
  static constexpr int stage_packs = rows * packs;  // 16-byte packs of one warp
  static constexpr size_t bytes = size_t{max_segments} * depth * stage_packs * 16;
  // Odd rows swap the halves of every 8 packs: 8 lanes of a read, two rows of four packs, then hit 128 different bytes.
  __device__ static int offset(int row, int pack) { return row * packs + (pack ^ (row % 2 * 4)); }
};

// Row of the weight that is row r of a tile. Gated: the first half of a tile are gate's rows, the second half up's.
template <class Ring, bool gated, class T>
__device__ inline int64_t weight_row(const LinearParams<T>& p, int64_t tile, int r) {
  if constexpr (!gated) return tile * Ring::rows + r;
  constexpr int half = Ring::rows / 2;
  const int64_t column = tile * half + r % half;
  return column >= p.n / 2 ? p.n : r < half ? column : p.n / 2 + column;
}

template <class T, int eights, class Ring, bool gated>
__global__ void __launch_bounds__(threads) skinny_linear_kernel(const __grid_constant__ LinearParams<T> p) {
  let_next_kernel_start();
  constexpr int tiles_m = (eights + 1) / 2, spans = Ring::piece / 32;  // of 16 rows of x; of a stage
  constexpr int width = gated ? Ring::rows / 2 : Ring::rows;           // output columns of a tile
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
  const int64_t begin = warp * p.segment, end = min(p.k, begin + p.segment);
  const int pieces = begin < end ? static_cast<int>((end - begin + Ring::piece - 1) / Ring::piece) : 0;
  const int64_t tiles = ((gated ? p.n / 2 : p.n) + width - 1) / width;

  uint4* const ring = shared + warp * Ring::depth * Ring::stage_packs;
  int64_t next_tile = blockIdx.x;  // what to load next
  int next_piece = 0, next_stage = 0;
  const auto load_next = [&] {
    if (next_tile < tiles && pieces > 0) {
      const int pack = lane % Ring::packs, first = lane / Ring::packs;
      const int64_t at = begin + next_piece * Ring::piece + pack * 8;
      const uint32_t to = shared_address(ring + next_stage * Ring::stage_packs);
#pragma unroll
      for (int r = 0; r < Ring::rows; r += Ring::rows_at_once) {
        const int64_t row = weight_row<Ring, gated>(p, next_tile, r + first);
        const bool valid = at < end && row < p.n;
        copy_async(to + Ring::offset(r + first, pack) * 16, p.weight + (valid ? row * p.k + at : 0), valid);
      }
      if (++next_piece == pieces) next_piece = 0, next_tile += gridDim.x;
    }
    commit_copies();
    next_stage = next_stage == Ring::depth - 1 ? 0 : next_stage + 1;
  };
#pragma unroll
  for (int i = 0; i < Ring::depth - 1; ++i) load_next();
  wait_for_previous_kernel();

  float* const partial = reinterpret_cast<float*>(shared + max_segments * Ring::depth * Ring::stage_packs);
  constexpr int outputs = eights * 8 * Ring::rows;  // partial: [segment][row of x][row of the tile]
  int stage = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float sum[tiles_m][Ring::groups][4] = {};
    for (int piece = 0; piece < pieces; ++piece) {
      uint4 x[spans][2 * tiles_m] = {};
#pragma unroll
      for (int j = 0; j < spans; ++j)
#pragma unroll
        for (int e = 0; e < eights; ++e) {
          const int64_t row = e * 8 + g, at = begin + piece * Ring::piece + j * 32 + t * 8;
          if (row < p.rows && at < end) x[j][e] = *reinterpret_cast<const uint4*>(p.x + row * p.x_row + at);
        }
      wait_copies<Ring::depth - 2>();
      __syncwarp();
      load_next();  // into the stage that all lanes left before they met
      const uint4* weight = ring + stage * Ring::stage_packs;
      stage = stage == Ring::depth - 1 ? 0 : stage + 1;
#pragma unroll
      for (int j = 0; j < spans; ++j) {
        if (begin + piece * Ring::piece + j * 32 >= end) break;
#pragma unroll
        for (int b = 0; b < Ring::groups; ++b) {
          const uint4 w = weight[Ring::offset(b * 8 + g, j * 4 + t)];
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
        *reinterpret_cast<float2*>(partial + warp * outputs + (e * 8 + g) * Ring::rows + b * 8 + 2 * t) =
            make_float2(sum[e / 2][b][e % 2 * 2], sum[e / 2][b][e % 2 * 2 + 1]);
    __syncthreads();
    const auto total = [&](int row, int column) {
      float sum = 0.0f;
#pragma unroll
      for (int s = 0; s < max_segments; ++s)
        if (s * p.segment < p.k) sum += partial[s * outputs + row * Ring::rows + column];
      return sum;
    };
    for (int i = threadIdx.x; i < p.rows * width; i += threads) {
      const int row = i / width, c = i % width;
      const int64_t column = tile * width + c;
      if constexpr (gated)
        store_gated(p, row, column, total(row, c), total(row, c + width));
      else
        store_output(p, row, column, total(row, c));
    }
  }
  wait_copies<0>();
}

template <class T, int eights, class Ring, bool gated>
bool launch_ring(const LinearParams<T>& p, Stream stream) {
  constexpr size_t bytes = Ring::bytes + size_t{max_segments} * eights * 8 * Ring::rows * sizeof(float);
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
  else if (p.rows <= 16)
    run.template operator()<2, Ring<4, 128, 3>>();
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
