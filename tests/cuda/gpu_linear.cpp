// linear and linear_silu_mul against their CPU twins, with and without cuBLASLt, and against themselves: where asked
// to, a row's bits must not depend on the batch (P14, B31).
#include <dlfcn.h>

#include <memory>

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

// Our own kernels only, while it lives.
struct BatchInvariant {
  BatchInvariant() { set_batch_invariant(true); }
  ~BatchInvariant() { set_batch_invariant(false); }
};

// Columns [first, first + size) of a matrix.
TensorView columns(TensorView t, int64_t first, int64_t size) {
  t.data = static_cast<char*>(t.data) + first * item_size(t.dtype);
  t.shape[1] = size;
  return t;
}

// What another order costs sums of k products of unit normals, which have size sqrt(k).
float tolerance(int64_t k) { return 2e-5f * std::sqrt(static_cast<float>(k)); }

// Every way of `linear`, with x a slice of wider rows, against the CPU.
template <class T>
void compare_with_cpu(int64_t rows, Weight<T>& weight, int64_t n, int64_t k, std::mt19937& rng) {
  Twin<T> x({rows, 2 * k}), bias({n}), out({rows, n}), plain({rows, n});
  Twin<float> wide({rows, n}), wide_bias({rows, n});
  x.fill_random(rng), bias.fill_random(rng), out.poison(), plain.poison(), wide.poison(), wide_bias.poison();
  for (Device device : {Device::cpu, Device::cuda}) {
    const TensorView half = columns(x.on(device), k, k), w = weight.packed.on(device);
    linear({out.on(device), half, w, bias.on(device), n, k, nullptr});
    linear({plain.on(device), half, w, {}, n, k, nullptr});
    linear({wide.on(device), half, w, {}, n, k, nullptr});
    linear({wide_bias.on(device), half, w, bias.on(device), n, k, nullptr});
  }
  SCOPED_TRACE(concat("rows ", rows, " n ", n, " k ", k));
  expect_close(out, rounding<T>(), tolerance(k), "out with bias");
  expect_close(plain, rounding<T>(), tolerance(k), "out");
  expect_close(wide, 2e-5f, tolerance(k), "float out");
  expect_close(wide_bias, 2e-5f, tolerance(k), "float out with bias");
}

constexpr std::pair<int64_t, int64_t> odd_sizes[] = {{8, 64},     {100, 72},  {333, 1000}, {896, 896},
                                                     {1153, 576}, {40, 4864}, {2304, 200}, {24, 14336}};

TYPED_TEST(GpuLinear, equals_its_cpu_twin_for_every_ragged_size) {
  for (const auto& [n, k] : odd_sizes) {
    Weight<TypeParam> weight(n, k, this->rng);
    for (int64_t rows : {1, 8, 9, 17, 33, 64, 129, 200}) compare_with_cpu(rows, weight, n, k, this->rng);
  }
}

TYPED_TEST(GpuLinear, equals_its_cpu_twin_when_its_own_kernels_do_all) {
  const BatchInvariant on;
  for (const auto& [n, k] : odd_sizes) {
    Weight<TypeParam> weight(n, k, this->rng);
    for (int64_t rows : {1, 2, 8, 9, 16, 17, 32, 33, 64, 129}) compare_with_cpu(rows, weight, n, k, this->rng);
  }
}

// The gate's product and up's are rounded first, so one step of T there may move the result by as much.
TYPED_TEST(GpuLinear, followed_by_silu_mul_equals_its_cpu_twin) {
  using T = TypeParam;
  for (const auto& [dim, k] : {std::pair<int64_t, int64_t>{8, 64}, {1536, 576}, {200, 1000}, {4864, 896}}) {
    Weight<T> weight(2 * dim, k, this->rng);
    Twin<T> bias({2 * dim});
    bias.fill_random(this->rng);
    for (int64_t rows : {1, 3, 8, 16, 17, 32, 50, 65, 127, 129}) {
      Twin<T> x({rows, 2 * k}), out({rows, dim}), gate_up({rows, 2 * dim});
      x.fill_random(this->rng, 1.0f / std::sqrt(static_cast<float>(k))), out.poison(), gate_up.poison();
      for (Device device : {Device::cpu, Device::cuda})
        linear_silu_mul({out.on(device), columns(x.on(device), k, k), weight.packed.on(device), bias.on(device),
                         gate_up.on(device), k, nullptr});
      SCOPED_TRACE(concat("rows ", rows, " dim ", dim, " k ", k));
      expect_close(out, 4 * rounding<T>(), 4 * rounding<T>(), "out");
    }
  }
}

TYPED_TEST(GpuLinear, followed_by_silu_mul_has_the_bits_of_both_apart) {
  using T = TypeParam;
  const BatchInvariant on;
  for (const auto& [dim, k] : {std::pair<int64_t, int64_t>{8, 64}, {1536, 576}, {200, 1000}, {4864, 896}}) {
    Weight<T> weight(2 * dim, k, this->rng);
    Twin<T> bias({2 * dim});
    bias.fill_random(this->rng);
    for (int64_t rows : {1, 7, 8, 9, 16, 30, 33}) {
      Twin<T> x({rows, k}), out({rows, dim}), apart({rows, dim}), gate_up({rows, 2 * dim});
      x.fill_random(this->rng, 0.1f), out.poison(), apart.poison(), gate_up.poison();
      const Device device = Device::cuda;
      const TensorView w = weight.packed.on(device);
      linear_silu_mul({out.on(device), x.on(device), w, bias.on(device), gate_up.on(device), k, nullptr});
      linear({gate_up.on(device), x.on(device), w, bias.on(device), 2 * dim, k, nullptr});
      silu_mul({apart.on(device), gate_up.on(device), nullptr});
      const std::vector<T> got = out.download(), expected = apart.download();
      ASSERT_EQ(std::memcmp(got.data(), expected.data(), got.size() * sizeof(T)), 0)
          << rows << " rows, dim " << dim << ", k " << k;
    }
  }
}

// One row and rows too long for it included: where one kernel does both.
TYPED_TEST(GpuLinear, behind_a_norm_has_the_bits_of_both_apart_and_equals_its_cpu_twin) {
  using T = TypeParam;
  const BatchInvariant on;
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{16, 64}, {1152, 896}, {400, 1000}, {6144, 4096}, {96, 4864}}) {
    Weight<T> weight(n, k, this->rng);
    Twin<T> bias({n}), norm({k});
    bias.fill_random(this->rng), norm.fill_random(this->rng, 1.0f / std::sqrt(static_cast<float>(k)));
    for (int64_t rows : {1, 2, 9, 40})
      for (bool begins : {false, true}) {
        SCOPED_TRACE(concat("rows ", rows, " n ", n, " k ", k, " begins ", begins));
        Twin<T> x({rows, 2 * k}), normed({rows, k}), out({rows, n}), gated({rows, n / 2}), gate_up({rows, n});
        Twin<float> residual({rows, k}), sum({rows, k}), gated_sum({rows, k}), wide({rows, n});
        x.fill_random(this->rng), residual.fill_random(this->rng);
        if (begins) residual.poison();
        out.poison(), gated.poison(), wide.poison(), sum.poison(), gated_sum.poison();
        for (Device device : {Device::cpu, Device::cuda}) {
          const TensorView half = columns(x.on(device), k, k), w = weight.packed.on(device);
          const auto run = [&](const TensorView& to, const TensorView& new_sum, const TensorView& scratch) {
            normed.poison(), gate_up.poison();
            norm_linear({to, half, norm.on(device), residual.on(device), new_sum, normed.on(device), w, bias.on(device),
                         scratch, n, k, 1e-5f, begins, nullptr});
          };
          run(out.on(device), sum.on(device), {});
          run(wide.on(device), sum.on(device), {});
          run(gated.on(device), gated_sum.on(device), gate_up.on(device));
        }
        expect_close(sum, 0.0f, 0.0f, "sum");
        expect_close(gated_sum, 0.0f, 0.0f, "sum of the gated one");
        // What is multiplied may differ by a rounding.
        expect_close(out, 4 * rounding<T>(), 4 * rounding<T>(), "out");
        expect_close(wide, 4 * rounding<T>(), 4 * rounding<T>(), "float out");
        expect_close(gated, 8 * rounding<T>(), 8 * rounding<T>(), "gated");

        Twin<T> apart({rows, n}), gated_apart({rows, n / 2});
        Twin<float> added({rows, k});
        const Device device = Device::cuda;
        const TensorView w = weight.packed.on(device);
        apart.poison(), gated_apart.poison(), added.poison();
        rms_norm({normed.on(device), columns(x.on(device), k, k), norm.on(device), residual.on(device),
                  added.on(device), 1e-5f, begins, nullptr});
        linear({apart.on(device), normed.on(device), w, bias.on(device), n, k, nullptr});
        linear_silu_mul(
            {gated_apart.on(device), normed.on(device), w, bias.on(device), gate_up.on(device), k, nullptr});
        const auto same = [](const auto& a, const auto& b) {
          return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
        };
        ASSERT_TRUE(same(out.download(), apart.download()));
        ASSERT_TRUE(same(gated.download(), gated_apart.download()));
        ASSERT_TRUE(same(sum.download(), added.download()));
      }
  }
}

TYPED_TEST(GpuLinear, gives_a_row_the_same_bits_in_every_batch_when_asked_to) {
  using T = TypeParam;
  const BatchInvariant on;
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

// A captured chain whose products feed each other, replayed on new input: what overlaps must still wait for its data.
TEST(GpuLinearGraph, replays_a_chain_of_products_as_it_ran_eagerly) {
  using T = BFloat16;
  constexpr int64_t hidden = 896, inner = 4864, layers = 6;
  std::mt19937 rng(17);
  std::vector<std::unique_ptr<Weight<T>>> up, down;
  for (int64_t i = 0; i < layers; ++i) {
    up.push_back(std::make_unique<Weight<T>>(2 * inner, hidden, rng));
    down.push_back(std::make_unique<Weight<T>>(hidden, inner, rng));
  }
  Twin<T> norm({hidden});
  norm.fill_random(rng);
  cudaStream_t stream;
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (int64_t rows : {1, 8, 16, 32, 64, 160}) {
    Twin<T> x({rows, hidden}), product({rows, inner}), gate_up({rows, 2 * inner});
    Twin<float> out({rows, hidden});
    const Device device = Device::cuda;
    const auto chain = [&] {
      for (size_t i = 0; i < static_cast<size_t>(layers); ++i) {
        rms_norm({x.on(device), x.on(device), norm.on(device), {}, {}, 1e-6f, false, stream});
        linear_silu_mul(
            {product.on(device), x.on(device), up[i]->packed.on(device), {}, gate_up.on(device), hidden, stream});
        linear({x.on(device), product.on(device), down[i]->packed.on(device), {}, hidden, inner, stream});
      }
      linear({out.on(device), product.on(device), down[0]->packed.on(device), {}, hidden, inner, stream});
    };
    x.fill_random(rng), chain();  // grows scratch, loads kernels
    cuda::check(cudaStreamSynchronize(stream));
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    chain();
    cuda::check(cudaStreamEndCapture(stream, &graph));
    cuda::check(cudaGraphInstantiate(&executable, graph, 0));
    for (int again = 0; again < 5; ++again) {
      x.fill_random(rng), out.poison(), product.poison(), gate_up.poison();
      cuda::check(cudaGraphLaunch(executable, stream));
      cuda::check(cudaStreamSynchronize(stream));
      const std::vector<float> replayed = out.download();
      x.upload(), out.poison(), product.poison(), gate_up.poison();
      chain(), cuda::check(cudaStreamSynchronize(stream));
      ASSERT_EQ(out.download(), replayed) << rows << " rows, replay " << again;
    }
    cuda::check(cudaGraphExecDestroy(executable));
    cuda::check(cudaGraphDestroy(graph));
  }
  cuda::check(cudaStreamDestroy(stream));
}

// Where the machine says that it has cuBLASLt, it is found: its sums of many rows differ from ours somewhere.
TEST(GpuLinearLibrary, is_used_for_many_rows_unless_batches_may_not_matter) {
  void* file = nullptr;
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
    if (file == nullptr) file = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (file == nullptr) GTEST_SKIP() << "no libcublasLt.so on LD_LIBRARY_PATH";
  constexpr int64_t n = 4096, k = 4096, rows = 256;
  std::mt19937 rng(3);
  Weight<BFloat16> weight(n, k, rng);
  Twin<BFloat16> x({rows, k});
  Twin<float> free({rows, n}), ours({rows, n});
  x.fill_random(rng), free.poison(), ours.poison();
  const Device device = Device::cuda;
  linear({free.on(device), x.on(device), weight.packed.on(device), {}, n, k, nullptr});
  {
    const BatchInvariant on;
    linear({ours.on(device), x.on(device), weight.packed.on(device), {}, n, k, nullptr});
  }
  const std::vector<float> a = free.download(), b = ours.download();
  EXPECT_NE(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0);
  for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], tolerance(k) + 2e-5f * std::fabs(b[i])) << i;
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
  for (const auto& [rows, ours] : {std::pair<int64_t, bool>{3, true}, {50, false}, {150, true}, {150, false}}) {
    set_batch_invariant(ours);
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
      for (int64_t c = 0; c < tail; ++c) {
        const float value = wanted[static_cast<size_t>(r * tail + c)];
        ASSERT_NEAR(got[static_cast<size_t>(r * n + n - tail + c)], value,
                    ours ? 0.0f : tolerance(k) + 2e-5f * std::fabs(value));
      }
    }
  }
  set_batch_invariant(false);
  cuda::check(cudaFree(weight));
}

}  // namespace
}  // namespace hybrid::test
