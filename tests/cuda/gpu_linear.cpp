// linear against its CPU twin, and against itself: a row's bits must not depend on the batch.
#include "gpu_test.h"

namespace hybrid::test {
namespace {

template <class T>
class GpuLinear : public ::testing::Test {
 protected:
  std::mt19937 rng{11};
};
TYPED_TEST_SUITE(GpuLinear, FloatTypes);

// A weight in both devices' layouts.
template <class T>
struct Weight {
  Twin<T> plain, packed;
  Weight(int64_t n, int64_t k, std::mt19937& rng) : plain({n, k}), packed({packed_size(n, k)}) {
    plain.fill_random(rng), packed.poison();
    for (Device device : {Device::cpu, Device::cuda}) pack_weight({packed.on(device), plain.on(device)});
  }
};

// Columns [first, first + size) of a matrix.
TensorView columns(TensorView t, int64_t first, int64_t size) {
  t.data = static_cast<char*>(t.data) + first * item_size(t.dtype);
  t.shape[1] = size;
  return t;
}

// What another order costs sums of k products of unit normals, which have size sqrt(k).
float tolerance(int64_t k) { return 2e-5f * std::sqrt(static_cast<float>(k)); }

TYPED_TEST(GpuLinear, equals_its_cpu_twin_for_every_kernel_and_ragged_size) {
  using T = TypeParam;
  const std::pair<int64_t, int64_t> sizes[] = {{8, 64}, {100, 72}, {333, 1000}, {896, 896}, {1153, 576}, {40, 4864}};
  for (const auto& [n, k] : sizes) {
    Weight<T> weight(n, k, this->rng);
    Twin<T> bias({n});
    bias.fill_random(this->rng);
    for (int64_t rows : {1, 2, 8, 9, 16, 17, 32, 33, 64, 129, 200}) {
      Twin<T> x({rows, 2 * k}), out({rows, n});
      Twin<float> wide({rows, n});
      x.fill_random(this->rng), out.poison(), wide.poison();
      for (Device device : {Device::cpu, Device::cuda}) {
        const TensorView half = columns(x.on(device), k, k);
        linear({out.on(device), half, weight.packed.on(device), bias.on(device), n, k, nullptr});
        linear({wide.on(device), half, weight.packed.on(device), {}, n, k, nullptr});
      }
      SCOPED_TRACE(concat("rows ", rows, " n ", n, " k ", k));
      expect_close(out, rounding<T>(), tolerance(k), "out");
      expect_close(wide, 2e-5f, tolerance(k), "float out");
    }
  }
}

TYPED_TEST(GpuLinear, gives_a_row_the_same_bits_in_every_batch) {
  using T = TypeParam;
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{896, 896}, {17000, 704}, {1153, 4864}}) {
    constexpr int64_t most = 300;
    Weight<T> weight(n, k, this->rng);
    Twin<T> x({most, k});
    Twin<float> all({most, n});
    x.fill_random(this->rng), all.poison();
    linear({all.on(Device::cuda), x.on(Device::cuda), weight.packed.on(Device::cuda), {}, n, k, nullptr});
    const std::vector<float> expected = all.download();
    for (int64_t rows : {1, 7, 8, 11, 16, 29, 32, 40, 130}) {
      const int64_t first = most - rows;
      Twin<float> out({rows, n});
      out.poison();
      TensorView some = x.on(Device::cuda);
      some.data = some.as<T>() + first * k, some.shape[0] = rows;
      linear({out.on(Device::cuda), some, weight.packed.on(Device::cuda), {}, n, k, nullptr});
      const std::vector<float> got = out.download();
      ASSERT_EQ(std::memcmp(got.data(), expected.data() + first * n, got.size() * sizeof(float)), 0)
          << rows << " rows, n " << n << ", k " << k;
    }
  }
}

// The last columns of a weight of more than 2^31 elements equal the product with those rows alone.
TEST(GpuLinearLarge, addresses_weights_beyond_two_billion_elements) {
  constexpr int64_t k = 8192, n = 270000, tail = 64;
  size_t free_bytes = 0, total_bytes = 0;
  cuda::check(cudaMemGetInfo(&free_bytes, &total_bytes));
  if (free_bytes < size_t{8} << 30) GTEST_SKIP() << "needs 8 GB of GPU memory";
  std::mt19937 rng(5);
  Twin<BFloat16> last({packed_size(tail, k)});
  last.fill_random(rng);
  BFloat16* weight = nullptr;
  cuda::check(cudaMalloc(&weight, static_cast<size_t>(packed_size(n, k)) * 2));
  cuda::check(cudaMemset(weight, 0, static_cast<size_t>(packed_size(n, k)) * 2));
  cuda::check(cudaMemcpy(weight + (n - tail) * k, last.host().data(), tail * k * 2, cudaMemcpyHostToDevice));
  for (int64_t rows : {3, 150}) {
    Twin<BFloat16> x({rows, k});
    Twin<float> out({rows, n}), expected({rows, tail});
    x.fill_random(rng), out.poison(), expected.poison();
    TensorView large = last.on(Device::cuda);
    large.data = weight, large.shape[0] = packed_size(n, k);
    linear({out.on(Device::cuda), x.on(Device::cuda), large, {}, n, k, nullptr});
    linear({expected.on(Device::cuda), x.on(Device::cuda), last.on(Device::cuda), {}, tail, k, nullptr});
    const std::vector<float> got = out.download(), wanted = expected.download();
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < n - tail; ++c) ASSERT_EQ(got[static_cast<size_t>(r * n + c)], 0.0f) << r << ", " << c;
      for (int64_t c = 0; c < tail; ++c)
        ASSERT_EQ(got[static_cast<size_t>(r * n + n - tail + c)], wanted[static_cast<size_t>(r * tail + c)]);
    }
  }
  cuda::check(cudaFree(weight));
}

}  // namespace
}  // namespace hybrid::test
