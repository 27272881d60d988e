// Decodes that share their beginnings: read once for all of them, they give what each gives on its own.
#include "attention_batch.h"

namespace hybrid::test {
namespace {

template <class T>
class GpuAttentionPrefixes : public GpuAttention<T> {};
using HalfTypes = ::testing::Types<Over<BFloat16>, Over<Float16>, Over<BFloat16, Float8>, Over<Float16, Float8>>;
TYPED_TEST_SUITE(GpuAttentionPrefixes, HalfTypes);

using Groups = std::vector<std::pair<int32_t, int32_t>>;  // decodes, tokens in common

// Decodes of random lengths in random groups; some have nothing in common, or less than a tile.
std::pair<std::vector<Sequence>, Groups> random_groups(const Shape& shape, int most_sharers, std::mt19937& rng) {
  std::vector<Sequence> sequences;
  Groups groups;
  for (int g = 0; g < 4; ++g) {
    const int count = 1 + static_cast<int>(rng() % static_cast<unsigned>(most_sharers));
    const int64_t kinds[] = {0, 48, 128, 560, 1100, 2500};
    const int64_t common = kinds[rng() % 6] / shape.block_size * shape.block_size;
    groups.emplace_back(count, static_cast<int32_t>(common));
    for (int i = 0; i < count; ++i)
      sequences.push_back(
          {1, static_cast<int32_t>(common + 1 + static_cast<int64_t>(rng() % (i % 7 == 0 ? 1500 : 90)))});
  }
  return {sequences, groups};
}

TYPED_TEST(GpuAttentionPrefixes, equal_the_cpu_twin_for_random_groups_of_every_head_size) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  for (int64_t dim : {64, 80, 96, 128, 256})
    for (const auto& [heads, kv_heads, block_size] : {std::tuple<int64_t, int64_t, int64_t>{6, 6, 16},
                                                      {14, 2, 32},
                                                      {7, 1, 16},
                                                      {20, 1, 64},
                                                      {32, 8, 16},
                                                      {8, 2, 256}})
      for (int again = 0; again < 2; ++again) {
        const Shape shape{heads, kv_heads, dim, block_size};
        const auto [sequences, groups] = random_groups(shape, again == 0 ? 9 : 40, this->rng);
        SCOPED_TRACE(concat("dim ", dim, " heads ", heads, "/", kv_heads, " block ", block_size, " sequences ",
                            sequences.size()));
        Batch<T, C> batch(shape, sequences, this->rng);
        batch.share(groups);
        paged_attention(batch.args(Device::cpu));
        cuda::check(cudaMemset(batch.out.on(Device::cuda).data, 0xff, batch.out.bytes()));
        paged_attention(batch.planned_args());
        expect_close(batch.out, rounding<T>(), absolute<T>(), "out");
        if (this->HasFatalFailure()) return;
      }
}

// More rows than a share has, more tokens than are cut at once, prompts behind.
TYPED_TEST(GpuAttentionPrefixes, equal_the_cpu_twin_where_many_decodes_share_much_beside_prompts) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  for (int64_t dim : {64, 128}) {
    std::vector<Sequence> sequences;
    for (int i = 0; i < 300; ++i) sequences.push_back({1, 2048 + 1 + static_cast<int32_t>(this->rng() % 100)});
    for (int i = 0; i < 10; ++i) sequences.push_back({1, 40000 + 1 + i});
    for (int i = 0; i < 3; ++i) sequences.push_back({70, 200});
    Batch<T, C> batch({8, 2, dim, 16}, sequences, this->rng);
    batch.share({{300, 2048}, {10, 40000}});
    paged_attention(batch.args(Device::cpu));
    cuda::check(cudaMemset(batch.out.on(Device::cuda).data, 0xff, batch.out.bytes()));
    paged_attention(batch.planned_args());
    expect_close(batch.out, rounding<T>(), absolute<T>(), "out");
  }
}

// Cut into shares of the usual length, they would be more parts than a row may have.
TYPED_TEST(GpuAttentionPrefixes, equal_the_cpu_twin_where_two_decodes_share_a_very_long_beginning) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  Batch<T, C> batch({8, 1, 64, 16}, {{1, 269829}, {1, 269900}}, this->rng);
  batch.share({{2, 269824}});
  paged_attention(batch.args(Device::cpu));
  cuda::check(cudaMemset(batch.out.on(Device::cuda).data, 0xff, batch.out.bytes()));
  paged_attention(batch.planned_args());
  expect_close(batch.out, rounding<T>(), absolute<T>(), "out");
}

TYPED_TEST(GpuAttentionPrefixes, replay_a_captured_step_with_other_groups_and_padding) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  for (int64_t dim : {64, 80, 128}) {
    std::vector<Sequence> sequences;
    for (int i = 0; i < 24; ++i) sequences.push_back({1, 1400 + i});
    Batch<T, C> batch({8, 2, dim, 16}, sequences, this->rng);
    batch.share({{24, 1280}});
    cudaStream_t stream = nullptr;
    cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    paged_attention(batch.planned_args(stream));  // scratch grows outside of capture
    cuda::check(cudaStreamSynchronize(stream));
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    const PagedAttention args = batch.planned_args(stream);
    for (int layer = 0; layer < 3; ++layer) paged_attention(args);
    cuda::check(cudaStreamEndCapture(stream, &graph));
    cuda::check(cudaGraphInstantiate(&executable, graph, 0));
    struct Case {
      int32_t decodes, tokens;
      Groups groups;
    };
    for (const auto& [decodes, tokens, groups] :
         {Case{24, 1400, {{24, 1280}}}, Case{24, 1399, {{3, 640}, {2, 0}, {19, 1280}}}, Case{20, 700, {{20, 512}}},
          Case{5, 1300, {{5, 0}}}, Case{2, 1000, {{1, 256}, {1, 0}}}, Case{0, 0, {}}}) {
      SCOPED_TRACE(concat("dim ", dim, ", decodes ", decodes, ", groups ", groups.size()));
      for (size_t s = 0; s < 24; ++s) {
        const bool is_there = s < static_cast<size_t>(decodes);
        batch.seq_lens.host()[s] = is_there ? tokens : 0;
        batch.query_start.host()[s + 1] = std::min(static_cast<int32_t>(s) + 1, decodes);
      }
      batch.num_decodes.host()[0] = decodes;
      batch.seq_lens.upload(), batch.query_start.upload(), batch.num_decodes.upload(), batch.out.poison();
      batch.share(groups);
      cuda::check(cudaGraphLaunch(executable, stream));
      cuda::check(cudaStreamSynchronize(stream));
      PagedAttention on_cpu = batch.args(Device::cpu);
      on_cpu.seq_lens.shape[0] = decodes, on_cpu.max_prompts = 0;
      on_cpu.query_start.shape[0] = on_cpu.kv_start.shape[0] = decodes + 1;
      paged_attention(on_cpu);
      expect_close(batch.out, rounding<T>(), absolute<T>(), "out");  // rows of nobody stay poisoned
      if (this->HasFatalFailure()) return;
    }
    cuda::check(cudaGraphExecDestroy(executable));
    cuda::check(cudaGraphDestroy(graph));
    cuda::check(cudaStreamDestroy(stream));
  }
}

TYPED_TEST(GpuAttentionPrefixes, give_the_same_bits_in_every_run) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  const Shape shape{32, 8, 128, 16};
  const auto [sequences, groups] = random_groups(shape, 60, this->rng);
  Batch<T, C> batch(shape, sequences, this->rng);
  batch.share(groups);
  paged_attention(batch.planned_args());
  const std::vector<T> first = batch.out.download();
  for (int again = 0; again < 20; ++again) {
    batch.out.poison();
    paged_attention(batch.planned_args());
    const std::vector<T> got = batch.out.download();
    ASSERT_EQ(std::memcmp(got.data(), first.data(), batch.out.bytes()), 0) << "run " << again;
  }
}

// The tail of a sequence alone would give another result: the test can fail.
TYPED_TEST(GpuAttentionPrefixes, matter_to_the_result) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  Batch<T, C> batch({8, 2, 128, 16}, std::vector<Sequence>(8, {1, 300}), this->rng);
  batch.share({{8, 256}});
  paged_attention(batch.planned_args());
  const std::vector<T> whole = batch.out.download();
  PagedAttention tail = batch.args(Device::cuda);
  batch.seq_lens.host().assign(8, 44), batch.seq_lens.upload();
  for (int32_t& start : batch.kv_start.host()) start += 16;
  batch.kv_start.upload();
  paged_attention(tail);
  const std::vector<T> only_tail = batch.out.download();
  EXPECT_NE(std::memcmp(whole.data(), only_tail.data(), batch.out.bytes()), 0);
}

}  // namespace
}  // namespace hybrid::test
