// The computing warpgroups of prefill_sm90.cuh.
#pragma once

#include "prefill_layout.cuh"
#include "wgmma.cuh"

namespace hybrid::cuda::prefill {

// A computing warpgroup: 64 rows of every share.
template <class T, class C, int dim, bool is_partial>
class Consumer {
  using Layout = Layout<dim, sizeof(C) == 1>;
  static constexpr int score_columns = tile_tokens / 8, out_columns = dim / 8;

 public:
  __device__ Consumer(const AttentionParams<T, C>& p, const Layout& layout, const Share* shares)
      : p_(p),
        layout_(layout),
        shares_(shares),
        lane_(threadIdx.x % warp_size),
        group_(threadIdx.x / group_threads - 1),
        row_(group_ * group_rows + threadIdx.x % group_threads / warp_size * 16 + lane_ / 4) {}

  __device__ void run() {
    if (group_ == Layout::groups - 1) pass_turn();  // the first turn is group 0's
    for (uint32_t n = 0;; ++n) {
      layout_.work.wait_full(n);
      const Share share = shares_[n % slots];
      if (share.head < 0) return;
      layout_.queries.wait_full(n);
      attend(share, n);
    }
  }

 private:
  __device__ void attend(const Share& share, uint32_t n) {
    const int tiles = (share.visible + tile_tokens - 1) / tile_tokens;
    const int seen_by_all = share.position + min(share.row0 + group_ * group_rows, share.rows - 1) / p_.group + 1;
    int limit[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      limit[r] = share.position + min(share.row0 + row_ + r * 8, share.rows - 1) / p_.group + 1;
    const uint32_t query = layout_.query_tile(n) + group_ * group_rows * column_bytes;
    float scores[score_columns][4], out[out_columns][4] = {};
    float largest[2] = {minus_infinity, minus_infinity}, sum[2] = {}, keep[2];
    uint32_t weights[tile_tokens / 16][4];

    layout_.k.wait_full(used_k_);
    start_scores(scores, query, layout_.key_tile(used_k_));
    wait_products<0>();
    pin(scores);
    release(layout_.k, used_k_);
    if (tile_tokens > seen_by_all) mask(scores, limit, 0);
    soften(scores, largest, sum, keep);
    round_weights(weights, scores);
    if (tiles > 1) layout_.k.wait_full(used_k_);
    const auto step = [&]<bool masked>(int tile) {
      take_turn();
      start_scores(scores, query, layout_.key_tile(used_k_));
      layout_.v.wait_full(used_v_);
      start_outputs(out, weights, layout_.value_tile(used_v_));
      pass_turn();
      wait_products<1>();
      pin(scores);
      release(layout_.k, used_k_);
      if constexpr (masked) mask(scores, limit, tile * tile_tokens);
      soften(scores, largest, sum, keep);
      pin(scores);
      // Mostly false far from the start: a factor of 1 changes no bit. The sums, never negative, are asked for only to
      // have them added up before the wait.
      const bool shrinks =
          __any_sync(0xffffffffu, keep[0] != 1.0f || keep[1] != 1.0f || sum[0] < 0.0f || sum[1] < 0.0f);
      if (tile + 1 < tiles) layout_.k.wait_full(used_k_);
      wait_products<0>();
      pin(out);
      release(layout_.v, used_v_);
      round_weights(weights, scores);
      if (shrinks) shrink(out, keep);
    };
    const int whole = min(tiles, seen_by_all / tile_tokens);
    int tile = 1;
    for (; tile < whole; ++tile) step.template operator()<false>(tile);
    for (; tile < tiles; ++tile) step.template operator()<true>(tile);
    release_work(n);
    layout_.v.wait_full(used_v_);
    clear_unseen(layout_.value_tile(used_v_), share.visible - (tiles - 1) * tile_tokens);
    start_outputs(out, weights, layout_.value_tile(used_v_));
    wait_products<0>();
    pin(out);
    release(layout_.v, used_v_);
    if constexpr (is_partial)
      write_part(share, out, largest, sum);
    else
      write_out(share, out, sum);
  }

  // Named barriers: one a warpgroup for its turn, one for its own threads.
  __device__ void take_turn() const { meet(1 + group_, 2 * group_threads); }
  __device__ void pass_turn() const { pass(1 + (group_ + 1) % Layout::groups, 2 * group_threads); }
  __device__ void meet_group() const { meet(1 + Layout::groups + group_, group_threads); }
  template <int stages>
  __device__ void release(const Ring<stages>& ring, uint32_t& n) const {
    __syncwarp();
    if (lane_ == 0) arrive(ring.empty(n));
    ++n;
  }
  __device__ void release_work(uint32_t n) const {
    __syncwarp();
    if (lane_ == 0) arrive(layout_.work.empty(n));
  }

  __device__ static void start_scores(float (&scores)[score_columns][4], uint32_t query, uint32_t keys) {
    const uint64_t a = swizzled_tile(query), b = swizzled_tile(keys);
    pin(scores);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      const int column = k / 4, offset = k % 4 * 32;
      product<T>(scores, moved(a, column * Layout::query_column + offset),
                 moved(b, column * Layout::kv_column + offset), k > 0);
    }
    commit_products();
  }

  __device__ static void start_outputs(float (&out)[out_columns][4], const uint32_t (&weights)[tile_tokens / 16][4],
                                       uint32_t values) {
    const uint64_t b = swizzled_tile(values, Layout::kv_column);
    pin(out);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < tile_tokens / 16; ++k) add_product<T>(out, weights[k], moved(b, k * 16 * column_bytes));
    commit_products();
  }

  __device__ void mask(float (&scores)[score_columns][4], const int (&limit)[2], int first) const {
#pragma unroll
    for (int n = 0; n < score_columns; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + n * 8 + lane_ % 4 * 2 + j % 2 >= limit[j / 2]) scores[n][j] = minus_infinity;
  }

  // Scores to probabilities relative to the largest score so far; older sums shrink to match, by `keep`.
  __device__ void soften(float (&scores)[score_columns][4], float (&largest)[2], float (&sum)[2],
                         float (&keep)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = minus_infinity;
#pragma unroll
      for (int n = 0; n < score_columns; ++n) top = fmaxf(top, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      top = fmaxf(largest[r], top * p_.scale_log2);
      keep[r] = exp2_of(largest[r] - top);
      largest[r] = top;
      float tile_sum[2] = {};
#pragma unroll
      for (int n = 0; n < score_columns; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = scores[n][2 * r + j];
          x = exp2_of(__fmaf_rn(x, p_.scale_log2, -top));
          tile_sum[j] += x;
        }
      sum[r] = __fmaf_rn(sum[r], keep[r], tile_sum[0] + tile_sum[1]);
    }
  }

  __device__ static void round_weights(uint32_t (&weights)[tile_tokens / 16][4],
                                       const float (&scores)[score_columns][4]) {
#pragma unroll
    for (int k = 0; k < tile_tokens / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[k][i] = pair_of<T>(scores[2 * k + i / 2][i % 2 * 2], scores[2 * k + i / 2][i % 2 * 2 + 1]);
  }

  __device__ static void shrink(float (&out)[out_columns][4], const float (&keep)[2]) {
#pragma unroll
    for (int d = 0; d < out_columns; ++d)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[d][j] *= keep[j / 2];
  }

  // Zeros for values that no row sees: what lies there may be NaN, which a weight of 0 does not silence. Both
  // warpgroups write the same zeros.
  __device__ void clear_unseen(uint32_t values, int seen) const {
    if (seen == tile_tokens) return;
    for (int i = threadIdx.x % group_threads; i < (tile_tokens - seen) * (column_bytes / 16); i += group_threads)
#pragma unroll
      for (int column = 0; column < Layout::columns; ++column)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(values + column * Layout::kv_column +
                                                                      seen * column_bytes + i * 16),
                     "r"(0)
                     : "memory");
    publish_shared();
    meet_group();
  }

  // Of the four lanes of a row.
  __device__ static float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }

  __device__ void write_part(const Share& share, const float (&out)[out_columns][4], const float (&largest)[2],
                             const float (&sum)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = row_sum(sum[r]);
      const int packed = share.row0 + row_ + r * 8;
      if (packed >= share.rows) continue;
      const PartRow to = part_row(p_, share, packed);
      if (lane_ % 4 == 0) *to.state = make_float2(largest[r], total);
#pragma unroll
      for (int d = 0; d < out_columns; ++d)
        *reinterpret_cast<float2*>(to.sums + d * 8 + lane_ % 4 * 2) = make_float2(out[d][2 * r], out[d][2 * r + 1]);
    }
  }

  __device__ void write_out(const Share& share, const float (&out)[out_columns][4], const float (&sum)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = row_sum(sum[r]);
      const int packed = share.row0 + row_ + r * 8;
      const float scale = 1.0f / total * p_.v_scale;
      T* to = p_.out + (share.first_row + packed / p_.group) * p_.out_row +
              (int64_t{share.head} * p_.group + packed % p_.group) * p_.out_head + lane_ % 4 * 8;
#pragma unroll
      for (int d = 0; d < out_columns; d += 4) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = pair_of<T>(out[d + i][2 * r] * scale, out[d + i][2 * r + 1] * scale);
        transpose(pairs);
        if (packed < share.rows) *reinterpret_cast<uint4*>(to + d * 8) = {pairs[0], pairs[1], pairs[2], pairs[3]};
      }
    }
  }

  // Of every four lanes: lane i's word j becomes lane j's word i.
  __device__ void transpose(uint32_t (&words)[4]) const {
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
      const bool upper = lane_ & step;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & step) continue;
        uint32_t &low = words[i], &high = words[i + step];
        const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? low : high, step);
        low = upper ? got : low, high = upper ? high : got;
      }
    }
  }

  const AttentionParams<T, C>& p_;
  const Layout& layout_;
  const Share* shares_;
  const int lane_, group_, row_;
  uint32_t used_k_ = 0, used_v_ = 0;
};

}  // namespace hybrid::cuda::prefill
