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
          rms_norm({out.on(device), x.on(device), weight.on(device), add ? residual.on(device) : TensorView{}, 1e-5f, false,
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
      rms_norm({out.on(device), x.on(device), weight.on(device), residual.on(device), 1e-5f, false, nullptr});
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
      rms_norm({out.on(device), x.on(device), weight.on(device), residual.on(device), 1e-5f, true, nullptr});
    expect_close(residual, 0.0f, 0.0f, "residual");
    for (float sum : residual.host()) ASSERT_FALSE(std::isnan(sum));
    expect_close(out, rounding<T>(), rounding<T>(), "out");
  }
}

// A block's shape follows the number of rows; what a row gets must not.
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
      rms_norm({row(alone.on(Device::cuda), r), row(x.on(Device::cuda), r), weight.on(Device::cuda), {}, 1e-5f, false,
                nullptr});
    rms_norm({together.on(Device::cuda), x.on(Device::cuda), weight.on(Device::cuda), {}, 1e-5f, false, nullptr});
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

}  // namespace
}  // namespace hybrid::test
