// Paged attention against its CPU twin and, where bits matter, against itself.
#include <algorithm>
#include <numeric>
#include <utility>

#include "gpu_test.h"

namespace hybrid::test {
namespace {

struct Shape {
  int64_t heads, kv_heads, dim, block_size;
};
struct Sequence {
  int32_t queries, tokens;
};

// A ragged batch over one layer of a cache whose unused slots, neighbouring layers and output hold NaN. Queries are a
// view of a wider row, as after a fused projection. Sequences with one query that come first are decodes.
template <class T>
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
    return a;
  }
  void run_both() {
    for (Device device : {Device::cpu, Device::cuda}) paged_attention(args(device));
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
    t.data = all.as<T>() + layer * all.strides[1] + which * all.strides[2];
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
        for (int64_t d = 0; d < shape_.dim; ++d) cache.host()[static_cast<size_t>(at + d)] = T(uniform(rng));
      }
  }

  Shape shape_;
  std::vector<Sequence> sequences_;
  int64_t blocks_;

 public:
  Twin<T> cache, qkv, out;
  Twin<int32_t> query_start, seq_lens, kv_start, kv_blocks;
  Twin<int64_t> num_decodes;

 private:
  int64_t decodes_;
};

template <class T>
class GpuAttention : public ::testing::Test {
 protected:
  std::mt19937 rng{23};
};
TYPED_TEST_SUITE(GpuAttention, FloatTypes);

template <class T>
class GpuAttentionBits : public GpuAttention<T> {};
using HalfTypes = ::testing::Types<BFloat16, Float16>;
TYPED_TEST_SUITE(GpuAttentionBits, HalfTypes);

// Outputs are averages of values in (-1, 1): probabilities rounded to T cost about one rounding of 1.
template <class T>
constexpr float absolute() {
  return sizeof(T) == 4 ? 1e-5f : rounding<T>() / 2;
}

TYPED_TEST(GpuAttention, equals_its_cpu_twin_for_ragged_mixed_batches) {
  using T = TypeParam;
  const std::vector<Sequence> batches[] = {
      {{1, 1}, {1, 15}, {1, 16}, {1, 17}, {1, 255}, {1, 256}, {1, 257}, {1, 1000}, {1, 3}, {1, 2500}},
      {{2, 2}, {16, 16}, {33, 33}, {129, 129}, {3, 700}, {100, 333}, {70, 65 + 70}},
      {{1, 300}, {1, 64}, {5, 5}, {64, 200}, {1, 77}, {1, 1}, {130, 513}}};
  for (int64_t dim : {64, 80, 96, 128, 256})
    for (const auto& [heads, kv_heads, block_size] :
         {std::tuple<int64_t, int64_t, int64_t>{6, 6, 16}, {14, 2, 32}, {20, 1, 64}})
      for (const auto& sequences : batches) {
        SCOPED_TRACE(concat("dim ", dim, " heads ", heads, "/", kv_heads, " block ", block_size, " sequences ",
                            sequences.size()));
        Batch<T> batch({heads, kv_heads, dim, block_size}, sequences, this->rng);
        batch.run_both();
        expect_close(batch.out, rounding<T>(), absolute<T>(), "out");
        if (this->HasFatalFailure()) return;
      }
}

TYPED_TEST(GpuAttention, equals_its_cpu_twin_for_one_long_sequence_that_all_blocks_share) {
  using T = TypeParam;
  for (int32_t tokens : {8192, 20001, 40000}) {
    Batch<T> batch({8, 2, 128, 16}, {{1, tokens}}, this->rng);
    batch.run_both();
    expect_close(batch.out, rounding<T>(), absolute<T>(), "out");
  }
}

TYPED_TEST(GpuAttention, equals_its_cpu_twin_for_many_sequences_of_mixed_lengths) {
  using T = TypeParam;
  std::vector<Sequence> sequences;
  for (int i = 0; i < 1500; ++i)
    sequences.push_back({1, static_cast<int32_t>(1 + this->rng() % (i % 10 == 0 ? 900 : 60))});
  Batch<T> batch({4, 2, 64, 16}, sequences, this->rng);
  batch.run_both();
  expect_close(batch.out, rounding<T>(), absolute<T>(), "out");
}

TYPED_TEST(GpuAttentionBits, gives_a_decode_the_same_bits_alone_in_a_batch_and_again) {
  using T = TypeParam;
  const Shape shape{8, 2, 128, 16};
  for (int32_t tokens : {5, 256, 700, 5000, 33000}) {
    std::vector<Sequence> sequences{{1, 40}, {1, tokens}, {1, 3000}, {1, 90}};
    Batch<T> batch(shape, sequences, this->rng);
    paged_attention(batch.args(Device::cuda));
    const std::vector<T> together = batch.out.download();
    for (int again = 0; again < 20; ++again) {
      batch.out.poison();
      paged_attention(batch.args(Device::cuda));
      const std::vector<T> got = batch.out.download();
      ASSERT_EQ(std::memcmp(got.data(), together.data(), got.size() * sizeof(T)), 0) << "run " << again;
    }
    // The second sequence alone: the same columns, one sequence further.
    PagedAttention alone = batch.args(Device::cuda);
    alone.query_start.data = alone.query_start.template as<int32_t>() + 1, alone.query_start.shape[0] = 2;
    alone.seq_lens.data = alone.seq_lens.template as<int32_t>() + 1, alone.seq_lens.shape[0] = 1;
    alone.kv_start.data = alone.kv_start.template as<int32_t>() + 1, alone.kv_start.shape[0] = 2;
    batch.num_decodes.host()[0] = 1, batch.num_decodes.upload();
    batch.out.poison();
    paged_attention(alone);
    const std::vector<T> got = batch.out.download();
    const size_t row = static_cast<size_t>(shape.heads * shape.dim);
    ASSERT_EQ(std::memcmp(got.data() + row, together.data() + row, row * sizeof(T)), 0) << tokens << " tokens";
  }
}

TYPED_TEST(GpuAttentionBits, gives_a_prompt_the_same_bits_however_it_is_cut) {
  using T = TypeParam;
  for (int64_t dim : {64, 128, 256}) {
    Batch<T> whole({14, 2, dim, 16}, {{400, 450}, {30, 30}}, this->rng, 0);
    paged_attention(whole.args(Device::cuda));
    const std::vector<T> expected = whole.out.download();
    const size_t row = static_cast<size_t>(14 * dim);
    int32_t done = 0;
    for (int32_t piece : {1, 99, 64, 200, 36}) {
      // The first sequence up to the end of this piece, its earlier tokens in the cache.
      whole.query_start.host() = {done, done + piece, done + piece};
      whole.seq_lens.host() = {50 + done + piece, 0};
      whole.query_start.upload(), whole.seq_lens.upload(), whole.out.poison();
      paged_attention(whole.args(Device::cuda));
      const std::vector<T> got = whole.out.download();
      ASSERT_EQ(
          std::memcmp(got.data() + static_cast<size_t>(done) * row, expected.data() + static_cast<size_t>(done) * row,
                      static_cast<size_t>(piece) * row * sizeof(T)),
          0)
          << "dim " << dim << ", rows from " << done;
      done += piece;
    }
  }
}

TYPED_TEST(GpuAttentionBits, replays_a_captured_decode_with_other_lengths_and_padding) {
  using T = TypeParam;
  const std::vector<Sequence> sequences{{1, 3000}, {1, 10}, {1, 512}, {1, 2000}};
  Batch<T> batch({8, 2, 128, 16}, sequences, this->rng);
  cudaStream_t stream = nullptr;
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  PagedAttention args = batch.args(Device::cuda);
  args.stream = stream;
  paged_attention(args);  // scratch grows outside of capture
  cuda::check(cudaStreamSynchronize(stream));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  paged_attention(args);
  cuda::check(cudaStreamEndCapture(stream, &graph));
  cuda::check(cudaGraphInstantiate(&executable, graph, 0));
  for (const auto& lens : {std::vector<int32_t>{3000, 10, 512, 2000}, {1, 10, 500, 1999}, {2999, 9, 257, 0}}) {
    batch.seq_lens.host() = lens;
    batch.query_start.host() = {0, 1, 2, 3, lens[3] > 0 ? 4 : 3};
    batch.seq_lens.upload(), batch.query_start.upload(), batch.out.poison();
    cuda::check(cudaGraphLaunch(executable, stream));
    cuda::check(cudaStreamSynchronize(stream));
    PagedAttention on_cpu = batch.args(Device::cpu);
    if (lens[3] == 0) {
      batch.num_decodes.host()[0] = 3, on_cpu.seq_lens.shape[0] = 3;
      on_cpu.query_start.shape[0] = on_cpu.kv_start.shape[0] = 4;
    }
    paged_attention(on_cpu);
    expect_close(batch.out, rounding<T>(), absolute<T>(), "out");
  }
  cuda::check(cudaGraphExecDestroy(executable));
  cuda::check(cudaGraphDestroy(graph));
  cuda::check(cudaStreamDestroy(stream));
}

// The same blocks close together and more than 2^31 elements apart give the same bits.
TEST(GpuAttentionLarge, addresses_caches_beyond_two_billion_elements) {
  constexpr int64_t heads = 4, kv_heads = 2, dim = 128, block_size = 64, blocks = 3;
  constexpr int64_t block = 2 * kv_heads * block_size * dim, far = int64_t{1} << 30;
  size_t free_bytes = 0, total_bytes = 0;
  cuda::check(cudaMemGetInfo(&free_bytes, &total_bytes));
  if (free_bytes < size_t{8} << 30) GTEST_SKIP() << "needs 8 GB of GPU memory";
  std::mt19937 rng(3);
  Twin<BFloat16> close({blocks, 2, kv_heads, block_size, dim}), q({3, heads, dim}), near_out({3, heads, dim}),
      far_out({3, heads, dim});
  close.fill_random(rng), q.fill_random(rng), near_out.poison(), far_out.poison();
  Twin<int32_t> query_start({3}), seq_lens({2}), kv_start({3}), kv_blocks({6});
  query_start.host() = {0, 1, 3}, seq_lens.host() = {170, 190}, kv_start.host() = {0, 3, 6};
  kv_blocks.host() = {2, 0, 1, 1, 2, 0};
  Twin<int64_t> num_decodes({1});
  num_decodes.host() = {1};
  query_start.upload(), seq_lens.upload(), kv_start.upload(), kv_blocks.upload(), num_decodes.upload();
  BFloat16* apart = nullptr;
  cuda::check(cudaMalloc(&apart, static_cast<size_t>(2 * far + block) * 2));
  for (int64_t b = 0; b < blocks; ++b)
    cuda::check(cudaMemcpy(apart + b * far, close.host().data() + b * block, block * 2, cudaMemcpyHostToDevice));
  for (bool spread : {false, true}) {
    TensorView k = close.on(Device::cuda);
    k.ndim = 4;
    for (int i = 1; i < 4; ++i) k.shape[i] = k.shape[i + 1], k.strides[i] = k.strides[i + 1];
    if (spread) k.data = apart, k.strides[0] = far;
    TensorView v = k;
    v.data = v.as<BFloat16>() + block / 2;
    paged_attention({(spread ? far_out : near_out).on(Device::cuda), q.on(Device::cuda), k, v,
                     query_start.on(Device::cuda), seq_lens.on(Device::cuda), kv_start.on(Device::cuda),
                     kv_blocks.on(Device::cuda), num_decodes.on(Device::cuda), 1, 1, 2, 0.1f, nullptr});
  }
  const std::vector<BFloat16> wanted = near_out.download(), got = far_out.download();
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_FALSE(std::isnan(static_cast<float>(got[i]))) << i;
    ASSERT_EQ(got[i].bits, wanted[i].bits) << i;
  }
  cuda::check(cudaFree(apart));
}

}  // namespace
}  // namespace hybrid::test
