// AttentionCase: a ragged batch over a paged cache, and its reference in double precision. The content of a sequence is
// a function of (its seed, position), so the same rows can be asked for in any batch and any chunking.
#pragma once

#include <cmath>
#include <numeric>

#include "ops/cpu/isa.h"
#include "owned_tensor.h"

namespace hybrid::test {

struct Shape {
  int64_t heads, kv_heads, dim, block_size;
};

// Rows for positions [seq_len - query_len, seq_len) of the sequence that `seed` names.
struct Sequence {
  uint32_t seed;
  int32_t query_len, seq_len;
};

// Queries of T over a cache of C, a Float8 with scales of its own.
template <class T, class C = T>
class AttentionCase {
 public:
  static constexpr float k_scale = sizeof(C) == 1 ? 1.25f : 1.0f, v_scale = sizeof(C) == 1 ? 0.8f : 1.0f;

  // `placement` shuffles the blocks; every slot that no sequence owns holds NaN, and so does the output.
  AttentionCase(const Shape& shape, const std::vector<Sequence>& sequences, uint32_t placement = 1)
      : shape_(shape),
        sequences_(sequences),
        blocks_(2 + count_blocks(shape, sequences)),
        k_cache({blocks_, shape.kv_heads, shape.block_size, shape.dim}, not_a_number<C>()),
        v_cache({blocks_, shape.kv_heads, shape.block_size, shape.dim}, not_a_number<C>()),
        q({count_rows(sequences), shape.heads, shape.dim}, T{}),
        out({count_rows(sequences), shape.heads, shape.dim}, not_a_number<T>()),
        query_start(std::vector<int32_t>{}),
        seq_lens(std::vector<int32_t>{}),
        kv_start(std::vector<int32_t>{}),
        kv_blocks(std::vector<int32_t>{}) {
    std::vector<int32_t> free(static_cast<size_t>(blocks_));
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), std::mt19937(placement));
    std::vector<int32_t> starts{0}, lens, kv_starts{0}, table;
    for (const Sequence& s : sequences) {
      const size_t first = table.size();
      for (int64_t t = 0; t < s.seq_len; t += shape.block_size) table.push_back(free.back()), free.pop_back();
      fill(s, table.data() + first, starts.back());
      starts.push_back(starts.back() + s.query_len);
      lens.push_back(s.seq_len);
      kv_starts.push_back(static_cast<int32_t>(table.size()));
    }
    query_start = OwnedTensor<int32_t>(starts);
    seq_lens = OwnedTensor<int32_t>(lens);
    kv_start = OwnedTensor<int32_t>(kv_starts);
    kv_blocks = OwnedTensor<int32_t>(table);
  }

  PagedAttention args() {
    int64_t decodes = 0, longest = 0;
    while (decodes < static_cast<int64_t>(sequences_.size()) && sequences_[static_cast<size_t>(decodes)].query_len == 1)
      ++decodes;
    for (const Sequence& s : sequences_) longest = std::max<int64_t>(longest, s.query_len);
    const float scale = 1.0f / std::sqrt(static_cast<float>(shape_.dim));
    num_decodes = OwnedTensor<int64_t>(std::vector<int64_t>{decodes});
    const auto prompts = static_cast<int64_t>(sequences_.size()) - decodes;
    return {
        out.view,       q.view,           k_cache.view, v_cache.view, query_start.view, seq_lens.view, kv_start.view,
        kv_blocks.view, num_decodes.view, decodes,      prompts,      longest,          scale,         {},
        false,          nullptr,          k_scale,      v_scale};
  }

  // What the sequence's row for `position` should be, head by head.
  std::vector<double> reference(size_t sequence, int64_t row, int64_t position) const {
    std::vector<double> result;
    const int64_t group = shape_.heads / shape_.kv_heads;
    for (int64_t h = 0; h < shape_.heads; ++h) {
      std::vector<double> p(static_cast<size_t>(position + 1)), sums(static_cast<size_t>(shape_.dim));
      const T* query = q.data.data() + (row * shape_.heads + h) * shape_.dim;
      double largest = -INFINITY, total = 0;
      for (int64_t t = 0; t <= position; ++t) {
        const C* key = cached(k_cache, sequence, h / group, t);
        double score = 0;
        for (int64_t d = 0; d < shape_.dim; ++d) score += double(float(query[d])) * double(float(key[d]));
        p[static_cast<size_t>(t)] = score * k_scale / std::sqrt(double(shape_.dim));
        largest = std::max(largest, p[static_cast<size_t>(t)]);
      }
      for (double& x : p) total += x = std::exp(x - largest);
      for (int64_t t = 0; t <= position; ++t)
        for (int64_t d = 0; d < shape_.dim; ++d)
          sums[static_cast<size_t>(d)] +=
              p[static_cast<size_t>(t)] / total * v_scale * double(float(cached(v_cache, sequence, h / group, t)[d]));
      result.insert(result.end(), sums.begin(), sums.end());
    }
    return result;
  }

  const C* cached(const OwnedTensor<C>& cache, size_t sequence, int64_t kv_head, int64_t t) const {
    const int32_t block = kv_blocks.data[static_cast<size_t>(kv_start.data[sequence] + t / shape_.block_size)];
    return cache.data.data() +
           ((block * shape_.kv_heads + kv_head) * shape_.block_size + t % shape_.block_size) * shape_.dim;
  }
  T* row(int64_t r) { return out.data.data() + r * shape_.heads * shape_.dim; }
  int64_t row_size() const { return shape_.heads * shape_.dim; }

 private:
  static int64_t count_blocks(const Shape& shape, const std::vector<Sequence>& sequences) {
    int64_t n = 0;
    for (const Sequence& s : sequences) n += (s.seq_len + shape.block_size - 1) / shape.block_size;
    return n;
  }
  static int64_t count_rows(const std::vector<Sequence>& sequences) {
    int64_t n = 0;
    for (const Sequence& s : sequences) n += s.query_len;
    return n;
  }
  void fill(const Sequence& s, const int32_t* table, int64_t first_row) {
    for (int64_t t = 0; t < s.seq_len; ++t) {
      std::minstd_rand random(s.seed * 100003u + static_cast<uint32_t>(t) * 7919u + 1u);
      const auto next = [&] { return static_cast<float>(random()) / 1073741824.0f - 1.0f; };
      for (int64_t h = 0; h < shape_.kv_heads; ++h)
        for (int64_t d = 0; d < shape_.dim; ++d) {
          const int64_t at =
              ((table[t / shape_.block_size] * shape_.kv_heads + h) * shape_.block_size + t % shape_.block_size) *
                  shape_.dim +
              d;
          k_cache[at] = static_cast<C>(next());
          v_cache[at] = static_cast<C>(next());
        }
      const int64_t r = t - (s.seq_len - s.query_len);
      for (int64_t i = 0; i < row_size(); ++i) {
        const T x = static_cast<T>(4.0f * float(static_cast<T>(next())));  // peaked softmax
        if (r >= 0) q[(first_row + r) * row_size() + i] = x;
      }
    }
  }

  Shape shape_;
  std::vector<Sequence> sequences_;
  int64_t blocks_;

 public:
  OwnedTensor<C> k_cache, v_cache;
  OwnedTensor<T> q, out;
  OwnedTensor<int32_t> query_start, seq_lens, kv_start, kv_blocks;
  OwnedTensor<int64_t> num_decodes{std::vector<int64_t>{0}};
};

}  // namespace hybrid::test
