// Paged attention: decode, prefill and mixed batches by one path.
//
// A row's KV is cut at multiples of 64 (tiles, online softmax in order) and of 512 tokens (chunks, merged left to
// right). Both cuts are functions of the KV position only, so a row's bits depend on neither its batch, its chunk of
// the prompt nor the threads. A piece of work is (run of query rows, KV head, chunks): each key and value is read once
// for all the query heads that share it, and once for all rows of the run.
#pragma once

#include "ops/cpu/attention_plan.h"
#include "ops/cpu/buffer.h"
#include "ops/cpu/kernels/attention_tile.h"
#include "ops/cpu/thread_pool.h"
#include "ops/dispatch.h"

namespace hybrid::cpu::HYBRID_ISA {

// Query rows (tokens x heads of a group) a tile: converted keys are then reused enough, and the sums stay in L2.
constexpr int64_t attention_rows = 128;

// sums of one row over one or more chunks: the state and stride unnormalised outputs.
struct RowSums {
  RowState* state;
  float* out;
};

// total += chunk
inline void merge_sums(RowSums total, RowSums chunk, int64_t stride) {
  const float largest = std::max(total.state->largest, chunk.state->largest);
  const float a = exp_of(total.state->largest - largest), b = exp_of(chunk.state->largest - largest);
  *total.state = {largest, total.state->sum * a + chunk.state->sum * b};
  for (int64_t j = 0; j < stride; j += F32::width)
    fma(F32::load(total.out + j), F32(a), F32::load(chunk.out + j) * F32(b)).store(total.out + j);
}

template <class T, class C>
class Attention {
 public:
  Attention(const PagedAttention& a, const AttentionPlan& plan, float* partials)
      : a_(a),
        plan_(plan),
        partials_(partials),
        kv_heads_(a.k_cache.shape[1]),
        block_size_(a.k_cache.shape[2]),
        dim_(a.q.shape[2]),
        group_(a.q.shape[1] / kv_heads_),
        stride_((dim_ + F32::width - 1) / F32::width * F32::width),
        scale_(a.scale * a.k_scale) {}

  // Floats of one row's partial result.
  static int64_t partial_size(int64_t dim) { return (dim + F32::width - 1) / F32::width * F32::width + F32::width; }

  // Pieces of work [begin, end): piece i is KV head i % kv_heads of span i / kv_heads.
  void run(int64_t begin, int64_t end);
  void merge(int32_t tile_index, int64_t head);

 private:
  using Math = TileMath<T>;
  struct Scratch {
    float *query, *keys, *values, *scores, *out, *chunk_out;
    RowState *state, *chunk_state;
  };

  void run_span(const QuerySpan& span, int64_t head, const TileRows<C>& following);
  Scratch scratch() const;
  void load_query(float* to, const QueryTile& tile, int64_t head) const;
  void find_rows(TileRows<C>& rows, const QueryTile& tile, int64_t head, int64_t begin, int64_t end) const;
  void sum_chunk(const Scratch& s, const QueryTile& tile, int64_t head, int64_t chunk, const TileRows<C>& following,
                 RowState* state, float* out) const;
  void sum_tile(const Scratch& s, const QueryTile& tile, int64_t begin, int64_t count, RowState* state,
                float* out) const;
  void write_out(const QueryTile& tile, int64_t head, int64_t r, RowSums sums) const;
  RowSums partial(const QueryTile& tile, int64_t head, int64_t chunk, int64_t r) const;
  // The first row of the tile that sees KV position `position`.
  int64_t first_row(const QueryTile& tile, int64_t position) const {
    return std::max<int64_t>(0, position - tile.position) * group_;
  }

  const PagedAttention& a_;
  const AttentionPlan& plan_;
  float* partials_;
  int64_t kv_heads_, block_size_, dim_, group_, stride_;
  float scale_;  // of scores
};

template <class T, class C>
typename Attention<T, C>::Scratch Attention<T, C>::scratch() const {
  static thread_local Buffer buffer;
  const int64_t rows = std::max(attention_rows, group_);
  const int64_t query = rows * dim_, keys = dim_ * kv_tile, values = kv_tile * stride_, scores = tile_rows * kv_tile;
  const int64_t out = rows * stride_, state = rows * 2;
  float* p = buffer.floats(query + keys + values + scores + 2 * out + 2 * state + 8 * F32::width);
  const auto take = [&p](int64_t n) {
    float* taken = p;
    p += (n + F32::width - 1) / F32::width * F32::width;
    return taken;
  };
  Scratch s;
  s.query = take(query);
  s.keys = take(keys);
  s.values = take(values);
  s.scores = take(scores);
  s.out = take(out);
  s.chunk_out = take(out);
  s.state = reinterpret_cast<RowState*>(take(state));
  s.chunk_state = reinterpret_cast<RowState*>(take(state));
  return s;
}

template <class T, class C>
void Attention<T, C>::load_query(float* to, const QueryTile& tile, int64_t head) const {
  const int64_t words = dim_ / Math::pack;
  for (int64_t r = 0; r < tile.tokens * group_; ++r) {
    const T* from =
        a_.q.as<const T>() + (tile.row + r / group_) * a_.q.strides[0] + (head * group_ + r % group_) * a_.q.strides[1];
    for (int64_t w = 0; w < words; w += F32::width) {
      const int n = static_cast<int>(std::min<int64_t>(F32::width, words - w));
      load_words<T>(from + w * Math::pack, n).store(to + r * words + w, n);
    }
  }
}

// The cached rows of the tile at KV position `begin`, up to `end`.
template <class T, class C>
void Attention<T, C>::find_rows(TileRows<C>& rows, const QueryTile& tile, int64_t head, int64_t begin,
                                int64_t end) const {
  const int32_t* blocks = a_.kv_blocks.as<const int32_t>() + a_.kv_start.as<const int32_t>()[tile.sequence];
  end = std::min(end, begin + kv_tile);
  rows.count = 0;
  for (int64_t t = begin; t < end;) {
    const int64_t offset = t % block_size_, block = blocks[t / block_size_],
                  n = std::min(end - t, block_size_ - offset);
    const C* key = a_.k_cache.as<const C>() + block * a_.k_cache.strides[0] + (head * block_size_ + offset) * dim_;
    const C* value = a_.v_cache.as<const C>() + block * a_.v_cache.strides[0] + (head * block_size_ + offset) * dim_;
    for (int64_t i = 0; i < n; ++i) {
      rows.keys[rows.count + i] = key + i * dim_;
      rows.values[rows.count + i] = value + i * dim_;
    }
    rows.count += n;
    t += n;
  }
}

// One tile for all rows that see it. KV positions [begin, begin + count) are loaded.
template <class T, class C>
void Attention<T, C>::sum_tile(const Scratch& s, const QueryTile& tile, int64_t begin, int64_t count, RowState* state,
                               float* out) const {
  const int64_t rows = tile.tokens * group_, words = dim_ / Math::pack;
  for (int64_t r = first_row(tile, begin); r < rows; r += tile_rows) {
    const int64_t n = std::min(tile_rows, rows - r);
    multiply<Math>(n, kv_tile, s.scores, kv_tile, s.query + r * words, words, s.keys, kv_tile, words, nullptr);
    int64_t valid[tile_rows];
    float keep[tile_rows];
    for (int64_t i = 0; i < n; ++i) {
      valid[i] = std::min(count, tile.position + (r + i) / group_ + 1 - begin);
      keep[i] = softmax_row<T>(s.scores + i * kv_tile, valid[i], scale_, state[r + i]);
    }
    add_values<T>(n, out + r * stride_, stride_, s.scores, s.values, valid, keep);
  }
}

template <class T, class C>
void Attention<T, C>::sum_chunk(const Scratch& s, const QueryTile& tile, int64_t head, int64_t chunk,
                                const TileRows<C>& following, RowState* state, float* out) const {
  const int64_t begin = chunk * attention_chunk, end = std::min(tile.end(), begin + attention_chunk);
  for (int64_t r = first_row(tile, begin); r < tile.tokens * group_; ++r) {
    state[r] = {minus_infinity, 0.0f};
    std::fill_n(out + r * stride_, stride_, 0.0f);
  }
  TileRows<C> found[2];
  int current = 0;
  find_rows(found[0], tile, head, begin, end);
  for (int64_t t = begin; t < end; t += kv_tile, current ^= 1) {
    const bool last = t + kv_tile >= end;
    if (!last) find_rows(found[current ^ 1], tile, head, t + kv_tile, end);
    TileFetch<C> next(last ? following : found[current ^ 1], dim_);
    load_keys<T>(s.keys, found[current], next, dim_);
    load_values<T>(s.values, found[current], next, dim_, stride_);
    sum_tile(s, tile, t, found[current].count, state, out);
  }
}

template <class T, class C>
RowSums Attention<T, C>::partial(const QueryTile& tile, int64_t head, int64_t chunk, int64_t r) const {
  const int64_t index = head * plan_.partial_rows() + tile.partial + chunk * tile.tokens * group_ + r;
  float* p = partials_ + index * partial_size(dim_);
  return {reinterpret_cast<RowState*>(p + stride_), p};
}

template <class T, class C>
void Attention<T, C>::write_out(const QueryTile& tile, int64_t head, int64_t r, RowSums sums) const {
  T* to =
      a_.out.as<T>() + (tile.row + r / group_) * a_.out.strides[0] + (head * group_ + r % group_) * a_.out.strides[1];
  const F32 sum(sums.state->sum), scale(a_.v_scale);
  for (int64_t j = 0; j < dim_; j += F32::width)
    (F32::load(sums.out + j) / sum * scale).store(to + j, static_cast<int>(std::min<int64_t>(F32::width, dim_ - j)));
}

template <class T, class C>
void Attention<T, C>::run(int64_t begin, int64_t end) {
  const auto& spans = plan_.spans();
  for (int64_t i = begin; i < end; ++i) {
    TileRows<C> following;
    if (i + 1 < end) {
      const QuerySpan& next = spans[static_cast<size_t>((i + 1) / kv_heads_)];
      const QueryTile& tile = plan_.tiles()[static_cast<size_t>(next.tile)];
      const int64_t first = next.chunk_begin * attention_chunk;
      find_rows(following, tile, (i + 1) % kv_heads_, first, tile.end());
    }
    run_span(spans[static_cast<size_t>(i / kv_heads_)], i % kv_heads_, following);
  }
}

template <class T, class C>
void Attention<T, C>::run_span(const QuerySpan& span, int64_t head, const TileRows<C>& following) {
  const QueryTile& tile = plan_.tiles()[static_cast<size_t>(span.tile)];
  const int64_t rows = tile.tokens * group_;
  const Scratch s = scratch();
  load_query(s.query, tile, head);
  for (int64_t chunk = span.chunk_begin; chunk < span.chunk_end; ++chunk) {
    const int64_t first = first_row(tile, chunk * attention_chunk), chunk_end = (chunk + 1) * attention_chunk;
    const bool last = chunk + 1 == span.chunk_end;
    TileRows<C> next_chunk;
    if (!last) find_rows(next_chunk, tile, head, chunk_end, tile.end());
    const TileRows<C>& next = last ? following : next_chunk;
    if (tile.partial >= 0) {
      sum_chunk(s, tile, head, chunk, next, s.state, s.out);
      for (int64_t r = first; r < rows; ++r) {
        const RowSums to = partial(tile, head, chunk, r);
        *to.state = s.state[r];
        std::memcpy(to.out, s.out + r * stride_, static_cast<size_t>(stride_) * sizeof(float));
      }
    } else if (chunk == 0) {
      sum_chunk(s, tile, head, chunk, next, s.state, s.out);
    } else {
      sum_chunk(s, tile, head, chunk, next, s.chunk_state, s.chunk_out);
      for (int64_t r = first; r < rows; ++r)
        merge_sums({s.state + r, s.out + r * stride_}, {s.chunk_state + r, s.chunk_out + r * stride_}, stride_);
    }
  }
  if (tile.partial >= 0) return;
  for (int64_t r = 0; r < rows; ++r) write_out(tile, head, r, {s.state + r, s.out + r * stride_});
}

template <class T, class C>
void Attention<T, C>::merge(int32_t tile_index, int64_t head) {
  const QueryTile& tile = plan_.tiles()[static_cast<size_t>(tile_index)];
  for (int64_t r = 0; r < tile.tokens * group_; ++r) {
    const RowSums total = partial(tile, head, 0, r);
    const int64_t position = tile.position + r / group_;
    for (int64_t chunk = 1; chunk * attention_chunk <= position; ++chunk)
      merge_sums(total, partial(tile, head, chunk, r), stride_);
    write_out(tile, head, r, total);
  }
}

template <class T, class C>
void paged_attention_of(const PagedAttention& a) {
  static thread_local AttentionPlan plan;
  static thread_local Buffer partials;
  const int64_t kv_heads = a.k_cache.shape[1], group = a.q.shape[1] / kv_heads;
  plan.build(a, std::max<int64_t>(1, attention_rows / group), pool().size());
  float* partial = partials.floats(plan.partial_rows() * kv_heads * Attention<T, C>::partial_size(a.q.shape[2]));
  Attention<T, C> attention(a, plan, partial);

  // A thread that takes all heads of a span reads whole blocks; with few spans, even shares matter more.
  const auto spans = static_cast<int64_t>(plan.spans().size());
  const int64_t grain = spans >= 8 * pool().size() ? kv_heads : 1;
  pool().parallel_for(spans * kv_heads, grain, [&](int64_t begin, int64_t end) { attention.run(begin, end); });
  const auto& split = plan.split_tiles();
  pool().parallel_for(static_cast<int64_t>(split.size()) * kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) attention.merge(split[static_cast<size_t>(i / kv_heads)], i % kv_heads);
  });
}

inline void paged_attention(const PagedAttention& a) {
  by_cache_dtype(a.q.dtype, a.k_cache.dtype, [&]<class T, class C>() { paged_attention_of<T, C>(a); });
}

}  // namespace hybrid::cpu::HYBRID_ISA
