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
          rms_norm({out.on(device), x.on(device), weight.on(device), add ? residual.on(device) : TensorView{}, 1e-5f,
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
      rms_norm({out.on(device), x.on(device), weight.on(device), residual.on(device), 1e-5f, nullptr});
    expect_close(residual, 0.0f, 0.0f, "residual");
    expect_close(out, rounding<T>(), rounding<T>(), "out");
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

TYPED_TEST(GpuElementwise, rotary_equals_its_cpu_twin_for_full_and_partial_rotation) {
  using T = TypeParam;
  for (int64_t rows : row_counts)
    for (int64_t dim : {64, 128})
      for (int64_t rotary_dim : {dim, dim / 2}) {
        constexpr int64_t heads = 6, kv_heads = 2, positions = 500;
        Twin<T> q({rows, heads, dim}), k({rows, kv_heads, dim});
        Twin<float> cos_sin({positions, rotary_dim});
        Twin<int32_t> at({rows});
        q.fill_random(this->rng), k.fill_random(this->rng), cos_sin.fill_random(this->rng);
        for (auto& position : at.host()) position = static_cast<int32_t>(this->rng() % positions);
        at.upload();
        for (Device device : {Device::cpu, Device::cuda})
          rotary({q.on(device), k.on(device), cos_sin.on(device), at.on(device), nullptr});
        expect_close(q, rounding<T>(), rounding<T>(), "q");
        expect_close(k, rounding<T>(), rounding<T>(), "k");
      }
}

TYPED_TEST(GpuElementwise, store_kv_writes_what_its_cpu_twin_writes_and_skips_padding) {
  using T = TypeParam;
  for (int64_t block_size : {16, 32, 64})
    for (int64_t dim : {64, 80, 128}) {
      constexpr int64_t blocks = 50, kv_heads = 3;
      const int64_t rows = 333;
      Twin<T> k_cache({blocks, kv_heads, block_size, dim}), v_cache({blocks, kv_heads, block_size, dim});
      Twin<T> k({rows, kv_heads, dim}), v({rows, kv_heads, dim});
      Twin<int64_t> slots({rows});
      k_cache.poison(), v_cache.poison(), k.fill_random(this->rng), v.fill_random(this->rng);
      std::vector<int64_t> free(static_cast<size_t>(blocks * block_size));
      for (size_t i = 0; i < free.size(); ++i) free[i] = static_cast<int64_t>(i);
      std::shuffle(free.begin(), free.end(), this->rng);
      for (size_t i = 0; i < slots.host().size(); ++i) slots.host()[i] = i % 7 == 3 ? -1 : free[i];
      slots.upload();
      for (Device device : {Device::cpu, Device::cuda})
        store_kv({k_cache.on(device), v_cache.on(device), k.on(device), v.on(device), slots.on(device), nullptr});
      expect_close(k_cache, 0.0f, 0.0f, "k_cache");
      expect_close(v_cache, 0.0f, 0.0f, "v_cache");
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
