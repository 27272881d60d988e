// Paged attention of prompts for Hopper: the products of paged_prefill.cu on wgmma, head sizes 64 and 128.
//
// A block stays on its multiprocessor and takes shares (prefill_share.cuh) of 128 packed rows (192 for head size 64),
// those that see most tokens first, from a counter. Its warps have roles: one finds the shares; it and another have the
// copy engine fill two-stage rings of K and of V tiles through the block table; two load the queries of the share after
// the present one; two (three) warpgroups compute 64 rows each. A computing warpgroup starts the scores of the next KV
// tile and then the outputs of this one, and does the softmax of the next while the outputs are computed; they take
// turns at starting, so that one's softmax runs under the others' products as well.
//
// KV tiles are of 128 tokens, always from token 0 and in order, and a tile of which a row sees nothing changes none of
// its bits: a row's bits depend on its position alone, not on how a prompt was cut.
// Compute-bound: 2 products of 2 x rows x visible tokens x dim operations a head.
#include "device.cuh"
#include "paged_prefill.cuh"
#include "prefill_consumer.cuh"

namespace hybrid::cuda {

namespace prefill {

// One warp: copies K, or V, of the KV tiles of every share into its ring.
template <class T, int dim>
class TileLoader {
 public:
  __device__ TileLoader(const Params<T>& params, const CUtensorMap& map, const Ring<stages>& ring, uint32_t tiles)
      : p_(params.attention),
        map_(map),
        ring_(ring),
        to_(tiles),
        lane_(threadIdx.x % warp_size),
        box_tokens_(params.box_tokens) {}

  // Lane i knows the cache block of box i, a tile ahead.
  __device__ void load(const Share& share) {
    const int32_t* blocks = p_.kv_blocks + p_.kv_start[share.seq];
    int block = block_of(share, blocks, 0);
    for (int first = 0; first < share.visible; first += tile_tokens, ++used_) {
      const int next_block = block_of(share, blocks, first + tile_tokens);
      const int boxes = (min(tile_tokens, share.visible - first) + box_tokens_ - 1) / box_tokens_;
      ring_.wait_empty(used_);
      if (lane_ == 0) arrive_expecting(ring_.full(used_), boxes * box_tokens_ * dim * 2);
      const uint32_t to = to_ + used_ % stages * Layout<dim>::kv_bytes;
#pragma unroll 1
      for (int box = 0; box < boxes; ++box) {
        const int from = __shfl_sync(0xffffffffu, block, box), token = box * box_tokens_;
        if (lane_ == 0)
#pragma unroll
          for (int column = 0; column < Layout<dim>::columns; ++column)
            copy_box(to + column * Layout<dim>::kv_column + token * column_bytes, &map_, column * 64,
                     (first + token) & ((1 << p_.block_shift) - 1), share.head, from, ring_.full(used_));
      }
      __syncwarp();
      block = next_block;
    }
  }

 private:
  __device__ int block_of(const Share& share, const int32_t* blocks, int first) const {
    const int token = first + lane_ * box_tokens_;
    return lane_ * box_tokens_ < tile_tokens && token < share.visible ? blocks[token >> p_.block_shift] : 0;
  }

  const AttentionParams<T>& p_;
  const CUtensorMap& map_;
  const Ring<stages> ring_;
  const uint32_t to_;
  const int lane_, box_tokens_;
  uint32_t used_ = 0;
};

// Counts from the blocks' first indices on, by one warp. Each of `indices` asks once: the last leaves zero for the next
// kernel.
template <class T>
__device__ int next_index(const AttentionParams<T>& p, int indices) {
  int taken = 0;
  if (threadIdx.x % warp_size == 0) {
    taken = atomicAdd(p.counter, 1);
    if (taken == indices - 1) *p.counter = 0;
  }
  return gridDim.x + __shfl_sync(0xffffffffu, taken, 0);
}

// One warp: finds shares, tells the others, and loads K.
template <class T, int dim>
__device__ void hand_out_shares(const AttentionParams<T>& p, const Layout<dim>& layout, Share* shares,
                                TileLoader<T, dim> keys) {
  const Prompts<Layout<dim>::share_rows> prompts(p);
  const int count = prompts.shares(), indices = count * p.kv_heads;
  uint32_t n = 0;
  Share share{};
  const auto hand_out = [&] {
    layout.work.wait_empty(n);
    if (threadIdx.x % warp_size == 0) {
      shares[n % slots] = share;
      arrive(layout.work.full(n));
    }
    __syncwarp();
    ++n;
  };
  for (int index = blockIdx.x; index < indices; index = next_index(p, indices)) {
    if (!prompts.find(p, count - 1 - index / p.kv_heads, index % p.kv_heads, share)) continue;
    hand_out();
    keys.load(share);
  }
  share.seq = -1;
  hand_out();
}

// One warp.
template <class T, int dim>
__device__ void load_values(const Layout<dim>& layout, const Share* shares, TileLoader<T, dim> values) {
  for (uint32_t n = 0;; ++n) {
    layout.work.wait_full(n);
    const Share share = shares[n % slots];
    if (share.seq < 0) return;
    arrive(layout.queries.full(n));  // the share is read
    values.load(share);
  }
}

// Two warps: the queries of every share, zeros beyond the sequence's last row.
template <class T, int dim>
__device__ void load_queries(const AttentionParams<T>& p, const Layout<dim>& layout, const Share* shares) {
  constexpr int packs = dim / 8;
  const int thread = threadIdx.x - 2 * warp_size;
  for (uint32_t n = 0;; ++n) {
    layout.work.wait_full(n);
    const Share share = shares[n % slots];
    if (share.seq < 0) return;
#pragma unroll 2
    for (int i = thread; i < Layout<dim>::share_rows * packs; i += query_threads) {
      const int row = i / packs, pack = i % packs, packed = share.row0 + row;
      const bool valid = packed < share.rows;
      const int token = valid ? packed / p.group : 0, head = valid ? packed % p.group : 0;
      const T* from =
          p.q + (share.first_row + token) * p.q_row + (int64_t{share.head} * p.group + head) * p.q_head + pack * 8;
      const uint32_t column = layout.query_tile(n) + pack / 8 * Layout<dim>::query_column;
      copy_async(column + row * column_bytes + (pack % 8 ^ row % 8) * 16, from, valid);
    }
    commit_copies();
    wait_copies<0>();
    publish_shared();
    arrive(layout.queries.full(n));
  }
}

// Only sm_90a has these instructions; has_wgmma() keeps other devices, and builds without sm_90a, away from here.
template <class T, int dim>
__global__ void __launch_bounds__(Layout<dim>::threads, 1)
    paged_prefill_sm90_kernel(const __grid_constant__ Params<T> params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint4 shared[];
  const uint32_t begin = shared_address(shared), start = (begin + 1023) / 1024 * 1024;
  const Layout<dim> layout(start);
  Share* shares = reinterpret_cast<Share*>(reinterpret_cast<char*>(shared) + (start - begin) + Layout<dim>::shares);
  if (threadIdx.x == 0) {
    layout.init_barriers();
    prefetch_map(&params.k_map);
    prefetch_map(&params.v_map);
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (threadIdx.x < group_threads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Layout<dim>::producer_registers));
    if (threadIdx.x < warp_size)
      hand_out_shares<T, dim>(params.attention, layout, shares, {params, params.k_map, layout.k, layout.key_tile(0)});
    else if (threadIdx.x < 2 * warp_size)
      load_values<T, dim>(layout, shares, {params, params.v_map, layout.v, layout.value_tile(0)});
    else
      load_queries<T, dim>(params.attention, layout, shares);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Layout<dim>::consumer_registers));
    Consumer<T, dim>(params.attention, layout, shares).run();
  }
#endif
}

// Tokens x heads x blocks of one side of the cache, to be copied in boxes of `box_tokens` x 64 elements.
template <class T>
CUtensorMap map_of(const T* cache, const AttentionParams<T>& p, int64_t head_stride, int64_t block_stride,
                   int box_tokens) {
  const cuuint64_t dim = static_cast<cuuint64_t>(p.dim), block_size = cuuint64_t{1} << p.block_shift;
  const cuuint64_t shape[] = {dim, block_size, static_cast<cuuint64_t>(p.kv_heads), cuuint64_t{1} << 31};
  const cuuint64_t strides[] = {dim * sizeof(T), static_cast<cuuint64_t>(head_stride) * sizeof(T),
                                static_cast<cuuint64_t>(block_stride) * sizeof(T)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_tokens), 1, 1}, steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<T*>(cache), shape, strides, box, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(result == CUDA_SUCCESS, "paged_attention: the driver refuses a tensor map, error ", static_cast<int>(result),
          ", head stride ", head_stride, ", block stride ", block_stride);
  return map;
}

template <class T, int dim>
void launch_prefill(const AttentionParams<T>& p, int64_t rows, Stream stream) {
  Params<T> params{p, std::min(1 << p.block_shift, tile_tokens), {}, {}};
  params.k_map = map_of(p.k_cache, p, p.k_head, p.k_block, params.box_tokens);
  params.v_map = map_of(p.v_cache, p, p.v_head, p.v_block, params.box_tokens);
  params.attention.counter = zeroed_counters(1, stream);
  const int64_t shares = (rows * p.group / Layout<dim>::share_rows + p.seqs) * p.kv_heads;
  const dim3 grid(static_cast<unsigned>(std::min(shares, multiprocessors())));
  launch(paged_prefill_sm90_kernel<T, dim>, grid, Layout<dim>::threads, Layout<dim>::bytes, stream, params);
}

}  // namespace prefill

template <class T>
void paged_prefill_sm90(const AttentionParams<T>& p, int64_t rows, Stream stream) {
  if (p.dim == 64)
    prefill::launch_prefill<T, 64>(p, rows, stream);
  else
    prefill::launch_prefill<T, 128>(p, rows, stream);
}

template void paged_prefill_sm90<BFloat16>(const AttentionParams<BFloat16>&, int64_t, Stream);
template void paged_prefill_sm90<Float16>(const AttentionParams<Float16>&, int64_t, Stream);

}  // namespace hybrid::cuda
