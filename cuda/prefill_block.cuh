// Paged attention of sequences with several query rows each (prompts, or chunks of them).
//
// The kernel for any device since sm_80, and for a cache of Float8 on all. A block takes a share (prefill_share.cuh) of
// 128 packed rows (64 for head size 256) and walks the KV tokens in tiles of 64 (32), always from token 0 and always in
// order: a row's bits depend on its position alone, not on how a prompt was cut. K and V tiles come by cp.async through
// the block table, one ahead of the products; scores and outputs stay in registers (m16n8k16, 4 warps of 32 or 16
// rows). Compute-bound: 2 products of 2 x rows x visible tokens x dim operations a head.
#pragma once

#include "cache_element.cuh"
#include "paged_prefill.cuh"
#include "prefill_share.cuh"

namespace hybrid::cuda {

namespace prefill {

constexpr int warps = 4, threads = warps * warp_size;

template <class C, int dim>
struct Tile {
  static constexpr int m_tiles = dim <= 128 ? 2 : 1;  // of 16 rows a warp
  static constexpr int rows = warps * m_tiles * 16;
  static constexpr int tokens = dim <= 128 ? 64 : 32;
  static constexpr int head_packs = dim / CacheElement<C>::per_pack, kv_row = head_packs | 1;  // packs
  static constexpr int kv_packs = tokens * kv_row;
  static constexpr size_t bytes = (size_t{rows} * row_packs<dim> + 4 * kv_packs) * 16;
};

template <class T, class C, int dim, bool is_partial>
class Prefill {
  using Tile = Tile<C, dim>;
  using Element = CacheElement<C>;
  using Math = typename Element::Math;
  static constexpr int slices = Element::slices;

 public:
  __device__ Prefill(const AttentionParams<T, C>& p, const Share& share, uint4* shared)
      : p_(p),
        share_(share),
        query_(shared_address(shared)),
        keys_(query_ + Tile::rows * row_packs<dim> * 16),
        values_(keys_ + 2 * Tile::kv_packs * 16),
        lane_(threadIdx.x % warp_size),
        warp_row_(threadIdx.x / warp_size * Tile::m_tiles * 16) {}

  __device__ void run() {
    const int tiles = (share_.visible + Tile::tokens - 1) / Tile::tokens;
    load_query();
    load_kv(keys_, p_.k_cache, p_.k_block, p_.k_head, 0);
    commit_copies();
    load_kv(values_, p_.v_cache, p_.v_block, p_.v_head, 0);
    commit_copies();
#pragma unroll
    for (int r = 0; r < 2 * Tile::m_tiles; ++r) {
      limit_[r] = share_.position + min(packed_row(r), share_.rows - 1) / p_.group + 1;
      largest_[r] = minus_infinity;
    }
    const int seen_by_all = share_.position + share_.row0 / p_.group + 1;
    for (int tile = 0; tile < tiles; ++tile) {
      const uint32_t stage = tile % 2 * Tile::kv_packs * 16, next = (tile + 1) % 2 * Tile::kv_packs * 16;
      if (tile + 1 < tiles) load_kv(keys_ + next, p_.k_cache, p_.k_block, p_.k_head, (tile + 1) * Tile::tokens);
      commit_copies();
      if (tile + 1 < tiles) load_kv(values_ + next, p_.v_cache, p_.v_block, p_.v_head, (tile + 1) * Tile::tokens);
      commit_copies();
      wait_copies<3>();
      __syncthreads();
      float scores[Tile::m_tiles][Tile::tokens / 8][4] = {};
      score(scores, keys_ + stage);
      if ((tile + 1) * Tile::tokens > seen_by_all) mask(scores, tile * Tile::tokens);
      soften(scores);
      wait_copies<2>();
      __syncthreads();
      add_values(scores, values_ + stage);
      __syncthreads();
    }
    write_out();
  }

 private:
  // Row r of this lane: r / 2 is its tile of 16, r % 2 the half.
  __device__ int packed_row(int r) const { return share_.row0 + warp_row_ + r / 2 * 16 + r % 2 * 8 + lane_ / 4; }

  // By 16 elements.
  __device__ void load_query() const {
    constexpr int columns = dim / 16;
#pragma unroll 2
    for (int i = threadIdx.x; i < Tile::rows * columns; i += threads) {
      const int row = i / columns, column = i % columns, packed = share_.row0 + row;
      const bool valid = packed < share_.rows;
      const int token = valid ? packed / p_.group : 0, head = valid ? packed % p_.group : 0;
      const T* from = p_.q + (share_.first_row + token) * p_.q_row +
                      (int64_t{share_.head} * p_.group + head) * p_.q_head + column * 16;
      const uint32_t to = query_ + (row * row_packs<dim> + column * 2) * 16;
      if constexpr (slices == 1) {
        copy_async(to, from, valid);
        copy_async(to + 16, from + 8, valid);
      } else {
        store_ordered(to, from, valid);
      }
    }
  }
  // 16 elements as pairs of Math in the order in which load_keys() brings those of keys.
  __device__ static void store_ordered(uint32_t to, const T* from, bool valid) {
    uint4 packs[2] = {};
    if (valid) packs[0] = *reinterpret_cast<const uint4*>(from), packs[1] = *reinterpret_cast<const uint4*>(from + 8);
    const auto pair = [](uint32_t x) { return query_pair<T, Math>(x); };
    const auto store = [](uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
    };
    store(to, pair(packs[0].x), pair(packs[0].z), pair(packs[1].x), pair(packs[1].z));
    store(to + 16, pair(packs[0].y), pair(packs[0].w), pair(packs[1].y), pair(packs[1].w));
  }

  // KV tokens from `first` on; zeros beyond the visible ones.
  __device__ void load_kv(uint32_t to, const C* cache, int64_t block_stride, int64_t head_stride, int first) const {
    constexpr int packs = Tile::head_packs;
    const int32_t* blocks = p_.kv_blocks + share_.kv_start;
    const C* head = cache + share_.head * head_stride;
    const int mask = (1 << p_.block_shift) - 1;
#pragma unroll
    for (int i = threadIdx.x; i < Tile::tokens * packs; i += threads) {
      const int row = i / packs, column = i % packs, token = first + row;
      const bool valid = token < share_.visible;
      const C* from = valid ? head + blocks[token >> p_.block_shift] * block_stride + (token & mask) * dim +
                                  column * Element::per_pack
                            : cache;
      copy_async(to + (row * Tile::kv_row + column) * 16, from, valid);
    }
  }

  __device__ void score(float (&scores)[Tile::m_tiles][Tile::tokens / 8][4], uint32_t keys) const {
    const uint32_t a_row = query_ + ((warp_row_ + lane_ / 8 % 2 * 8 + lane_ % 8) * row_packs<dim> + lane_ / 16) * 16;
    const uint32_t b_row = keys + (Element::crossed_row(lane_) * Tile::kv_row + Element::crossed_pack(lane_)) * 16;
#pragma unroll
    for (int k = 0; k < dim / 16; k += slices) {
      uint32_t a[slices][Tile::m_tiles][4];
#pragma unroll
      for (int j = k; j < std::min(k + slices, dim / 16); ++j)
#pragma unroll
        for (int m = 0; m < Tile::m_tiles; ++m)
          load_matrices(a[j - k][m], a_row + (m * 16 * row_packs<dim> + j * 2) * 16);
#pragma unroll
      for (int n = 0; n < Tile::tokens / 16; ++n) {
        uint32_t b[slices][4];
        load_keys_second<C>(b, b_row + (n * 16 * Tile::kv_row + k / slices * 2) * 16, k + slices <= dim / 16);
#pragma unroll
        for (int j = k; j < std::min(k + slices, dim / 16); ++j)
#pragma unroll
          for (int m = 0; m < Tile::m_tiles; ++m) {
            const auto& rows = a[j - k][m];
            mma<Math>(scores[m][2 * n], rows[0], rows[1], rows[2], rows[3], b[j - k][0], b[j - k][1]);
            mma<Math>(scores[m][2 * n + 1], rows[0], rows[1], rows[2], rows[3], b[j - k][2], b[j - k][3]);
          }
      }
    }
  }

  __device__ void mask(float (&scores)[Tile::m_tiles][Tile::tokens / 8][4], int first) const {
#pragma unroll
    for (int m = 0; m < Tile::m_tiles; ++m)
#pragma unroll
      for (int n = 0; n < Tile::tokens / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (first + n * 8 + lane_ % 4 * 2 + j % 2 >= limit_[2 * m + j / 2]) scores[m][n][j] = minus_infinity;
  }

  // Scores to probabilities relative to the largest score so far; older sums shrink to match.
  __device__ void soften(float (&scores)[Tile::m_tiles][Tile::tokens / 8][4]) {
#pragma unroll
    for (int m = 0; m < Tile::m_tiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = 2 * m + half;
        float top = minus_infinity;
#pragma unroll
        for (int n = 0; n < Tile::tokens / 8; ++n)
          top = fmaxf(top, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        top = fmaxf(largest_[r], top * p_.scale_log2);
        const float keep = exp2_of(largest_[r] - top);
        largest_[r] = top;
        float tile_sum = 0.0f;
#pragma unroll
        for (int n = 0; n < Tile::tokens / 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& x = scores[m][n][2 * half + j];
            x = exp2_of(__fmaf_rn(x, p_.scale_log2, -top));
            tile_sum += x;
          }
        sum_[r] = __fmaf_rn(sum_[r], keep, tile_sum);
#pragma unroll
        for (int d = 0; d < dim / 8; ++d) {
          out_[m][d][2 * half] *= keep;
          out_[m][d][2 * half + 1] *= keep;
        }
      }
  }

  __device__ void add_values(const float (&p)[Tile::m_tiles][Tile::tokens / 8][4], uint32_t values) {
    const uint32_t row = values + (lane_ % 16 * Tile::kv_row + lane_ / 16) * 16;
#pragma unroll
    for (int k = 0; k < Tile::tokens / 16; ++k) {
      uint32_t a[Tile::m_tiles][4];
#pragma unroll
      for (int m = 0; m < Tile::m_tiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[m][i] = pair_of<Math>(p[m][2 * k + i / 2][i % 2 * 2], p[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int d = 0; d < dim / 16; d += slices) {
        uint32_t b[slices][4];
        load_values_second<C>(b, row + (k * 16 * Tile::kv_row + d / slices * 2) * 16, d + slices <= dim / 16);
#pragma unroll
        for (int j = d; j < std::min(d + slices, dim / 16); ++j)
#pragma unroll
          for (int m = 0; m < Tile::m_tiles; ++m) {
            mma<Math>(out_[m][2 * j], a[m][0], a[m][1], a[m][2], a[m][3], b[j - d][0], b[j - d][1]);
            mma<Math>(out_[m][2 * j + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[j - d][2], b[j - d][3]);
          }
      }
    }
  }

  __device__ void write_out() {
#pragma unroll
    for (int r = 0; r < 2 * Tile::m_tiles; ++r) {
      float total = sum_[r];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const int packed = packed_row(r);
      if (packed >= share_.rows) continue;
      if constexpr (is_partial) {
        const PartRow to = part_row(p_, share_, packed);
        if (lane_ % 4 == 0) *to.state = make_float2(largest_[r], total);
        for_pairs(r, [&](int column, float low, float high) {
          *reinterpret_cast<float2*>(to.sums + column) = make_float2(low, high);
        });
        continue;
      }
      const float scale = 1.0f / total * p_.v_scale;
      T* to = p_.out + (share_.first_row + packed / p_.group) * p_.out_row +
              (int64_t{share_.head} * p_.group + packed % p_.group) * p_.out_head;
      for_pairs(r, [&](int column, float low, float high) {
        *reinterpret_cast<uint32_t*>(to + column) = pair_of<T>(low * scale, high * scale);
      });
    }
  }
  // body(first of two columns, their sums) for this lane's columns of its row r.
  template <class Body>
  __device__ void for_pairs(int r, Body&& body) const {
    const int m = r / 2, i = r % 2 * 2, t = lane_ % 4;
#pragma unroll
    for (int d = 0; d < dim / 16; ++d) {
      const float (&low)[4] = out_[m][2 * d], (&high)[4] = out_[m][2 * d + 1];
      const auto column = [&](int j, int half) { return d * 16 + Element::sum_dim(2 * t + j, half); };
      if constexpr (slices == 1)
        body(column(0, 0), low[i], low[i + 1]), body(column(0, 1), high[i], high[i + 1]);
      else
        body(column(0, 0), low[i], high[i]), body(column(1, 0), low[i + 1], high[i + 1]);
    }
  }

  const AttentionParams<T, C>& p_;
  const Share& share_;
  const uint32_t query_, keys_, values_;
  const int lane_, warp_row_;
  int limit_[2 * Tile::m_tiles];
  float out_[Tile::m_tiles][dim / 8][4] = {};
  float largest_[2 * Tile::m_tiles], sum_[2 * Tile::m_tiles] = {};
};

template <class T, class C, int dim>
__global__ void __launch_bounds__(threads) paged_prefill_kernel(const __grid_constant__ AttentionParams<T, C> p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  extern __shared__ uint4 shared[];
  Share share;
  const int index = gridDim.x - 1 - blockIdx.x;  // late rows see most tokens: the longest work first
  if (Prompts<Tile<C, dim>::rows>(p).find(p, index, blockIdx.y, share))
    Prefill<T, C, dim, false>(p, share, shared).run();
}

// How many shares there are is known on the device only.
template <class T, class C, int dim>
__global__ void __launch_bounds__(threads) paged_prefixes_kernel(const __grid_constant__ AttentionParams<T, C> p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  extern __shared__ uint4 shared[];
  const Prefixes prefixes(p);
  const int count = prefixes.shares() * p.kv_heads;
  for (int index = blockIdx.x; index < count; index += gridDim.x) {
    Share share;
    if (!prefixes.find(p, index / p.kv_heads, index % p.kv_heads, share)) continue;
    // The plan's shares may be of more rows than this kernel's.
    share.rows = min(share.row0 + p.share_rows, share.rows);
    for (; share.row0 < share.rows; share.row0 += Tile<C, dim>::rows) Prefill<T, C, dim, true>(p, share, shared).run();
  }
}

}  // namespace prefill

template <class T, class C>
void paged_prefill_any(const AttentionParams<T, C>& p, Stream stream) {
  by_head_dim(p.dim, [&]<int head_dim>() {
    using Tile = prefill::Tile<C, head_dim>;
    const dim3 grid(static_cast<unsigned>(p.rows * p.group / Tile::rows + p.seqs), static_cast<unsigned>(p.kv_heads));
    launch(prefill::paged_prefill_kernel<T, C, head_dim>, grid, prefill::threads, Tile::bytes, stream, p);
  });
}

template <class T, class C>
void paged_prefixes_any(AttentionParams<T, C> p, Stream stream) {
  p.share_rows = prefill_share_rows(p.dim);
  by_head_dim(p.dim, [&]<int head_dim>() {
    launch(prefill::paged_prefixes_kernel<T, C, head_dim>, static_cast<unsigned>(2 * multiprocessors()),
           prefill::threads, prefill::Tile<C, head_dim>::bytes, stream, p);
  });
}

}  // namespace hybrid::cuda
