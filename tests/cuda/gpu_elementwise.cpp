// Elementwise and copy kernels against their CPU twins.
#include "gpu_test.h"

namespace hybrid::test {
namespace {

template <class T>
class GpuElementwise : public ::testing::Test {
 protected:
  std::mt19937 rng{7};
};
TYPED_TEST_SUITE(GpuElementwise, FloatTypes);

constexpr int64_t row_counts[] = {1, 3, 64, 777};

TYPED_TEST(GpuElementwise, rms_norm_equals_its_cpu_twin_with_and_without_residual) {
  using T = TypeParam;
  for (int64_t rows : row_counts)
    for (int64_t dim : {64, 576, 896, 4096, 8192})
      for (bool add : {false, true}) {
        Twin<T> x({rows, dim}), weight({dim}), residual({rows, dim}), out({rows, dim});
        x.fill_random(this->rng), weight.fill_random(this->rng), residual.fill_random(this->rng), out.poison();
        for (Device device : {Device::cpu, Device::cuda})
          rms_norm({out.on(device),
                    x.on(device),
                    weight.on(device),
                    add ? residual.on(device) : TensorView{},
                    {},
                    1e-5f,
                    false,
                    nullptr});
        expect_close(out, rounding<T>(), rounding<T>(), "out");
        if (add) expect_close(residual, rounding<T>(), 0.0f, "residual");
      }
}

TYPED_TEST(GpuElementwise, rms_norm_keeps_a_float_residual_of_16_bit_rows_unrounded) {
  using T = TypeParam;
  for (int64_t dim : {576, 4096}) {
    constexpr int64_t rows = 33;
    Twin<T> x({rows, dim}), weight({dim}), out({rows, dim});
    Twin<float> residual({rows, dim});
    x.fill_random(this->rng), weight.fill_random(this->rng), residual.fill_random(this->rng), out.poison();
    for (Device device : {Device::cpu, Device::cuda})
      rms_norm({out.on(device), x.on(device), weight.on(device), residual.on(device), {}, 1e-5f, false, nullptr});
    expect_close(residual, 0.0f, 0.0f, "residual");
    expect_close(out, rounding<T>(), rounding<T>(), "out");
  }
}

TYPED_TEST(GpuElementwise, rms_norm_that_begins_the_residual_does_not_read_it) {
  using T = TypeParam;
  for (int64_t dim : {576, 4096}) {
    constexpr int64_t rows = 33;
    Twin<T> x({rows, dim}), weight({dim}), out({rows, dim});
    Twin<float> residual({rows, dim});
    x.fill_random(this->rng), weight.fill_random(this->rng), residual.poison(), out.poison();
    for (Device device : {Device::cpu, Device::cuda})
      rms_norm({out.on(device), x.on(device), weight.on(device), residual.on(device), {}, 1e-5f, true, nullptr});
    expect_close(residual, 0.0f, 0.0f, "residual");
    for (float sum : residual.host()) ASSERT_FALSE(std::isnan(sum));
    expect_close(out, rounding<T>(), rounding<T>(), "out");
  }
}

// F-21: what a request gets must not depend on its batch mates.
TYPED_TEST(GpuElementwise, rms_norm_gives_a_row_the_same_bits_alone_and_in_a_batch) {
  using T = TypeParam;
  for (int64_t dim : {64, 896, 4096, 8192, 16384}) {
    constexpr int64_t rows = 300;
    Twin<T> x({rows, dim}), weight({dim}), alone({rows, dim}), together({rows, dim});
    x.fill_random(this->rng), weight.fill_random(this->rng), alone.poison(), together.poison();
    const auto row = [](TensorView t, int64_t r) {
      t.data = t.as<T>() + r * t.strides[0], t.shape[0] = 1;
      return t;
    };
    for (int64_t r = 0; r < rows; ++r)
      rms_norm({row(alone.on(Device::cuda), r),
                row(x.on(Device::cuda), r),
                weight.on(Device::cuda),
                {},
                {},
                1e-5f,
                false,
                nullptr});
    rms_norm({together.on(Device::cuda), x.on(Device::cuda), weight.on(Device::cuda), {}, {}, 1e-5f, false, nullptr});
    const std::vector<T> one = alone.download(), all = together.download();
    EXPECT_EQ(0, std::memcmp(one.data(), all.data(), alone.bytes())) << dim;
  }
}

TYPED_TEST(GpuElementwise, silu_mul_equals_its_cpu_twin) {
  using T = TypeParam;
  for (int64_t rows : row_counts)
    for (int64_t dim : {8, 1536, 4864}) {
      Twin<T> x({rows, 2 * dim}), out({rows, dim});
      x.fill_random(this->rng, 3.0f), out.poison();
      for (Device device : {Device::cpu, Device::cuda}) silu_mul({out.on(device), x.on(device), nullptr});
      expect_close(out, rounding<T>(), 1e-6f, "out");
    }
}

TYPED_TEST(GpuElementwise, copy_blocks_equals_its_cpu_twin) {
  using T = TypeParam;
  constexpr int64_t blocks = 40, elements = 3 * 2 * 3 * 16 * 64;
  Twin<T> cache({blocks, elements});
  Twin<int32_t> src({10}), dst({10});
  cache.fill_random(this->rng);
  for (int i = 0; i < 10; ++i)
    src.host()[static_cast<size_t>(i)] = 2 * i, dst.host()[static_cast<size_t>(i)] = 39 - 2 * i;
  src.upload(), dst.upload();
  for (Device device : {Device::cpu, Device::cuda})
    copy_blocks({cache.on(device), src.on(device), dst.on(device), nullptr});
  expect_close(cache, 0.0f, 0.0f, "cache");
}

// To pinned memory in one call, to other memory and on the default stream one by one; runs of neighbours and single
// blocks, there and back.
TEST(GpuSwapBlocks, moves_blocks_to_the_host_and_back) {
  constexpr int64_t device_blocks = 40, host_blocks = 30, elements = 3 * 4096;
  cudaStream_t stream;
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  BFloat16* pinned = nullptr;
  cuda::check(cudaMallocHost(&pinned, host_blocks * elements * 2));
  std::vector<BFloat16> pageable(host_blocks * elements);
  std::vector<int64_t> there{3, 4, 5, 6, 0, 29, 28, 11}, here{10, 11, 12, 13, 39, 38, 37, 0};
  std::vector<int32_t> there_32(there.begin(), there.end()), here_32(here.begin(), here.end());
  const auto column = [](auto& values, DType dtype) {
    TensorView t;
    t.data = values.data(), t.dtype = dtype, t.ndim = 1, t.shape[0] = static_cast<int64_t>(values.size());
    t.strides[0] = 1;
    return t;
  };
  std::mt19937 rng(5);
  for (BFloat16* memory : {pinned, pageable.data()})
    for (cudaStream_t on : {stream, cudaStream_t{}}) {
      Twin<BFloat16> cache({device_blocks, elements});
      cache.fill_random(rng);
      const std::vector<BFloat16> before = cache.host();
      std::memset(static_cast<void*>(memory), 0xff, host_blocks * elements * 2);
      TensorView host = cache.on(Device::cpu);
      host.data = memory, host.shape[0] = host_blocks;
      swap_blocks({host, cache.on(Device::cuda), column(there, DType::i64), column(here, DType::i64), on});
      cuda::check(cudaStreamSynchronize(on));
      for (size_t i = 0; i < there.size(); ++i)
        ASSERT_EQ(0, std::memcmp(memory + there[i] * elements, &before[static_cast<size_t>(here[i] * elements)],
                                 elements * 2));
      std::vector<BFloat16> moved(before.size());
      std::memset(static_cast<void*>(moved.data()), 0xff, moved.size() * 2);
      for (size_t i = 0; i < here.size(); ++i)
        std::copy_n(memory + there[i] * elements, elements, &moved[static_cast<size_t>(here[i] * elements)]);
      cache.poison();
      swap_blocks({cache.on(Device::cuda), host, column(here_32, DType::i32), column(there_32, DType::i32), on});
      cuda::check(cudaStreamSynchronize(on));
      EXPECT_EQ(0, std::memcmp(cache.download().data(), moved.data(), moved.size() * 2));
      for (int64_t block : {1, 2, 27})  // nobody's
        EXPECT_TRUE(std::isnan(static_cast<float>(memory[block * elements])));
    }
  cuda::check(cudaFreeHost(pinned));
  cuda::check(cudaStreamDestroy(stream));
}

TYPED_TEST(GpuElementwise, embedding_reads_known_ids_and_those_the_step_before_picked) {
  using T = TypeParam;
  for (int64_t dim : {64, 896, 4096}) {
    constexpr int64_t rows = 70, vocab = 500;
    Twin<T> table({vocab, dim}), out({rows, dim});
    Twin<int32_t> ids({rows}), picked({rows});
    table.fill_random(this->rng), out.poison();
    for (size_t i = 0; i < rows; ++i) {
      picked.host()[i] = static_cast<int32_t>(this->rng() % vocab);
      ids.host()[i] = i % 3 == 0 ? -static_cast<int32_t>(this->rng() % rows) - 1 : static_cast<int32_t>(i * 7 % vocab);
    }
    ids.upload(), picked.upload();
    for (Device device : {Device::cpu, Device::cuda})
      embedding({out.on(device), ids.on(device), table.on(device), picked.on(device), vocab, nullptr});
    expect_close(out, 0.0f, 0.0f, "out");
  }
}

}  // namespace
}  // namespace hybrid::test
