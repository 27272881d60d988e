// Paged attention against its CPU twin.
#include "attention_batch.h"

namespace hybrid::test {
namespace {

TYPED_TEST_SUITE(GpuAttention, CacheTypes);

TYPED_TEST(GpuAttention, equals_its_cpu_twin_for_ragged_mixed_batches) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
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
        Batch<T, C> batch({heads, kv_heads, dim, block_size}, sequences, this->rng);
        batch.run_both();
        expect_close(batch.out, rounding<T>(), absolute<T>(), "out");
        if (this->HasFatalFailure()) return;
      }
}

TYPED_TEST(GpuAttention, equals_its_cpu_twin_for_one_long_sequence_that_all_blocks_share) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  for (int32_t tokens : {8192, 20001, 40000}) {
    Batch<T, C> batch({8, 2, 128, 16}, {{1, tokens}}, this->rng);
    batch.run_both();
    expect_close(batch.out, rounding<T>(), absolute<T>(), "out");
  }
}

TYPED_TEST(GpuAttention, equals_its_cpu_twin_for_many_sequences_of_mixed_lengths) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  std::vector<Sequence> sequences;
  for (int i = 0; i < 1500; ++i)
    sequences.push_back({1, static_cast<int32_t>(1 + this->rng() % (i % 10 == 0 ? 900 : 60))});
  Batch<T, C> batch({4, 2, 64, 16}, sequences, this->rng);
  batch.run_both();
  expect_close(batch.out, rounding<T>(), absolute<T>(), "out");
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
    paged_attention({(spread ? far_out : near_out).on(Device::cuda),
                     q.on(Device::cuda),
                     k,
                     v,
                     query_start.on(Device::cuda),
                     seq_lens.on(Device::cuda),
                     kv_start.on(Device::cuda),
                     kv_blocks.on(Device::cuda),
                     num_decodes.on(Device::cuda),
                     1,
                     1,
                     2,
                     0.1f,
                     {},
                     false,
                     nullptr});
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
