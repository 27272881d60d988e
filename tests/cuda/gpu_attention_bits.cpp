// Paged attention where bits matter: against itself in other batches, and as the GPU's own kernels for 16 bits.
#include "attention_batch.h"

namespace hybrid::test {
namespace {

template <class T>
class GpuAttentionBits : public GpuAttention<T> {};
using HalfTypes = ::testing::Types<Over<BFloat16>, Over<Float16>, Over<BFloat16, Float8>, Over<Float16, Float8>>;
TYPED_TEST_SUITE(GpuAttentionBits, HalfTypes);

TYPED_TEST(GpuAttentionBits, gives_a_decode_the_same_bits_alone_in_a_batch_and_again) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  const Shape shape{8, 2, 128, 16};
  for (int32_t tokens : {5, 256, 700, 5000, 33000}) {
    std::vector<Sequence> sequences{{1, 40}, {1, tokens}, {1, 3000}, {1, 90}};
    Batch<T, C> batch(shape, sequences, this->rng);
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
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  for (int64_t dim : {64, 128, 256}) {
    Batch<T, C> whole({14, 2, dim, 16}, {{400, 450}, {30, 30}}, this->rng, 0);
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

// Tiles that end in the middle of a sequence, a block or a group; a long context; a sequence that owns nothing.
TYPED_TEST(GpuAttentionBits, equals_its_cpu_twin_for_prompts_of_every_group_and_block_size) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  const std::vector<Sequence> batches[] = {{{128, 128}, {0, 0}, {1, 1}, {129, 257}, {16, 143}, {1, 385}},
                                           {{300, 300}, {31, 2081}, {0, 0}}};
  for (int64_t dim : {64, 128})
    for (int64_t group : {1, 4, 7, 8})
      for (int64_t block_size : {16, 32, 64, 256})
        for (const auto& sequences : batches) {
          SCOPED_TRACE(concat("dim ", dim, " group ", group, " block ", block_size, " first ", sequences[0].queries));
          Batch<T, C> batch({2 * group, 2, dim, block_size}, sequences, this->rng, 0);
          batch.run_both();
          expect_close(batch.out, rounding<T>(), absolute<T>(), "out");
          if (this->HasFatalFailure()) return;
        }
}

TYPED_TEST(GpuAttentionBits, gives_a_prompt_the_same_bits_alone_in_a_batch_and_again) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  for (int64_t dim : {64, 128}) {
    Batch<T, C> batch({14, 2, dim, 16}, {{200, 200}, {333, 900}, {64, 64}, {700, 1500}}, this->rng, 0);
    paged_attention(batch.args(Device::cuda));
    const std::vector<T> together = batch.out.download();
    for (int again = 0; again < 20; ++again) {
      batch.out.poison();
      paged_attention(batch.args(Device::cuda));
      const std::vector<T> got = batch.out.download();
      ASSERT_EQ(std::memcmp(got.data(), together.data(), got.size() * sizeof(T)), 0) << "run " << again;
    }
    // The second sequence alone: the others own nothing.
    batch.query_start.host() = {200, 200, 533, 533, 533}, batch.query_start.upload();
    batch.seq_lens.host() = {0, 900, 0, 0}, batch.seq_lens.upload(), batch.out.poison();
    paged_attention(batch.args(Device::cuda));
    const std::vector<T> got = batch.out.download();
    const size_t row = static_cast<size_t>(14 * dim);
    ASSERT_EQ(std::memcmp(got.data() + 200 * row, together.data() + 200 * row, 333 * row * sizeof(T)), 0) << dim;
  }
}

TYPED_TEST(GpuAttentionBits, replays_captured_prompts_with_other_lengths_kinds_and_padding) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  struct Case {
    std::vector<int32_t> query_start, seq_lens;
    int64_t decodes;
  };
  for (int64_t dim : {64, 80, 128}) {
    Batch<T, C> batch({8, 2, dim, 16}, {{1, 300}, {70, 200}, {100, 100}, {129, 600}}, this->rng);
    cudaStream_t stream = nullptr;
    cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    PagedAttention args = batch.args(Device::cuda);
    args.stream = stream, args.max_decodes = 3, args.max_prompts = 4;
    paged_attention(args);  // scratch grows outside of capture
    cuda::check(cudaStreamSynchronize(stream));
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    paged_attention(args);
    cuda::check(cudaStreamEndCapture(stream, &graph));
    cuda::check(cudaGraphInstantiate(&executable, graph, 0));
    for (const Case& c : {Case{{0, 1, 71, 171, 300}, {300, 200, 100, 600}, 1}, Case{{0, 300, 300, 300, 300}, {300}, 0},
                          Case{{0, 1, 2, 3, 200}, {20, 199, 3, 598}, 3}, Case{{0, 1, 2, 2, 2}, {17, 128}, 2},
                          Case{{0, 0, 0, 0, 0}, {}, 0}, Case{{0, 2, 131, 131, 131}, {299, 177}, 0}}) {
      SCOPED_TRACE(concat("dim ", dim, ", rows of the first ", c.query_start[1], ", of all ", c.query_start[4]));
      batch.query_start.host() = c.query_start, batch.seq_lens.host() = c.seq_lens;
      batch.seq_lens.host().resize(4), batch.num_decodes.host()[0] = c.decodes;
      batch.query_start.upload(), batch.seq_lens.upload(), batch.num_decodes.upload(), batch.out.poison();
      cuda::check(cudaGraphLaunch(executable, stream));
      cuda::check(cudaStreamSynchronize(stream));
      PagedAttention on_cpu = batch.args(Device::cpu);
      on_cpu.max_decodes = c.decodes, on_cpu.max_prompts = 4, on_cpu.max_query_len = 300;
      paged_attention(on_cpu);
      expect_close(batch.out, rounding<T>(), absolute<T>(), "out");  // rows of nobody stay poisoned
      if (this->HasFatalFailure()) return;
    }
    cuda::check(cudaGraphExecDestroy(executable));
    cuda::check(cudaGraphDestroy(graph));
    cuda::check(cudaStreamDestroy(stream));
  }
}

TYPED_TEST(GpuAttentionBits, replays_a_captured_decode_with_other_lengths_and_padding) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  const std::vector<Sequence> sequences{{1, 3000}, {1, 10}, {1, 512}, {1, 2000}};
  Batch<T, C> batch({8, 2, 128, 16}, sequences, this->rng);
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
  for (const auto& lens :
       {std::vector<int32_t>{3000, 10, 512, 2000}, {1, 10, 500, 1999}, {2999, 9, 257, 0}, {17, 1, 1, 0}}) {
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

// The plan lets attention start while the kernel before it still runs: old tokens may be read at once, new ones not.
TYPED_TEST(GpuAttentionBits, reads_the_newest_tokens_only_when_the_kernel_ahead_has_stored_them) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  const Shape shape{14, 2, 64, 16};
  std::vector<Sequence> sequences;
  for (int32_t tokens : {1, 2, 16, 17, 128, 129, 1024, 1500, 4096, 4097}) sequences.push_back({1, tokens});
  Batch<T, C> batch(shape, sequences, this->rng);
  const PagedAttention on_cpu = batch.args(Device::cpu);
  paged_attention(on_cpu);
  const int64_t rows = batch.size(), padding = 20000;  // rows without a slot keep the kernel ahead busy
  Twin<T> kv({2, rows + padding, shape.kv_heads, shape.dim});
  Twin<int64_t> slots({rows + padding});
  std::fill(slots.host().begin(), slots.host().end(), -1);
  const auto at = [&](const TensorView& cache, int64_t slot, int64_t head) {
    return cache.as<C>() + slot / shape.block_size * cache.strides[0] + head * cache.strides[1] +
           slot % shape.block_size * shape.dim;
  };
  for (int64_t s = 0; s < rows; ++s) {
    const auto i = static_cast<size_t>(s);
    const int32_t newest = sequences[i].tokens - 1;
    const int64_t slot =
        batch.kv_blocks.host()[static_cast<size_t>(batch.kv_start.host()[i]) + newest / shape.block_size] *
            shape.block_size +
        newest % shape.block_size;
    slots.host()[static_cast<size_t>(padding + s)] = slot;
    for (int64_t which : {0, 1})
      for (int64_t head = 0; head < shape.kv_heads; ++head) {
        const C* from = at(which == 0 ? on_cpu.k_cache : on_cpu.v_cache, slot, head);
        std::transform(
            from, from + shape.dim,
            kv.host().data() + ((which * (rows + padding) + padding + s) * shape.kv_heads + head) * shape.dim,
            [&](C x) { return T(static_cast<float>(x) * (which == 0 ? k_scale<C> : v_scale<C>)); });
      }
  }
  Twin<T> unused({rows + padding, shape.heads, shape.dim});  // queries
  Twin<float> unturned({1, shape.dim});                      // every angle is 0
  std::fill_n(unturned.host().begin(), shape.dim / 2, 1.0f);
  Twin<int32_t> positions({rows + padding});
  kv.upload(), slots.upload(), unused.upload(), unturned.upload(), positions.upload();
  TensorView k = kv.on(Device::cuda);
  k.ndim = 3;
  for (int i = 0; i < 3; ++i) k.shape[i] = k.shape[i + 1], k.strides[i] = k.strides[i + 1];
  TensorView v = k;
  v.data = v.as<T>() + kv.numel() / 2;
  for (int again = 0; again < 20; ++again) {
    const PagedAttention args = batch.planned_args();
    cuda::check(cudaMemset(args.out.data, 0xff, batch.out.bytes()));
    for (int64_t s = 0; s < rows; ++s)
      for (const TensorView* cache : {&args.k_cache, &args.v_cache})
        for (int64_t head = 0; head < shape.kv_heads; ++head)
          cuda::check(cudaMemset(at(*cache, slots.host()[static_cast<size_t>(padding + s)], head), 0xff,
                                 static_cast<size_t>(shape.dim) * sizeof(C)));
    rotate_and_store({unused.on(Device::cuda),
                      args.k_cache,
                      args.v_cache,
                      k,
                      v,
                      unturned.on(Device::cuda),
                      positions.on(Device::cuda),
                      slots.on(Device::cuda),
                      {},
                      {},
                      0.0f,
                      nullptr,
                      k_scale<C>,
                      v_scale<C>});
    paged_attention(args);
    expect_close(batch.out, rounding<T>(), absolute<T>(), "out");
    if (this->HasFatalFailure()) return;
  }
}

TYPED_TEST(GpuAttentionBits, writes_nothing_where_a_captured_step_turns_out_to_have_no_decodes) {
  using T = typename TypeParam::T;
  using C = typename TypeParam::C;
  Batch<T, C> batch({8, 2, 128, 16}, {{1, 3000}, {1, 10}}, this->rng);
  batch.num_decodes.host()[0] = 0, batch.num_decodes.upload();
  const std::vector<T> before = batch.out.download();
  for (int again = 0; again < 2; ++again) paged_attention(batch.planned_args());
  const std::vector<T> after = batch.out.download();
  EXPECT_EQ(std::memcmp(before.data(), after.data(), batch.out.bytes()), 0);
}

}  // namespace
}  // namespace hybrid::test
