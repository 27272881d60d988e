// Paged attention of prompts for Hopper: the products of paged_prefill.cu on wgmma, head sizes 64 and 128.
//
// A block stays on its multiprocessor and takes shares (prefill_share.cuh) of 128 packed rows (192 for head size 64),
// those that see most tokens first, from a counter. Its warps have roles: one finds the shares; it and another have the
// copy engine fill rings of K and of V tiles through the block table; one has it bring the queries of the share after
// the present one, or two load them where it cannot; two (three) warpgroups compute 64 rows each. A computing warpgroup
// starts the scores of the next KV tile and then the outputs of this one, and does the softmax of the next while the
// outputs are computed; they take turns at starting, so that one's softmax runs under the others' products as well.
//
// The same kernel sums up the beginnings that decodes share: then the rows of a share are of many sequences, all see
// all of its tokens, and the sums are kept as they are, for paged_decode to merge.
//
// KV tiles are of 128 tokens, always from token 0 and in order, and a tile of which a row sees nothing changes none of
// its bits: a row's bits depend on its position alone, not on how a prompt was cut.
// Compute-bound: 2 products of 2 x rows x visible tokens x dim operations a head.
#include <array>

#include "device.cuh"
#include "paged_prefill.cuh"
#include "prefill_consumer.cuh"

namespace hybrid::cuda {

namespace prefill {

// One warp: copies K, or V, of the KV tiles of every share into its ring.
template <class T, int dim, int stages>
class TileLoader {
 public:
  __device__ TileLoader(const Params<T>& params, const CUtensorMap& map, const Ring<stages>& ring, uint32_t tiles)
      : p_(params.attention),
        map_(map),
        ring_(ring),
        to_(tiles),
        lane_(threadIdx.x % warp_size),
        box_tokens_(params.box_tokens) {}

  // Lane i knows the cache block of box i, a tile ahead. Boxes are asked for without a pause: a tile is late otherwise.
  __device__ void load(const Share& share) {
    const int32_t* blocks = p_.kv_blocks + share.kv_start;
    int block = block_of(share, blocks, 0);
    for (int first = 0; first < share.visible; first += tile_tokens, ++used_) {
      const int next_block = block_of(share, blocks, first + tile_tokens);
      const int boxes = (min(tile_tokens, share.visible - first) + box_tokens_ - 1) / box_tokens_;
      ring_.wait_empty(used_);
      if (lane_ == 0) arrive_expecting(ring_.full(used_), boxes * box_tokens_ * dim * 2);
      const uint32_t to = to_ + used_ % stages * Layout<dim>::kv_bytes;
      int from[most_boxes];
#pragma unroll
      for (int box = 0; box < most_boxes; ++box) from[box] = __shfl_sync(0xffffffffu, block, box);
      if (lane_ == 0)
#pragma unroll
        for (int box = 0; box < most_boxes; ++box) {
          if (box == boxes) break;
          const int token = box * box_tokens_, in_block = (first + token) & ((1 << p_.block_shift) - 1);
#pragma unroll
          for (int column = 0; column < Layout<dim>::columns; ++column)
            copy_box(to + column * Layout<dim>::kv_column + token * column_bytes, &map_, column * 64, in_block,
                     share.head, from[box], ring_.full(used_));
        }
      __syncwarp();
      block = next_block;
    }
  }

 private:
  static constexpr int most_boxes = tile_tokens / 16;

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
template <class Work, class T, int dim>
__device__ void hand_out_shares(const AttentionParams<T>& p, const Layout<dim>& layout, Share* shares,
                                TileLoader<T, dim, Layout<dim>::k_stages> keys) {
  const Work work(p);
  const int count = work.shares(), indices = count * p.kv_heads;
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
    if (!work.find(p, count - 1 - index / p.kv_heads, index % p.kv_heads, share)) continue;
    hand_out();
    keys.load(share);
  }
  share.head = -1;
  hand_out();
}

// One warp.
template <class T, int dim>
__device__ void load_values(const Layout<dim>& layout, const Share* shares,
                            TileLoader<T, dim, Layout<dim>::v_stages> values) {
  for (uint32_t n = 0;; ++n) {
    layout.work.wait_full(n);
    const Share share = shares[n % slots];
    if (share.head < 0) return;
    arrive(layout.queries.full(n));  // the share is read
    values.load(share);
  }
}

// One warp: the queries of every share, by the copy engine: a box of so many tokens' heads is a share's packed rows.
// Rows beyond the sequence's last are others', and nobody reads what becomes of them.
template <class T, int dim>
__device__ void copy_queries(const Params<T>& params, const Layout<dim>& layout, const Share* shares) {
  for (uint32_t n = 0;; ++n) {
    layout.work.wait_full(n);
    const Share share = shares[n % slots];
    if (share.head < 0) return;
    const uint32_t full = layout.queries.full(n);
    if (threadIdx.x % warp_size > 0) {
      arrive(full);
      continue;
    }
    arrive_expecting(full, Layout<dim>::query_bytes);
#pragma unroll
    for (int column = 0; column < Layout<dim>::columns; ++column)
      copy_box(layout.query_tile(n) + column * Layout<dim>::query_column, &params.q_map, column * 64, 0, share.head,
               static_cast<int>(share.first_row) + share.row0 / params.attention.group, full);
  }
}

// Two warps: the queries of every share, zeros beyond the sequence's last row.
template <class T, int dim>
__device__ void load_queries(const AttentionParams<T>& p, const Layout<dim>& layout, const Share* shares) {
  constexpr int packs = dim / 8;
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size - 2;
  for (uint32_t n = 0;; ++n) {
    layout.work.wait_full(n);
    const Share share = shares[n % slots];
    if (share.head < 0) return;
    for (int first = warp * warp_size; first < Layout<dim>::share_rows; first += query_threads) {
      // Lane i finds row first + i, for all.
      const int packed = share.row0 + first + lane, token = packed / p.group, head = packed - token * p.group;
      const bool valid = packed < share.rows;
      const int64_t mine =
          valid ? (share.first_row + token) * p.q_row + (int64_t{share.head} * p.group + head) * p.q_head : -1;
#pragma unroll
      for (int i = 0; i < packs; ++i) {
        const int in_rows = i * warp_size + lane, in_warp = in_rows / packs, pack = in_rows % packs,
                  row = first + in_warp;
        const int64_t from = __shfl_sync(0xffffffffu, mine, in_warp);
        const uint32_t column = layout.query_tile(n) + pack / 8 * Layout<dim>::query_column;
        copy_async(column + row * column_bytes + (pack % 8 ^ row % 8) * 16, p.q + max(from, int64_t{0}) + pack * 8,
                   from >= 0);
      }
    }
    commit_copies();
    wait_copies<0>();
    publish_shared();
    arrive(layout.queries.full(n));
  }
}

// Only sm_90a has these instructions; has_wgmma() keeps other devices, and builds without sm_90a, away from here.
template <class T, int dim, class Work>
__global__ void __launch_bounds__(Layout<dim>::threads, 1)
    paged_prefill_sm90_kernel(const __grid_constant__ Params<T> params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint4 shared[];
  const uint32_t begin = shared_address(shared), start = (begin + 1023) / 1024 * 1024;
  const Layout<dim> layout(start);
  Share* shares = reinterpret_cast<Share*>(reinterpret_cast<char*>(shared) + (start - begin) + Layout<dim>::shares);
  if (threadIdx.x == 0) {
    layout.init_barriers(params.maps_queries);
    if (params.maps_queries) prefetch_map(&params.q_map);
    prefetch_map(&params.k_map);
    prefetch_map(&params.v_map);
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (threadIdx.x < group_threads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Layout<dim>::producer_registers));
    if (threadIdx.x < warp_size)
      hand_out_shares<Work, T, dim>(params.attention, layout, shares,
                                    {params, params.k_map, layout.k, layout.key_tile(0)});
    else if (threadIdx.x < 2 * warp_size)
      load_values<T, dim>(layout, shares, {params, params.v_map, layout.v, layout.value_tile(0)});
    else if (params.maps_queries) {
      if (threadIdx.x < 3 * warp_size) copy_queries<T, dim>(params, layout, shares);
    } else
      load_queries<T, dim>(params.attention, layout, shares);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Layout<dim>::consumer_registers));
    Consumer<T, dim, Work::is_partial>(params.attention, layout, shares).run();
  }
#endif
}

// Boxes of `box` elements of a tensor of 16-bit elements, `strides` in elements, as tiles with 128-byte rows.
template <class T>
CUtensorMap map_of(const T* data, const std::array<int64_t, 4>& shape, const std::array<int64_t, 3>& strides,
                   const std::array<int, 4>& box) {
  cuuint64_t sizes[4], bytes[3];
  cuuint32_t box_sizes[4], steps[] = {1, 1, 1, 1};
  for (size_t i = 0; i < 4; ++i)
    sizes[i] = static_cast<cuuint64_t>(shape[i]), box_sizes[i] = static_cast<cuuint32_t>(box[i]);
  for (size_t i = 0; i < 3; ++i) bytes[i] = static_cast<cuuint64_t>(strides[i]) * sizeof(T);
  CUtensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<T*>(data), sizes, bytes, box_sizes,
                           steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(result == CUDA_SUCCESS, "paged_attention: the driver refuses a tensor map, error ", static_cast<int>(result),
          ", strides ", strides[0], ", ", strides[1], " and ", strides[2]);
  return map;
}

// Tokens x heads x blocks of one side of the cache, to be copied in boxes of `box_tokens` x 64 elements.
template <class T>
CUtensorMap cache_map(const T* cache, const AttentionParams<T>& p, int64_t head_stride, int64_t block_stride,
                      int box_tokens) {
  return map_of(cache, {p.dim, int64_t{1} << p.block_shift, p.kv_heads, int64_t{1} << 31},
                {p.dim, head_stride, block_stride}, {64, box_tokens, 1, 1});
}

template <class Work, int dim, class T>
void launch_prefill(const AttentionParams<T>& p, int64_t blocks, Stream stream) {
  constexpr int share_rows = Layout<dim>::share_rows;
  Params<T> params{p, std::min(1 << p.block_shift, tile_tokens), share_rows % p.group == 0, {}, {}, {}};
  params.k_map = cache_map(p.k_cache, p, p.k_head, p.k_block, params.box_tokens);
  params.v_map = cache_map(p.v_cache, p, p.v_head, p.v_block, params.box_tokens);
  if (params.maps_queries)
    params.q_map = map_of(p.q, {dim, p.group, p.kv_heads, p.rows}, {p.q_head, p.group * p.q_head, p.q_row},
                          {64, p.group, 1, share_rows / p.group});
  params.attention.counter = zeroed_counters(1, stream);
  launch(paged_prefill_sm90_kernel<T, dim, Work>, static_cast<unsigned>(std::min(blocks, multiprocessors())),
         Layout<dim>::threads, Layout<dim>::bytes, stream, params);
}

}  // namespace prefill

template <class T>
void paged_prefill_sm90(const AttentionParams<T>& p, Stream stream) {
  const auto start = [&]<int dim>() {
    constexpr int share_rows = prefill::Layout<dim>::share_rows;
    prefill::launch_prefill<Prompts<share_rows>, dim>(p, (p.rows * p.group / share_rows + p.seqs) * p.kv_heads, stream);
  };
  p.dim == 64 ? start.template operator()<64>() : start.template operator()<128>();
}

template <class T>
void paged_prefixes_sm90(const AttentionParams<T>& p, Stream stream) {
  p.dim == 64 ? prefill::launch_prefill<Prefixes, 64>(p, multiprocessors(), stream)
              : prefill::launch_prefill<Prefixes, 128>(p, multiprocessors(), stream);
}

template void paged_prefill_sm90<BFloat16>(const AttentionParams<BFloat16>&, Stream);
template void paged_prefill_sm90<Float16>(const AttentionParams<Float16>&, Stream);
template void paged_prefixes_sm90<BFloat16>(const AttentionParams<BFloat16>&, Stream);
template void paged_prefixes_sm90<Float16>(const AttentionParams<Float16>&, Stream);

}  // namespace hybrid::cuda
