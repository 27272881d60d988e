// What happens to q, k and v between their product and attention: bit for bit what norm, rotation and store do one
// after the other, each rounding to T.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "ops/cpu/isa.h"
#include "ops/cpu/thread_pool.h"
#include "owned_tensor.h"
#include "refusal.h"

namespace hybrid::test {
namespace {

class RotateAndStoreTest : public ::testing::TestWithParam<const cpu::Kernels*> {};

INSTANTIATE_TEST_SUITE_P(EveryIsa, RotateAndStoreTest, ::testing::ValuesIn(cpu::supported_kernels()),
                         [](const auto& test) { return std::string(test.param->name); });

struct HeadShape {
  int64_t heads, kv_heads, dim, rotary_dim, block_size;
};

// q, k and v are slices of one product; cache blocks hold K, V and a neighbour's bytes; slots are shuffled, two are
// padding.
template <class T, class C = T>
struct Case {
  static constexpr float k_scale = sizeof(C) == 1 ? 0.3f : 1.0f, v_scale = sizeof(C) == 1 ? 0.007f : 1.0f;
  static constexpr int64_t blocks = 7, rows = 40, positions = 90;
  HeadShape shape;
  int64_t row, half_block, block;
  OwnedTensor<T> qkv;
  OwnedTensor<C> cache;
  OwnedTensor<T> q_weight, k_weight;
  OwnedTensor<float> cos_sin;
  OwnedTensor<int32_t> position;
  OwnedTensor<int64_t> slots;

  explicit Case(const HeadShape& s)
      : shape(s),
        row((s.heads + 2 * s.kv_heads) * s.dim + 24),
        half_block(s.kv_heads * s.block_size * s.dim),
        block(2 * half_block + 8),
        qkv({rows, row}, T{}),
        cache({blocks, block}, not_a_number<C>()),
        q_weight({s.dim}, T{}),
        k_weight({s.dim}, T{}),
        cos_sin({positions, s.rotary_dim}, 0.0f),
        position({rows}, 0),
        slots({rows}, 0) {
    std::mt19937 rng(static_cast<unsigned>(s.dim + s.heads));
    std::normal_distribution<float> normal;
    for (auto* values : {&qkv.data, &q_weight.data, &k_weight.data})
      for (T& x : *values) x = static_cast<T>(normal(rng));
    for (float& x : cos_sin.data) x = normal(rng);
    for (int32_t& p : position.data) p = static_cast<int32_t>(rng() % positions);
    std::vector<int64_t> all(static_cast<size_t>(blocks * s.block_size));
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), rng);
    std::copy_n(all.begin(), rows, slots.data.begin());
    slots[5] = slots[rows - 1] = -1;
  }

  TensorView part(int64_t first_head, int64_t heads) {
    TensorView t = view_of(qkv.data.data() + first_head * shape.dim, dtype_of<T>(), {rows, heads, shape.dim});
    t.strides[0] = row;
    return t;
  }
  RotateAndStore args(bool normed) {
    RotateAndStore a{};
    a.q = part(0, shape.heads);
    a.k = part(shape.heads, shape.kv_heads);
    a.v = part(shape.heads + shape.kv_heads, shape.kv_heads);
    a.k_cache = view_of(cache.data.data(), dtype_of<C>(), {blocks, shape.kv_heads, shape.block_size, shape.dim});
    a.v_cache = a.k_cache;
    a.v_cache.data = cache.data.data() + half_block;
    a.k_cache.strides[0] = a.v_cache.strides[0] = block;
    a.cos_sin = cos_sin.view, a.positions = position.view, a.slots = slots.view;
    if (normed) a.q_weight = q_weight.view, a.k_weight = k_weight.view;
    a.eps = 1e-5f, a.k_scale = k_scale, a.v_scale = v_scale;
    return a;
  }

  // The composition, in place on a copy of the product: the norm by the op of that name, the rest by plain loops.
  void expect(const cpu::Kernels& isa, bool normed, std::vector<T>& product, std::vector<C>& stored) {
    const int64_t half = shape.rotary_dim / 2, turned = shape.heads + shape.kv_heads;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < turned; ++h) {
        T* x = product.data() + r * row + h * shape.dim;
        const TensorView head = view_of(x, dtype_of<T>(), {1, shape.dim});
        if (normed)
          isa.rms_norm({head, head, h < shape.heads ? q_weight.view : k_weight.view, {}, {}, 1e-5f, false, nullptr});
        for (int64_t i = 0; i < half; ++i) {
          const float a = static_cast<float>(x[i]), b = static_cast<float>(x[i + half]);
          const float c = cos_sin[position[r] * 2 * half + i], s = cos_sin[position[r] * 2 * half + half + i];
          const volatile float ac = a * c, bs = b * s, bc = b * c, as = a * s;  // four roundings, no fused ones
          x[i] = static_cast<T>(ac - bs), x[i + half] = static_cast<T>(bc + as);
        }
      }
      for (int64_t h = 0; h < 2 * shape.kv_heads && slots[r] >= 0; ++h) {
        const float factor = 1.0f / (h < shape.kv_heads ? k_scale : v_scale);
        const T* from = product.data() + r * row + (shape.heads + h) * shape.dim;
        std::transform(from, from + shape.dim,
                       stored.data() + slots[r] / shape.block_size * block +
                           (h * shape.block_size + slots[r] % shape.block_size) * shape.dim,
                       [&](T x) { return static_cast<C>(static_cast<float>(x) * factor); });
      }
    }
  }
};

template <class T, class C = T>
void expect_the_composition(const cpu::Kernels& isa, const HeadShape& shape) {
  for (const bool normed : {false, true})
    for (const int threads : {1, 3}) {
      Case<T, C> c(shape);
      std::vector<T> before = c.qkv.data, product = c.qkv.data;
      std::vector<C> stored = c.cache.data;
      c.expect(isa, normed, product, stored);
      cpu::set_num_threads(threads);
      isa.rotate_and_store(c.args(normed));
      cpu::set_num_threads(0);
      const auto what = testing::Message() << isa.name << " dim " << shape.dim << " normed " << normed;
      EXPECT_TRUE(same_bits(c.cache.data.data(), stored.data(), c.blocks * c.block)) << what;
      for (int64_t r = 0; r < c.rows; ++r) {
        const int64_t q = shape.heads * shape.dim;
        ASSERT_TRUE(same_bits(&c.qkv[r * c.row], &product[static_cast<size_t>(r * c.row)], q)) << what << " row " << r;
        ASSERT_TRUE(same_bits(&c.qkv[r * c.row + q], &before[static_cast<size_t>(r * c.row + q)], c.row - q))
            << what << ": k and v are only read";
      }
    }
}

TEST_P(RotateAndStoreTest, equals_norm_then_rotation_then_store_and_touches_nothing_else) {
  for (const auto& [dim, rotary_dim] :
       {std::pair<int64_t, int64_t>{8, 8}, {10, 6}, {64, 64}, {80, 34}, {96, 96}, {128, 2}, {128, 128}, {256, 256}}) {
    expect_the_composition<BFloat16>(*GetParam(), {6, 3, dim, rotary_dim, 16});
    expect_the_composition<Float16>(*GetParam(), {2, 1, dim, rotary_dim, 32});
    expect_the_composition<float>(*GetParam(), {4, 2, dim, rotary_dim, 64});
    expect_the_composition<BFloat16, Float8>(*GetParam(), {6, 3, dim, rotary_dim, 16});
    expect_the_composition<Float16, Float8>(*GetParam(), {2, 1, dim, rotary_dim, 32});
    expect_the_composition<float, Float8>(*GetParam(), {4, 2, dim, rotary_dim, 64});
  }
}

// S54: every kind of float, each where another lane of a register writes it.
TEST_P(RotateAndStoreTest, rounds_and_saturates_what_a_float8_cache_gets_as_float8_itself_does) {
  Case<float, Float8> c({1, 1, 256, 2, 16});
  std::mt19937 rng(5);
  for (float& x : c.qkv.data) {
    const uint32_t bits = rng();
    const float kinds[] = {std::bit_cast<float>(bits),
                           static_cast<float>(bits % 1024) * 0x1p-14f,
                           static_cast<float>(bits % 4096) / 8.0f * c.v_scale,
                           -0.0f,
                           INFINITY,
                           -NAN};
    x = kinds[bits / 4096 % 24 < 6 ? bits / 4096 % 24 : bits / 4096 % 3];
  }
  std::vector<float> product = c.qkv.data;
  std::vector<Float8> stored = c.cache.data;
  c.expect(*GetParam(), false, product, stored);
  GetParam()->rotate_and_store(c.args(false));
  EXPECT_TRUE(same_bits(c.cache.data.data(), stored.data(), c.blocks * c.block));
}

// F-21: what a request gets must not depend on its batch mates.
TEST_P(RotateAndStoreTest, gives_a_row_the_same_bits_alone_and_in_a_batch) {
  Case<BFloat16> together({6, 3, 96, 96, 16}), alone({6, 3, 96, 96, 16});
  GetParam()->rotate_and_store(together.args(true));
  for (int64_t r = 0; r < Case<BFloat16>::rows; ++r) {
    RotateAndStore a = alone.args(true);
    for (TensorView* t : {&a.q, &a.k, &a.v, &a.positions, &a.slots}) {
      t->data = static_cast<char*>(t->data) + r * t->strides[0] * item_size(t->dtype);
      t->shape[0] = 1;
    }
    GetParam()->rotate_and_store(a);
  }
  EXPECT_EQ(0, std::memcmp(together.cache.data.data(), alone.cache.data.data(), alone.cache.data.size() * 2));
  EXPECT_EQ(0, std::memcmp(together.qkv.data.data(), alone.qkv.data.data(), alone.qkv.data.size() * 2));
}

// Address space without memory: pages exist once touched.
struct SparseMemory {
  explicit SparseMemory(size_t n) : bytes(n) {
    data = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~SparseMemory() {
    if (data != MAP_FAILED) munmap(data, bytes);
  }
  SparseMemory(const SparseMemory&) = delete;
  SparseMemory& operator=(const SparseMemory&) = delete;
  void* data;
  size_t bytes;
};

TEST_P(RotateAndStoreTest, addresses_caches_of_more_than_two_to_the_32_elements) {
  constexpr int64_t heads = 8, block_size = 16, dim = 128, block = heads * block_size * dim,
                    blocks = (int64_t{1} << 32) / block + 3, slot = blocks * block_size - 1;
  SparseMemory k_memory(static_cast<size_t>(blocks * block) * 2), v_memory(static_cast<size_t>(blocks * block) * 2);
  if (k_memory.data == MAP_FAILED || v_memory.data == MAP_FAILED) GTEST_SKIP() << "no 16 GiB of address space";
  OwnedTensor<BFloat16> q({1, 1, dim}, BFloat16(1.0f)), k({1, heads, dim}, BFloat16(0.25f)),
      v({1, heads, dim}, BFloat16(3.0f));
  OwnedTensor<float> cos_sin({1, 2}, 1.0f);
  OwnedTensor<int32_t> position({1}, 0);
  OwnedTensor<int64_t> slots({1}, slot);
  cos_sin[1] = 0.0f;
  const TensorView k_cache = view_of(k_memory.data, DType::bf16, {blocks, heads, block_size, dim});
  const TensorView v_cache = view_of(v_memory.data, DType::bf16, {blocks, heads, block_size, dim});
  GetParam()->rotate_and_store(
      {q.view, k_cache, v_cache, k.view, v.view, cos_sin.view, position.view, slots.view, {}, {}, 0.0f, nullptr});
  const int64_t first = (blocks - 1) * block + (block_size - 1) * dim;
  for (int64_t h = 0; h < heads; ++h) {
    EXPECT_EQ(float(k_cache.as<BFloat16>()[first + h * block_size * dim]), 0.25f);
    EXPECT_EQ(float(v_cache.as<BFloat16>()[first + h * block_size * dim + dim - 1]), 3.0f);
  }
}

TEST(RotateAndStoreArguments, wrong_ones_are_refused_with_the_numbers) {
  Case<float> c({4, 2, 8, 8, 16});
  const RotateAndStore good = c.args(true);
  const auto refused = [&](auto&& change) {
    RotateAndStore bad = good;
    change(bad);
    return message_of([&] { rotate_and_store(bad); });
  };
  EXPECT_NO_THROW(rotate_and_store(good));
  OwnedTensor<float> odd({90, 5}, 0.0f), wide({90, 10}, 0.0f);
  EXPECT_EQ(refused([&](auto& a) { a.cos_sin = odd.view; }),
            "rotate_and_store: cos_sin has rotary_dim 5, expected an even number of at most dim = 8");
  EXPECT_EQ(refused([&](auto& a) { a.cos_sin = wide.view; }),
            "rotate_and_store: cos_sin has rotary_dim 10, expected an even number of at most dim = 8");
  EXPECT_EQ(refused([&](auto& a) { a.v.shape[0] = 2; }),
            "rotate_and_store: v has shape [2, 2, 8], expected [40, 2, 8]");
  EXPECT_EQ(refused([&](auto& a) { a.v.dtype = DType::bf16; }), "rotate_and_store: v is bfloat16, expected float32");
  EXPECT_EQ(refused([&](auto& a) { a.v_cache.dtype = DType::f8; }),
            "rotate_and_store: v_cache is float8_e4m3fn, expected float32");
  EXPECT_EQ(refused([&](auto& a) { a.v_scale = -1.0f; }),
            "rotate_and_store: v_cache has a scale of -1, must be positive and finite");
  EXPECT_EQ(refused([&](auto& a) { a.k_weight = {}; }),
            "rotate_and_store: q_weight and k_weight go together, one is missing");
  EXPECT_EQ(refused([&](auto& a) { a.k_cache.strides[1] = 8, a.k_cache.strides[2] = 16; }),  // token-major
            "rotate_and_store: k_cache has strides 8 and 16 inside a block, expected 128 and 8");
  c.position[7] = 90;
  EXPECT_EQ(refused([](auto&) {}), "rotate_and_store: positions holds 90, expected values in [0, 90)");
  c.position[7] = 89, c.slots[1] = 7 * 16;
  EXPECT_NE(refused([](auto&) {}).find("rotate_and_store: slots holds 112, expected values in ["), std::string::npos);
  c.slots[1] = 7 * 16 - 1, c.slots[2] = -9;
  EXPECT_NO_THROW(rotate_and_store(good));
}

}  // namespace
}  // namespace hybrid::test
