// Paged attention of prompts for Hopper: the products of prefill_block.cuh on wgmma, head sizes 64 and 128.
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
//
// Of a cache of Float8, the copy engine fills rings of its own; one warp each widens K and V to the tiles above, and
// who loads V brings the queries.
#pragma once

#include <array>

#include "cache_element.cuh"
#include "device.cuh"
#include "paged_prefill.cuh"
#include "prefill_consumer.cuh"

namespace hybrid::cuda {

namespace prefill {

// One warp: copies K, or V, of the KV tiles of every share into its ring, `tokens` of them a stage.
template <class T, class C, int dim, int stages, int tokens>
class TileLoader {
 public:
  __device__ TileLoader(const Params<T, C>& params, const CUtensorMap& map, const Ring<stages>& ring, uint32_t tiles)
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
    for (int first = 0; first < share.visible; first += tokens, ++used_) {
      const int next_block = block_of(share, blocks, first + tokens);
      const int boxes = (min(tokens, share.visible - first) + box_tokens_ - 1) / box_tokens_;
      ring_.wait_empty(used_);
      if (lane_ == 0) arrive_expecting(ring_.full(used_), boxes * box_tokens_ * dim * sizeof(C));
      const uint32_t to = to_ + used_ % stages * (tokens * dim * sizeof(C));
      int from[most_boxes];
#pragma unroll
      for (int box = 0; box < most_boxes; ++box) from[box] = __shfl_sync(0xffffffffu, block, box);
      if (lane_ == 0)
#pragma unroll
        for (int box = 0; box < most_boxes; ++box) {
          if (box == boxes) break;
          const int token = box * box_tokens_, in_block = (first + token) & ((1 << p_.block_shift) - 1);
#pragma unroll
          for (int column = 0; column < dim / box_dims; ++column)
            copy_box(to + (column * tokens + token) * row_bytes, &map_, column * box_dims, in_block, share.head,
                     from[box], ring_.full(used_));
        }
      __syncwarp();
      block = next_block;
    }
  }

 private:
  static constexpr int most_boxes = tokens / 16;
  static constexpr int box_dims = sizeof(C) == 1 ? dim : 64, row_bytes = box_dims * sizeof(C);

  __device__ int block_of(const Share& share, const int32_t* blocks, int first) const {
    const int token = first + lane_ * box_tokens_;
    return lane_ * box_tokens_ < tokens && token < share.visible ? blocks[token >> p_.block_shift] : 0;
  }

  const AttentionParams<T, C>& p_;
  const CUtensorMap& map_;
  const Ring<stages> ring_;
  const uint32_t to_;
  const int lane_, box_tokens_;
  uint32_t used_ = 0;
};

// Counts from the blocks' first indices on, by one warp. Each of `indices` asks once: the last leaves zero for the next
// kernel.
template <class Params>
__device__ int next_index(const Params& p, int indices) {
  int taken = 0;
  if (threadIdx.x % warp_size == 0) {
    taken = atomicAdd(p.counter, 1);
    if (taken == indices - 1) *p.counter = 0;
  }
  return gridDim.x + __shfl_sync(0xffffffffu, taken, 0);
}

// One warp: finds shares, tells the others, and loads K.
template <class Work, class Params, class Layout, class Loader>
__device__ void hand_out_shares(const Params& p, const Layout& layout, Share* shares, Loader keys) {
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

// One warp: body(n, share) for the n-th share of the block. It must arrive at queries.full(n): the share is read.
template <class Layout, class Body>
__device__ void for_shares(const Layout& layout, const Share* shares, Body&& body) {
  for (uint32_t n = 0;; ++n) {
    layout.work.wait_full(n);
    const Share share = shares[n % slots];
    if (share.head < 0) return;
    body(n, share);
  }
}

// One warp: the queries of a share, by the copy engine: a box of so many tokens' heads is a share's packed rows. Rows
// beyond the sequence's last are others', and nobody reads what becomes of them.
template <class Params, class Layout>
__device__ void copy_queries(const Params& params, const Layout& layout, uint32_t n, const Share& share) {
  const uint32_t full = layout.queries.full(n);
  if (threadIdx.x % warp_size > 0) return arrive(full);
  arrive_expecting(full, Layout::query_bytes);
#pragma unroll
  for (int column = 0; column < Layout::columns; ++column)
    copy_box(layout.query_tile(n) + column * Layout::query_column, &params.q_map, column * 64, 0, share.head,
             static_cast<int>(share.first_row) + share.row0 / params.attention.group, full);
}

// One warp: 8 KB of Float8, rows of `dim`, to rows of T where the products read them.
template <class T, int dim, class Layout>
__device__ void widen_rows(uint32_t from, uint32_t to) {
  const int lane = threadIdx.x % warp_size, j = lane % 8;
#pragma unroll 2
  for (int i = 0; i < Layout::raw_bytes / (16 * warp_size); ++i) {
    // 8 lanes take 16 elements each of two rows, so that neither what they read nor what they write meets in a bank: of
    // 128 the left half of one row and the right one of the other.
    const int row = dim == 64 ? (i * 4 + lane / 8) * 2 + j / 4 : (i / 2 * 4 + lane / 8) * 2 + (j / 4 ^ i % 2);
    const int unit = j % (dim / 16), pack = unit % 4 * 2;
    uint32_t x[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(from + row * dim + unit * 16));
    const uint32_t column = to + unit / 4 * Layout::kv_column + row * column_bytes;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(column + ((pack + half) ^ row % 8) * 16),
                   "r"(widened_to<T>(x[2 * half])), "r"(widened_to<T>(x[2 * half] >> 16)),
                   "r"(widened_to<T>(x[2 * half + 1])), "r"(widened_to<T>(x[2 * half + 1] >> 16))
                   : "memory");
  }
}

// One warp: tiles of K, or V, from the ring where they come to that where they are used.
template <class T, int dim, class Layout, int stages>
__device__ void widen_tiles(const Layout& layout, const Share* shares, const Ring<Layout::raw_stages>& raw,
                            uint32_t raw_start, const Ring<stages>& ring, uint32_t tiles) {
  const bool is_first = threadIdx.x % warp_size == 0;
  uint32_t taken = 0, used = 0;
  for_shares(layout, shares, [&](uint32_t n, const Share& share) {
    arrive(layout.queries.full(n));
    for (int first = 0; first < share.visible; first += tile_tokens, ++used) {
      ring.wait_empty(used);
      const uint32_t to = tiles + used % stages * Layout::kv_bytes;
      for (int at = 0; at < min(tile_tokens, share.visible - first); at += Layout::raw_tokens, ++taken) {
        raw.wait_full(taken);
        widen_rows<T, dim, Layout>(raw_start + taken % Layout::raw_stages * Layout::raw_bytes, to + at * column_bytes);
        __syncwarp();
        if (is_first) arrive(raw.empty(taken));
      }
      publish_shared();
      __syncwarp();
      if (is_first) arrive(ring.full(used));
    }
  });
}

// Two warps: the queries of every share, zeros beyond the sequence's last row.
template <class T, int dim>
__device__ void load_queries(const AttentionParams<T>& p, const Layout<dim, false>& layout, const Share* shares) {
  constexpr int packs = dim / 8;
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size - 2;
  for (uint32_t n = 0;; ++n) {
    layout.work.wait_full(n);
    const Share share = shares[n % slots];
    if (share.head < 0) return;
    for (int first = warp * warp_size; first < Layout<dim, false>::share_rows; first += query_threads) {
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
        const uint32_t column = layout.query_tile(n) + pack / 8 * Layout<dim, false>::query_column;
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
template <class T, class C, int dim, class Work>
__global__ void __launch_bounds__(Layout<dim, sizeof(C) == 1>::threads, 1)
    paged_prefill_sm90_kernel(const __grid_constant__ Params<T, C> params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint4 shared[];
  const uint32_t begin = shared_address(shared), start = (begin + 1023) / 1024 * 1024;
  constexpr bool widens = sizeof(C) == 1;
  using Layout = Layout<dim, widens>;
  const Layout layout(start);
  Share* shares = reinterpret_cast<Share*>(reinterpret_cast<char*>(shared) + (start - begin) + Layout::shares);
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
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Layout::producer_registers));
    const int warp = threadIdx.x / warp_size;
    const auto loader = [&]<int tokens>(const CUtensorMap& map, const auto& ring, uint32_t tiles) {
      return TileLoader<T, C, dim, std::remove_cvref_t<decltype(ring)>::size, tokens>(params, map, ring, tiles);
    };
    if constexpr (widens) {
      if (warp == 0)
        hand_out_shares<Work>(
            params.attention, layout, shares,
            loader.template operator()<Layout::raw_tokens>(params.k_map, layout.raw_k, layout.raw_keys()));
      else if (warp == 1) {
        auto values = loader.template operator()<Layout::raw_tokens>(params.v_map, layout.raw_v, layout.raw_values());
        for_shares(layout, shares, [&](uint32_t n, const Share& share) {
          copy_queries(params, layout, n, share);
          values.load(share);
        });
      } else if (warp == 2)
        widen_tiles<T, dim>(layout, shares, layout.raw_k, layout.raw_keys(), layout.k, layout.key_tile(0));
      else
        widen_tiles<T, dim>(layout, shares, layout.raw_v, layout.raw_values(), layout.v, layout.value_tile(0));
    } else if (warp == 0) {
      hand_out_shares<Work>(params.attention, layout, shares,
                            loader.template operator()<tile_tokens>(params.k_map, layout.k, layout.key_tile(0)));
    } else if (warp == 1) {
      auto values = loader.template operator()<tile_tokens>(params.v_map, layout.v, layout.value_tile(0));
      for_shares(layout, shares, [&](uint32_t n, const Share& share) {
        arrive(layout.queries.full(n));
        values.load(share);
      });
    } else if (params.maps_queries) {
      if (warp == 2)
        for_shares(layout, shares, [&](uint32_t n, const Share& share) { copy_queries(params, layout, n, share); });
    } else
      load_queries<T, dim>(params.attention, layout, shares);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Layout::consumer_registers));
    Consumer<T, C, dim, Work::is_partial>(params.attention, layout, shares).run();
  }
#endif
}

// Boxes of `box` elements of a tensor, `strides` in elements: of 16-bit elements as tiles with 128-byte rows, of Float8
// as they are.
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
      tensor_map_encoder()(&map, sizeof(T) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
                           const_cast<T*>(data), sizes, bytes, box_sizes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           sizeof(T) == 1 ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(result == CUDA_SUCCESS, "paged_attention: the driver refuses a tensor map, error ", static_cast<int>(result),
          ", strides ", strides[0], ", ", strides[1], " and ", strides[2]);
  return map;
}

// Tokens x heads x blocks of one side of the cache, to be copied in boxes of `box_tokens` x 64 elements, or whole rows
// of Float8.
template <class T, class C>
CUtensorMap cache_map(const C* cache, const AttentionParams<T, C>& p, int64_t head_stride, int64_t block_stride,
                      int box_tokens) {
  return map_of(cache, {p.dim, int64_t{1} << p.block_shift, p.kv_heads, int64_t{1} << 31},
                {p.dim, head_stride, block_stride}, {sizeof(C) == 1 ? p.dim : 64, box_tokens, 1, 1});
}

template <class Work, int dim, class T, class C>
void launch_prefill(const AttentionParams<T, C>& p, int64_t blocks, Stream stream) {
  using Layout = Layout<dim, sizeof(C) == 1>;
  constexpr int share_rows = Layout::share_rows, stage_tokens = sizeof(C) == 1 ? Layout::raw_tokens : tile_tokens;
  Params<T, C> params{p, std::min(1 << p.block_shift, stage_tokens), share_rows % p.group == 0, {}, {}, {}};
  params.k_map = cache_map(p.k_cache, p, p.k_head, p.k_block, params.box_tokens);
  params.v_map = cache_map(p.v_cache, p, p.v_head, p.v_block, params.box_tokens);
  if (params.maps_queries)
    params.q_map = map_of(p.q, {dim, p.group, p.kv_heads, p.rows}, {p.q_head, p.group * p.q_head, p.q_row},
                          {64, p.group, 1, share_rows / p.group});
  params.attention.counter = zeroed_counters(1, stream);
  launch(paged_prefill_sm90_kernel<T, C, dim, Work>, static_cast<unsigned>(std::min(blocks, multiprocessors())),
         Layout::threads, Layout::bytes, stream, params);
}

}  // namespace prefill

template <class T, class C>
void paged_prefill_sm90(const AttentionParams<T, C>& p, Stream stream) {
  const auto start = [&]<int dim>() {
    constexpr int share_rows = prefill::Layout<dim, sizeof(C) == 1>::share_rows;
    prefill::launch_prefill<Prompts<share_rows>, dim>(p, (p.rows * p.group / share_rows + p.seqs) * p.kv_heads, stream);
  };
  p.dim == 64 ? start.template operator()<64>() : start.template operator()<128>();
}

template <class T, class C>
void paged_prefixes_sm90(const AttentionParams<T, C>& p, Stream stream) {
  p.dim == 64 ? prefill::launch_prefill<Prefixes, 64>(p, multiprocessors(), stream)
              : prefill::launch_prefill<Prefixes, 128>(p, multiprocessors(), stream);
}

}  // namespace hybrid::cuda
