// linear for up to 32 rows: the weights stream through once, from memory to tensor core fragments.
//
// A block owns 8, 16 or 32 columns of the output (rows of the weight); its 8 warps take one segment of k each and meet
// in shared memory. Every lane has a ring of its own there, filled by cp.async with just the bytes that it will
// multiply: no barrier in the loop, and as many loads under way as the ring is deep. (Loads to registers do not do it:
// ptxas sinks each one to its use.) Moves n x k x 2 bytes; x comes from L1 and L2, and wider blocks read it less often.
// Memory-bound.
#include "device.cuh"
#include "linear.cuh"
#include "reduce.cuh"

namespace hybrid::cuda {

namespace {

constexpr int threads = max_segments * warp_size;

// eights: rows of x / 8, columns: output columns / 8 of a block.
template <int eights, int columns>
struct Ring {
  static constexpr int packs = eights + columns;  // 16-byte packs of a lane and stage
  static constexpr int depth = std::clamp(64 * 1024 / (packs * threads * 16), 3, 8);
  static constexpr size_t bytes = size_t{depth} * packs * threads * 16;
};

template <class T, int eights, int columns>
__global__ void __launch_bounds__(threads) skinny_linear_kernel(const __grid_constant__ LinearParams<T> p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  using Ring = Ring<eights, columns>;
  constexpr int tiles = (eights + 1) / 2;  // of 16 rows
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
  const int64_t column0 = int64_t{blockIdx.x} * columns * 8;
  const int64_t begin = warp * p.segment, end = min(p.k, begin + p.segment);
  const int spans = begin < end ? static_cast<int>((end - begin + 31) / 32) : 0;
  const T* weight[columns];
#pragma unroll
  for (int b = 0; b < columns; ++b) {
    const int64_t row = column0 + b * 8 + g;
    weight[b] = p.weight + (row < p.n ? row : p.n - 1) * p.k + begin + t * 8;
  }
  const T* x[eights];
#pragma unroll
  for (int e = 0; e < eights; ++e) {
    const int64_t row = e * 8 + g;
    x[e] = p.x + (row < p.rows ? row : 0) * p.x_row + begin + t * 8;
  }

  // Pack q of stage s of this lane is mine[(s * packs + q) * threads].
  const uint4* mine = shared + threadIdx.x;
  const uint32_t address = shared_address(mine);
  const auto load = [&](int span, int stage) {
    if (span < spans) {
      const uint32_t to = address + stage * Ring::packs * threads * 16;
      const bool inside = begin + span * 32 + t * 8 < end;
      const int64_t at = inside ? span * 32 : 0;
#pragma unroll
      for (int b = 0; b < columns; ++b) copy_async(to + b * threads * 16, weight[b] + at, inside);
#pragma unroll
      for (int e = 0; e < eights; ++e)
        copy_async_cached(to + (columns + e) * threads * 16, x[e] + at, inside && e * 8 + g < p.rows);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < Ring::depth - 1; ++i) load(i, i);

  float sum[tiles][columns][4] = {};
  int stage = 0;
  for (int i = 0; i < spans; ++i) {
    wait_copies<Ring::depth - 2>();
    uint4 w[columns], rows[2 * tiles] = {};
    const uint4* from = mine + stage * Ring::packs * threads;
#pragma unroll
    for (int b = 0; b < columns; ++b) w[b] = from[b * threads];
#pragma unroll
    for (int e = 0; e < eights; ++e) rows[e] = from[(columns + e) * threads];
    load(i + Ring::depth - 1, stage == 0 ? Ring::depth - 1 : stage - 1);
    stage = stage == Ring::depth - 1 ? 0 : stage + 1;
#pragma unroll
    for (int m = 0; m < tiles; ++m)
#pragma unroll
      for (int b = 0; b < columns; ++b) multiply_span<T>(sum[m][b], rows[2 * m], rows[2 * m + 1], w[b]);
  }
  wait_copies<0>();
  __syncthreads();

  // The ring is drained: its memory takes the segments' sums, [segment][row][column].
  float* partial = reinterpret_cast<float*>(shared);
  constexpr int outputs = eights * 8 * columns * 8;
#pragma unroll
  for (int e = 0; e < eights; ++e)
#pragma unroll
    for (int b = 0; b < columns; ++b) {
      float* to = partial + warp * outputs + (e * 8 + g) * columns * 8 + b * 8 + 2 * t;
      to[0] = sum[e / 2][b][e % 2 * 2];
      to[1] = sum[e / 2][b][e % 2 * 2 + 1];
    }
  __syncthreads();
  for (int i = threadIdx.x; i < outputs; i += threads) {
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < max_segments; ++s)
      if (s * p.segment < p.k) total += partial[s * outputs + i];
    store_output(p, i / (columns * 8), column0 + i % (columns * 8), total);
  }
}

template <class T, int eights>
void launch_skinny(const LinearParams<T>& p, Stream stream) {
  // Wide blocks read x less often; but every multiprocessor wants two blocks.
  const auto blocks = [&](int64_t columns) { return ceil_div(p.n, 8 * columns); };
  const auto run = [&]<int columns>() {
    static_assert(Ring<eights, columns>::bytes >= size_t{max_segments} * (eights * 8) * (columns * 8) * sizeof(float));
    launch(skinny_linear_kernel<T, eights, columns>, static_cast<unsigned>(blocks(columns)), threads,
           Ring<eights, columns>::bytes, stream, p);
  };
  const int64_t enough = 2 * multiprocessors();
  if constexpr (eights > 1)
    if (blocks(4) >= enough) return run.template operator()<4>();
  if (blocks(2) >= enough)
    run.template operator()<2>();
  else
    run.template operator()<1>();
}

}  // namespace

template <class T>
void skinny_linear(const LinearParams<T>& p, Stream stream) {
  if (p.rows <= 8)
    launch_skinny<T, 1>(p, stream);
  else if (p.rows <= 16)
    launch_skinny<T, 2>(p, stream);
  else
    launch_skinny<T, 4>(p, stream);
}

template void skinny_linear<BFloat16>(const LinearParams<BFloat16>&, Stream);
template void skinny_linear<Float16>(const LinearParams<Float16>&, Stream);

}  // namespace hybrid::cuda
