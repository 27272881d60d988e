// A ragged batch for tests of paged attention on the CPU and on the GPU.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>

#include "gpu_test.h"

namespace hybrid::test {

struct Shape {
  int64_t heads, kv_heads, dim, block_size;
};
struct Sequence {
  int32_t queries, tokens;
};

// A ragged batch over one layer of a cache whose unused slots, neighbouring layers and output hold NaN. Queries are a
// view of a wider row, as after a fused projection. Sequences with one query that come first are decodes.
template <class T, class C>
class Batch {
 public:
  static constexpr int64_t layers = 2, layer = 1;

  Batch(const Shape& shape, const std::vector<Sequence>& sequences, std::mt19937& rng, int64_t decodes = -1)
      : shape_(shape),
        sequences_(sequences),
        blocks_(2 + blocks_of(shape, sequences)),
        cache({blocks_, layers, 2, shape.kv_heads, shape.block_size, shape.dim}),
        qkv({rows(), (shape.heads + 2 * shape.kv_heads) * shape.dim}),
        out({rows(), shape.heads, shape.dim}),
        query_start({size() + 1}),
        seq_lens({size()}),
        kv_start({size() + 1}),
        kv_blocks({blocks_of(shape, sequences) + 3}),
        num_decodes({1}),
        prefix_start({size() + 1}),
        prefix_lens({size()}),
        num_prefixes({1}),
        plan({decode_plan_size(size())}),
        decodes_(decodes) {
    if (decodes_ < 0)
      for (decodes_ = 0; decodes_ < size() && sequences[static_cast<size_t>(decodes_)].queries == 1;) ++decodes_;
    cache.poison(), out.poison(), qkv.fill_random(rng, 2.0f);
    std::vector<int32_t> free(static_cast<size_t>(blocks_));
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), rng);
    auto next = kv_blocks.host().begin();
    std::fill(next, kv_blocks.host().end(), 0);
    for (size_t s = 0; s < sequences.size(); ++s) {
      query_start.host()[s + 1] = query_start.host()[s] + sequences[s].queries;
      seq_lens.host()[s] = sequences[s].tokens;
      const int64_t count = (sequences[s].tokens + shape.block_size - 1) / shape.block_size;
      kv_start.host()[s + 1] = kv_start.host()[s] + static_cast<int32_t>(count);
      next = std::copy(free.end() - count, free.end(), next);
      free.resize(free.size() - static_cast<size_t>(count));
      for (int64_t t = 0; t < sequences[s].tokens; ++t) fill(static_cast<int64_t>(s), t, rng);
    }
    num_decodes.host()[0] = decodes_;
    cache.upload(), num_decodes.upload(), query_start.upload(), seq_lens.upload(), kv_start.upload(),
        kv_blocks.upload();
  }

  int64_t size() const { return static_cast<int64_t>(sequences_.size()); }
  int64_t rows() const {
    return std::accumulate(sequences_.begin(), sequences_.end(), int64_t{0},
                           [](int64_t n, const Sequence& s) { return n + s.queries; });
  }
  PagedAttention args(Device device) {
    PagedAttention a{};
    a.out = out.on(device);
    a.q = qkv.on(device);
    a.q.ndim = 3;
    a.q.shape[1] = shape_.heads, a.q.shape[2] = shape_.dim, a.q.strides[1] = shape_.dim, a.q.strides[2] = 1;
    a.k_cache = layer_of(device, 0), a.v_cache = layer_of(device, 1);
    a.query_start = query_start.on(device), a.seq_lens = seq_lens.on(device);
    a.kv_start = kv_start.on(device), a.kv_blocks = kv_blocks.on(device);
    a.num_decodes = num_decodes.on(device), a.max_decodes = decodes_, a.max_prompts = size() - decodes_;
    for (const Sequence& s : sequences_) a.max_query_len = std::max<int64_t>(a.max_query_len, s.queries);
    a.scale = 1.0f / std::sqrt(static_cast<float>(shape_.dim));
    a.k_scale = k_scale<C>, a.v_scale = v_scale<C>;
    return a;
  }
  // The decodes of group g = 0, 1, ..., the next groups[g].first ones, from now on begin with the same blocks, those of
  // the first groups[g].second tokens of its first one.
  void share(const std::vector<std::pair<int32_t, int32_t>>& groups) {
    num_prefixes.host()[0] = static_cast<int64_t>(groups.size());
    for (size_t g = 0; g < groups.size(); ++g) {
      const auto first = static_cast<size_t>(prefix_start.host()[g]), count = static_cast<size_t>(groups[g].first);
      prefix_start.host()[g + 1] = static_cast<int32_t>(first + count);
      prefix_lens.host()[g] = groups[g].second;
      const auto blocks = kv_blocks.host().begin();
      for (size_t s = first + 1; s < first + count; ++s)
        std::copy_n(blocks + kv_start.host()[first], groups[g].second / shape_.block_size, blocks + kv_start.host()[s]);
    }
    prefix_start.upload(), prefix_lens.upload(), num_prefixes.upload(), kv_blocks.upload();
  }
  // args() with the plan of all layers, which is made here, and with what share() was told.
  PagedAttention planned_args(Stream stream = nullptr) {
    PagedAttention a = args(Device::cuda);
    a.plan = plan.on(Device::cuda), a.stream = stream, a.shares_prefixes = num_prefixes.host()[0] > 0;
    PlanDecode p{a.plan,
                 a.query_start,
                 a.seq_lens,
                 a.kv_start,
                 a.num_decodes,
                 a.max_decodes,
                 shape_.heads,
                 shape_.kv_heads,
                 shape_.dim,
                 {},
                 {},
                 {},
                 0,
                 stream};
    if (a.shares_prefixes) {
      p.prefix_start = prefix_start.on(Device::cuda), p.prefix_lens = prefix_lens.on(Device::cuda);
      p.num_prefixes = num_prefixes.on(Device::cuda), p.block_size = shape_.block_size;
    }
    plan_decode(p);
    return a;
  }
  // On the GPU with a plan and without: no bit may differ.
  void run_both() {
    for (Device device : {Device::cpu, Device::cuda}) paged_attention(args(device));
    const std::vector<T> on_its_own = out.download();
    cuda::check(cudaMemset(out.on(Device::cuda).data, 0xff, out.bytes()));
    paged_attention(planned_args());
    const std::vector<T> with_plan = out.download();
    ASSERT_EQ(std::memcmp(on_its_own.data(), with_plan.data(), out.bytes()), 0) << "a plan changed bits";
  }

 private:
  static int64_t blocks_of(const Shape& shape, const std::vector<Sequence>& sequences) {
    int64_t n = 0;
    for (const Sequence& s : sequences) n += (s.tokens + shape.block_size - 1) / shape.block_size;
    return n;
  }
  TensorView layer_of(Device device, int64_t which) {
    const TensorView all = cache.on(device);
    TensorView t = all;
    t.ndim = 4;
    for (int i = 1; i < 4; ++i) t.shape[i] = all.shape[i + 2], t.strides[i] = all.strides[i + 2];
    t.data = all.as<C>() + layer * all.strides[1] + which * all.strides[2];
    return t;
  }
  void fill(int64_t s, int64_t token, std::mt19937& rng) {
    const int64_t block =
        kv_blocks.host()[static_cast<size_t>(kv_start.host()[static_cast<size_t>(s)] + token / shape_.block_size)];
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    for (int64_t which : {0, 1})
      for (int64_t head = 0; head < shape_.kv_heads; ++head) {
        const int64_t at = ((((block * layers + layer) * 2 + which) * shape_.kv_heads + head) * shape_.block_size +
                            token % shape_.block_size) *
                           shape_.dim;
        for (int64_t d = 0; d < shape_.dim; ++d) cache.host()[static_cast<size_t>(at + d)] = C(uniform(rng));
      }
  }

  Shape shape_;
  std::vector<Sequence> sequences_;
  int64_t blocks_;

 public:
  Twin<C> cache;
  Twin<T> qkv, out;
  Twin<int32_t> query_start, seq_lens, kv_start, kv_blocks;
  Twin<int64_t> num_decodes;
  Twin<int32_t> prefix_start, prefix_lens;
  Twin<int64_t> num_prefixes;
  Twin<int32_t> plan;

 private:
  int64_t decodes_;
};

template <class T>
class GpuAttention : public ::testing::Test {
 protected:
  std::mt19937 rng{23};
};
// Outputs are averages of values in (-1, 1): probabilities rounded to T cost about one rounding of 1.
template <class T>
constexpr float absolute() {
  return sizeof(T) == 4 ? 1e-5f : rounding<T>() / 2;
}

}  // namespace hybrid::test
