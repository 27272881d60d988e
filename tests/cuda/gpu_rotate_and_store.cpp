// rotate_and_store against its CPU twin. Without a head norm the bits are the same; with one, the sum of squares is
// taken in another order.
#include <numeric>

#include "gpu_test.h"

namespace hybrid::test {
namespace {

struct HeadShape {
  int64_t heads, kv_heads, dim, rotary_dim, block_size;
};

// One step's product of [rows][q | k | v | gap] and a cache of [blocks][K | V | gap], in which all slots hold NaN; some
// rows are padding.
template <class T, class C>
class Step {
 public:
  static constexpr int64_t positions = 500, gap = 16;

  Step(const HeadShape& s, int64_t rows, std::mt19937& rng)
      : shape(s),
        rows_(rows),
        half_block_(s.kv_heads * s.block_size * s.dim),
        blocks_(rows / s.block_size + 3),
        qkv({rows, (s.heads + 2 * s.kv_heads) * s.dim + gap}),
        cache({blocks_, 2 * half_block_ + gap}),
        q_weight({s.dim}),
        k_weight({s.dim}),
        cos_sin({positions, s.rotary_dim}),
        position({rows}),
        slots({rows}) {
    q_weight.fill_random(rng, 0.5f), k_weight.fill_random(rng, 0.5f);
    for (int64_t p = 0; p < positions; ++p)
      for (int64_t i = 0; i < s.rotary_dim / 2; ++i) {
        const float angle = static_cast<float>(p) * std::pow(10000.0f, -2.0f * static_cast<float>(i) / 64.0f);
        cos_sin.host()[static_cast<size_t>(p * s.rotary_dim + i)] = std::cos(angle);
        cos_sin.host()[static_cast<size_t>(p * s.rotary_dim + s.rotary_dim / 2 + i)] = std::sin(angle);
      }
    cos_sin.upload();
    draw(rng);
  }

  // New values, places and positions in the same memory.
  void draw(std::mt19937& rng) {
    qkv.fill_random(rng), cache.poison();
    for (int32_t& p : position.host()) p = static_cast<int32_t>(rng() % positions);
    std::vector<int64_t> free(static_cast<size_t>(blocks_ * shape.block_size));
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), rng);
    for (size_t i = 0; i < slots.host().size(); ++i) slots.host()[i] = i % 7 == 3 ? -1 : free[i];
    position.upload(), slots.upload();
  }

  RotateAndStore on(Device device, bool normed, Stream stream = nullptr) {
    RotateAndStore a{};
    a.q = part(device, 0, shape.heads);
    a.k = part(device, shape.heads, shape.kv_heads);
    a.v = part(device, shape.heads + shape.kv_heads, shape.kv_heads);
    a.k_cache = cache.on(device);
    a.k_cache.ndim = 4;
    const int64_t sizes[] = {blocks_, shape.kv_heads, shape.block_size, shape.dim};
    int64_t stride = 1;
    for (int i = 3; i >= 0; --i) a.k_cache.shape[i] = sizes[i], a.k_cache.strides[i] = stride, stride *= sizes[i];
    a.k_cache.strides[0] = 2 * half_block_ + gap;
    a.v_cache = a.k_cache;
    a.v_cache.data = a.k_cache.as<C>() + half_block_;
    a.cos_sin = cos_sin.on(device), a.positions = position.on(device), a.slots = slots.on(device);
    if (normed) a.q_weight = q_weight.on(device), a.k_weight = k_weight.on(device);
    a.eps = 1e-6f, a.stream = stream, a.k_scale = k_scale<C>, a.v_scale = v_scale<C>;
    return a;
  }

  void expect_equal(bool normed) {
    const float tolerance = normed ? 4 * rounding<T>() : 0.0f;
    expect_close(qkv, tolerance, tolerance, "qkv");
    // Where T differs in its last place, Float8 may be the neighbour: an eighth away, or 2^-9 near zero.
    if (normed && sizeof(C) == 1)
      expect_close(cache, 1.0f / 8, 1.0f / 512, "cache");
    else
      expect_close(cache, tolerance, tolerance, "cache");
  }

  HeadShape shape;
  int64_t rows_, half_block_, blocks_;
  Twin<T> qkv;
  Twin<C> cache;
  Twin<T> q_weight, k_weight;
  Twin<float> cos_sin;
  Twin<int32_t> position;
  Twin<int64_t> slots;

 private:
  TensorView part(Device device, int64_t first_head, int64_t heads) {
    TensorView t = qkv.on(device);
    t.data = t.as<T>() + first_head * shape.dim;
    t.ndim = 3, t.shape[1] = heads, t.shape[2] = shape.dim, t.strides[1] = shape.dim, t.strides[2] = 1;
    return t;
  }
};

template <class T>
class GpuRotateAndStore : public ::testing::Test {
 protected:
  std::mt19937 rng{11};
};
TYPED_TEST_SUITE(GpuRotateAndStore, CacheTypes);

TYPED_TEST(GpuRotateAndStore, equals_its_cpu_twin_for_any_shape) {
  for (const int64_t dim : {32, 64, 80, 96, 128, 256})
    for (const auto& [heads, kv_heads] : {std::pair<int64_t, int64_t>{9, 3}, {14, 2}, {32, 8}, {1, 1}, {70, 10}})
      for (const int64_t rows : {1, 3, 129, 1500}) {
        if (rows > 1000 && heads != 9) continue;  // the CPU takes the time
        const int64_t block_size = int64_t{16} << this->rng() % 3;
        for (const int64_t rotary_dim : {dim, dim / 2}) {
          if (rotary_dim % 16 != 0) continue;
          Step<typename TypeParam::T, typename TypeParam::C> step({heads, kv_heads, dim, rotary_dim, block_size}, rows,
                                                                  this->rng);
          for (const bool normed : {false, true}) {
            SCOPED_TRACE(testing::Message() << "heads " << heads << "/" << kv_heads << " x " << dim << ", rotary "
                                            << rotary_dim << ", rows " << rows << ", normed " << normed);
            if (normed) step.draw(this->rng);
            for (Device device : {Device::cpu, Device::cuda}) rotate_and_store(step.on(device, normed));
            step.expect_equal(normed);
            if (this->HasFatalFailure()) return;
          }
        }
      }
}

// The kernel before it writes q, k and v; both may overlap. Replays see new positions and slots in the same memory.
TYPED_TEST(GpuRotateAndStore, reads_what_the_kernel_before_wrote_in_a_captured_graph) {
  using T = typename TypeParam::T;
  constexpr int64_t rows = 37, layers = 6;
  Step<T, typename TypeParam::C> step({14, 2, 64, 64, 16}, rows, this->rng);
  const int64_t width = step.qkv.numel() / rows;
  Twin<T> x({rows, width}), weight({width});
  const auto run = [&](Device device, Stream stream) {
    for (int64_t layer = 0; layer < layers; ++layer) {
      rms_norm({step.qkv.on(device), x.on(device), weight.on(device), {}, {}, 1e-5f, false, stream});
      rotate_and_store(step.on(device, true, stream));
    }
  };
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  run(Device::cuda, stream);
  cuda::check(cudaStreamEndCapture(stream, &graph));
  cuda::check(cudaGraphInstantiate(&executable, graph, 0));
  for (int replay = 0; replay < 3; ++replay) {
    step.draw(this->rng), x.fill_random(this->rng), weight.fill_random(this->rng), step.qkv.poison();
    cuda::check(cudaGraphLaunch(executable, stream));
    cuda::check(cudaStreamSynchronize(stream));
    run(Device::cpu, nullptr);
    step.expect_equal(true);
  }
  cuda::check(cudaGraphExecDestroy(executable));
  cuda::check(cudaGraphDestroy(graph));
  cuda::check(cudaStreamDestroy(stream));
}

// Rows of q, k and v 2^30 elements apart, and a cache of more than 2^31 elements behind them.
TEST(GpuRotateAndStoreSize, more_than_two_to_the_31_elements_are_addressed) {
  constexpr int64_t heads = 4, kv_heads = 8, dim = 128, rows = 4, row = int64_t{1} << 30, block_size = 16,
                    block = kv_heads * block_size * dim, blocks = (int64_t{1} << 31) / block + 2;
  BFloat16* memory = nullptr;
  const size_t elements = (rows - 1) * row + 3 * 8 * dim + 2 * blocks * block;
  if (cudaMalloc(&memory, elements * 2) != cudaSuccess) {
    cudaGetLastError();
    GTEST_SKIP() << "no " << elements * 2 << " bytes on this device";
  }
  BFloat16* cache = memory + (rows - 1) * row + 3 * 8 * dim;
  Twin<float> cos_sin({2, dim});
  Twin<int32_t> position({rows});
  Twin<int64_t> slots({rows});
  for (int64_t i = 0; i < 2 * dim; ++i) cos_sin.host()[static_cast<size_t>(i)] = i % dim < dim / 2 ? 0.0f : 1.0f;
  for (int64_t r = 0; r < rows; ++r) slots.host()[static_cast<size_t>(r)] = blocks * block_size - 1 - r;
  cos_sin.upload(), position.upload(), slots.upload();
  const auto view = [](BFloat16* data, std::initializer_list<int64_t> shape) {
    TensorView t;
    t.data = data, t.dtype = DType::bf16, t.device = Device::cuda, t.ndim = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), t.shape);
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; stride *= t.shape[i--]) t.strides[i] = stride;
    return t;
  };
  const std::vector<BFloat16> head(static_cast<size_t>(3 * 8 * dim), BFloat16(1.5f));
  for (int64_t r = 0; r < rows; ++r)
    cuda::check(cudaMemcpy(memory + r * row, head.data(), head.size() * 2, cudaMemcpyHostToDevice));
  TensorView q = view(memory, {rows, heads, dim}), k = view(memory + 8 * dim, {rows, kv_heads, dim}),
             v = view(memory + 16 * dim, {rows, kv_heads, dim});
  q.strides[0] = k.strides[0] = v.strides[0] = row;
  const TensorView k_cache = view(cache, {blocks, kv_heads, block_size, dim}),
                   v_cache = view(cache + blocks * block, {blocks, kv_heads, block_size, dim});
  rotate_and_store({q,
                    k_cache,
                    v_cache,
                    k,
                    v,
                    cos_sin.on(Device::cuda),
                    position.on(Device::cuda),
                    slots.on(Device::cuda),
                    {},
                    {},
                    0.0f,
                    nullptr});
  const auto value = [&](const BFloat16* at) {
    BFloat16 x;
    cuda::check(cudaMemcpy(&x, at, 2, cudaMemcpyDeviceToHost));
    return static_cast<float>(x);
  };
  for (int64_t r = 0; r < rows; ++r) {  // a quarter turn: (a, b) -> (-b, a)
    const int64_t last = (blocks - 1) * block + (kv_heads - 1) * block_size * dim + (block_size - 1 - r) * dim;
    EXPECT_EQ(value(memory + r * row), -1.5f);
    EXPECT_EQ(value(memory + r * row + heads * dim - 1), 1.5f);
    EXPECT_EQ(value(cache + last), -1.5f);
    EXPECT_EQ(value(cache + last + dim - 1), 1.5f);
    EXPECT_EQ(value(cache + blocks * block + last), 1.5f);
  }
  cudaFree(memory);
}

}  // namespace
}  // namespace hybrid::test
