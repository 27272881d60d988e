// linear for up to 32 rows: the weights stream through once, from memory to tensor core fragments. Memory-bound.
//
// Blocks stay for the whole launch and take tiles of 16 or more output columns (rows of the weight) in turn. A block's
// 8 warps take one segment of k each, every one with a ring of its own (weight_ring.cuh), and meet in shared memory at
// the end of a tile, while the next tile's weights are under way. x comes from L1 and L2 straight to registers.
//
// norm_linear of one row: every block norms the row for itself, into shared memory, as rms_norm.cu would to the bit. A
// step of one sequence is a chain of small kernels, and each costs more than the few KB that the blocks read again.
#include "device.cuh"
#include "rms_row.cuh"
#include "weight_ring.cuh"

namespace hybrid::cuda {

namespace {

constexpr int threads = max_segments * warp_size;

template <class T>
struct SkinnyParams {
  LinearParams<T> linear;
  NormedRow<T> norm;
};

// rms_norm of one row by a whole block, in rms_norm's order: there a thread has one pack, and warps are summed up last.
template <class T>
class RowNorm {
  static constexpr int per = Pack<T>::size;

 public:
  static constexpr int turns = 2, most_packs = turns * threads;

  __device__ RowNorm(const NormedRow<T>& p, int dim) : p_(p), dim_(dim) {
#pragma unroll
    for (int turn = 0; turn < turns; ++turn)
      if (pack_of(turn) * per < dim) weight_[turn] = Pack<T>::load(p.weight + pack_of(turn) * per);
  }

  // Behind the wait for the kernels that wrote x and the residual. `scratch`: 32 floats. Ends with a barrier.
  __device__ void write(T* out, float* scratch) const {
    RowPart<T, float> part[turns];
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
      if (pack_of(turn) * per >= dim_) continue;
      part[turn].x = Pack<T>::load(p_.x + pack_of(turn) * per);
      if (!p_.begins_residual) part[turn].load_residual(p_.residual + pack_of(turn) * per);
    }
    float held[turns][per];
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
      float squares = 0.0f;
      if (pack_of(turn) * per < dim_) {
        part[turn].add(held[turn], blockIdx.x == 0 ? p_.sum + pack_of(turn) * per : nullptr, p_.begins_residual);
        squares = add_squares(squares, held[turn]);
      }
      squares = warp_sum(squares);
      if (threadIdx.x % warp_size == 0) scratch[pack_of(turn) / warp_size] = squares;
    }
    __syncthreads();
    const int lane = threadIdx.x % warp_size;
    const float total = warp_sum(lane < turns * max_segments ? scratch[lane] : 0.0f);
    const float scale = rsqrtf(total / static_cast<float>(dim_) + p_.eps);
#pragma unroll
    for (int turn = 0; turn < turns; ++turn)
      if (pack_of(turn) * per < dim_) scaled(held[turn], scale, weight_[turn]).store(out + pack_of(turn) * per);
    __syncthreads();
  }

 private:
  __device__ static int pack_of(int turn) { return turn * threads + static_cast<int>(threadIdx.x); }

  const NormedRow<T>& p_;
  const int dim_;
  Pack<T> weight_[turns];
};

template <class T, int eights, class Ring, bool gated, bool normed>
__global__ void __launch_bounds__(threads) skinny_linear_kernel(const __grid_constant__ SkinnyParams<T> params) {
  const LinearParams<T>& p = params.linear;
  let_next_kernel_start();
  using Weights = WeightStream<T, Ring, gated>;
  constexpr int tiles_m = (eights + 1) / 2;  // of 16 rows of x
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
  const int64_t begin = warp * p.segment, end = min(p.k, begin + p.segment), tiles = Weights::tiles(p);
  Weights weights(p, shared + warp * Ring::depth * Ring::stage_packs, warp, blockIdx.x, gridDim.x, tiles);
  float* const partial = reinterpret_cast<float*>(shared + max_segments * Ring::depth * Ring::stage_packs);
  const T* rows = p.x;
  if constexpr (normed) {
    const RowNorm<T> norm(params.norm, static_cast<int>(p.k));
    T* const row = reinterpret_cast<T*>(partial + max_segments * eights * 8 * Ring::rows);
    wait_for_previous_kernel();
    norm.write(row, partial);
    rows = row;
  } else {
    wait_for_previous_kernel();
  }
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
          if (row < p.rows && k < end) x[j][e] = *reinterpret_cast<const uint4*>(rows + row * p.x_row + k);
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

template <class T, int eights, class Ring, bool gated, bool normed = false>
bool launch_ring(const SkinnyParams<T>& params, Stream stream) {
  const LinearParams<T>& p = params.linear;
  const size_t row_bytes = normed ? static_cast<size_t>(p.k) * sizeof(T) : 0;
  const size_t bytes =
      max_segments * Ring::bytes + size_t{max_segments} * eights * 8 * Ring::rows * sizeof(float) + row_bytes;
  const int64_t resident = shared_bytes_per_multiprocessor() / static_cast<int64_t>(bytes + 1024);
  if (resident == 0) return false;
  const int64_t tiles = gated ? ceil_div(p.n / 2, Ring::rows / 2) : ceil_div(p.n, Ring::rows);
  launch(skinny_linear_kernel<T, eights, Ring, gated, normed>,
         static_cast<unsigned>(std::min(tiles, multiprocessors() * resident)), threads, bytes, stream, params);
  return true;
}

// The best rings of those measured on an H100; the small one is for devices with less shared memory.
using FewRowsRing = Ring<2, 128, 3>;
template <class T, bool gated>
void skinny(const LinearParams<T>& p, Stream stream) {
  const SkinnyParams<T> params{p, {}};
  const auto run = [&]<int eights, class Best>() {
    if (!launch_ring<T, eights, Best, gated>(params, stream))
      launch_ring<T, eights, Ring<2, 64, 2>, gated>(params, stream);
  };
  if (p.rows <= 8)
    run.template operator()<1, FewRowsRing>();
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

template <class T>
bool skinny_normed_linear(const LinearParams<T>& p, const NormedRow<T>& norm, bool gated, Stream stream) {
  if (p.k > RowNorm<T>::most_packs * Pack<T>::size) return false;
  const SkinnyParams<T> params{p, norm};
  return gated ? launch_ring<T, 1, FewRowsRing, true, true>(params, stream)
               : launch_ring<T, 1, FewRowsRing, false, true>(params, stream);
}

template void skinny_linear<BFloat16>(const LinearParams<BFloat16>&, Stream);
template void skinny_linear<Float16>(const LinearParams<Float16>&, Stream);
template void skinny_gated_linear<BFloat16>(const LinearParams<BFloat16>&, Stream);
template void skinny_gated_linear<Float16>(const LinearParams<Float16>&, Stream);
template bool skinny_normed_linear<BFloat16>(const LinearParams<BFloat16>&, const NormedRow<BFloat16>&, bool, Stream);
template bool skinny_normed_linear<Float16>(const LinearParams<Float16>&, const NormedRow<Float16>&, bool, Stream);

}  // namespace hybrid::cuda
