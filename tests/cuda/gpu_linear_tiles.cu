// Every kernel of linear_sm90.cu, which `linear` picks from by size, against the CPU over ragged sizes, whole tiles and
// tiles cut among any number of blocks.
#include "gpu_test.h"
#include "linear_sm90.cuh"

namespace hybrid::test {
namespace {

using cuda::LinearParams;
using cuda::TilePlan;

// Every one that there is, with 1, a few, or as many clusters as can be.
std::vector<TilePlan> plans(bool gated) {
  std::vector<TilePlan> all;
  const int most = static_cast<int>(cuda::multiprocessors());
  for (int rows : {32, 64, 128, 192, 256})
    for (int cluster : {1, 2})
      for (int clusters : {1, 5, most / cluster})
        if (gated ? cluster == 1 || rows == 256 : cluster == 1 && rows <= 128) all.push_back({rows, cluster, clusters});
  return all;
}

// What another order costs sums of k products of unit normals, which have size sqrt(k).
float tolerance(int64_t k) { return 2e-5f * std::sqrt(static_cast<float>(k)); }

template <class T>
struct Case {
  int64_t rows, n, k;
  Twin<T> x, bias, weight, packed, out, gated, scratch;
  Twin<float> wide;

  Case(int64_t rows, int64_t n, int64_t k, std::mt19937& rng)
      : rows(rows),
        n(n),
        k(k),
        x({rows, k + 8}),
        bias({n}),
        weight({n, k}),
        packed({packed_size(n, k)}),
        out({rows, n}),
        gated({rows, n / 2}),
        scratch({rows, n}),
        wide({rows, n}) {
    x.fill_random(rng, 1.0f / std::sqrt(static_cast<float>(k))), bias.fill_random(rng), weight.fill_random(rng);
    const Device device = Device::cpu;
    pack_weight({packed.on(device), weight.on(device)});
    TensorView some = x.on(device);
    some.shape[1] = k;
    linear({out.on(device), some, packed.on(device), bias.on(device), n, k, nullptr});
    linear({wide.on(device), some, packed.on(device), {}, n, k, nullptr});
    if (n % 16 == 0)
      linear_silu_mul({gated.on(device), some, packed.on(device), bias.on(device), scratch.on(device), k, nullptr});
  }
  LinearParams<T> params() {
    LinearParams<T> p{};
    p.x = x.on(Device::cuda).template as<T>(), p.weight = weight.on(Device::cuda).template as<T>();
    p.rows = rows, p.n = n, p.k = k, p.x_row = k + 8, p.out_row = n;
    return p;
  }
  // Poison on the device only: the host has what is expected.
  template <class U>
  static void poison(Twin<U>& twin) {
    cuda::check(cudaMemset(twin.on(Device::cuda).data, 0xff, twin.bytes()));
  }
  std::string name(const TilePlan& plan) {
    return concat("rows ", rows, " n ", n, " k ", k, "; tiles of ", plan.rows, " rows, ", plan.clusters,
                  " clusters of ", plan.cluster);
  }
  void compare_plain(const TilePlan& plan) {
    SCOPED_TRACE(name(plan));
    LinearParams<T> p = params();
    poison(wide), p.out_f32 = wide.on(Device::cuda).template as<float>();
    warpgroup_linear(p, false, plan, nullptr);
    p = params();
    poison(out), p.out = out.on(Device::cuda).template as<T>(), p.bias = bias.on(Device::cuda).template as<T>();
    warpgroup_linear(p, false, plan, nullptr);
    expect_close(wide, 2e-5f, tolerance(k), "float out");
    expect_close(out, rounding<T>(), tolerance(k), "out with bias");
  }
  void compare_gated(const TilePlan& plan) {
    SCOPED_TRACE(name(plan));
    LinearParams<T> p = params();
    poison(gated), p.out = gated.on(Device::cuda).template as<T>(), p.out_row = n / 2;
    p.bias = bias.on(Device::cuda).template as<T>();
    warpgroup_linear(p, true, plan, nullptr);
    expect_close(gated, 4 * rounding<T>(), 4 * rounding<T>(), "gated");
  }
};

template <class T>
class GpuLinearTiles : public ::testing::Test {
 protected:
  std::mt19937 rng{23};
  void SetUp() override {
    if (!cuda::has_wgmma()) GTEST_SKIP() << "no warpgroup products on this device or in this build";
  }
};
using HalfTypes = ::testing::Types<BFloat16, Float16>;
TYPED_TEST_SUITE(GpuLinearTiles, HalfTypes);

template <class T>
void compare_all(int64_t rows, int64_t n, int64_t k, std::mt19937& rng) {
  Case<T> c(rows, n, k, rng);
  for (const TilePlan& plan : plans(false)) c.compare_plain(plan);
  if (n % 16 == 0)
    for (const TilePlan& plan : plans(true)) c.compare_gated(plan);
}

TYPED_TEST(GpuLinearTiles, equal_the_cpu_twin_at_one_ragged_size) { compare_all<TypeParam>(33, 208, 1000, this->rng); }

TYPED_TEST(GpuLinearTiles, equal_the_cpu_twin_for_every_ragged_size_and_cut) {
  constexpr std::pair<int64_t, int64_t> sizes[] = {{8, 64},     {100, 72},   {336, 1000}, {896, 896},
                                                   {1153, 576}, {144, 4864}, {2304, 200}, {24, 14336}};
  for (const auto& [n, k] : sizes)
    for (int64_t rows : {1, 15, 17, 33, 64, 65, 127, 129, 193, 255, 300}) {
      compare_all<TypeParam>(rows, n, k, this->rng);
      if (this->HasFailure()) return;
    }
}

// One launch follows the other as it may in a graph, each with tiles cut in its own way: no count is left behind.
TYPED_TEST(GpuLinearTiles, give_the_same_bits_whenever_they_run) {
  using T = TypeParam;
  Case<T> c(130, 1152, 4864, this->rng);
  const auto run = [&](const TilePlan& plan) {
    LinearParams<T> p = c.params();
    p.out_f32 = c.wide.on(Device::cuda).template as<float>();
    Case<T>::poison(c.wide);
    for (int i = 0; i < 20; ++i) warpgroup_linear(p, false, plan, nullptr);
    return c.wide.download();
  };
  const TilePlan cuts[] = {{128, 1, 132}, {128, 1, 99}, {64, 1, 77}, {32, 1, 131}};
  std::vector<std::vector<float>> expected;
  for (const TilePlan& plan : cuts) expected.push_back(run(plan));
  for (int again = 0; again < 20; ++again)
    for (size_t i = 0; i < std::size(cuts); ++i) ASSERT_EQ(run(cuts[i]), expected[i]) << "cut " << i;
}

}  // namespace
}  // namespace hybrid::test
