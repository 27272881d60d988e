// Stores into the paged cache, and the argument checks they share with attention.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <stdexcept>

#include "attention_case.h"

namespace hybrid::test {
namespace {

class StoreKvTest : public ::testing::TestWithParam<const cpu::Kernels*> {};

INSTANTIATE_TEST_SUITE_P(EveryIsa, StoreKvTest, ::testing::ValuesIn(cpu::supported_kernels()),
                         [](const auto& test) { return std::string(test.param->name); });

template <class T>
void expect_rows_land_in_their_slots(const cpu::Kernels& isa, int64_t heads, int64_t dim, int64_t block_size) {
  constexpr int64_t blocks = 7, rows = 40;
  // Rows are slices of a wider one (q, k and v of one product); blocks hold K, V and a neighbour's bytes.
  const int64_t row = 3 * heads * dim, half = heads * block_size * dim, block = 2 * half + 8;
  OwnedTensor<T> qkv({rows, row}, T{}), cache({blocks, block}, not_a_number<T>());
  for (int64_t i = 0; i < rows * row; ++i) qkv[i] = static_cast<T>(static_cast<float>(i % 1999));
  std::vector<int64_t> all(static_cast<size_t>(blocks * block_size));
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), std::mt19937(3));
  OwnedTensor<int64_t> slots(std::vector<int64_t>(all.begin(), all.begin() + rows));
  slots[5] = slots[rows - 1] = -1;

  StoreKv a;
  a.k_cache = view_of(cache.data.data(), dtype_of<T>(), {blocks, heads, block_size, dim});
  a.v_cache = view_of(cache.data.data() + half, dtype_of<T>(), {blocks, heads, block_size, dim});
  a.k_cache.strides[0] = a.v_cache.strides[0] = block;
  a.k = view_of(qkv.data.data() + heads * dim, dtype_of<T>(), {rows, heads, dim});
  a.v = view_of(qkv.data.data() + 2 * heads * dim, dtype_of<T>(), {rows, heads, dim});
  a.k.strides[0] = a.v.strides[0] = row;
  a.slots = slots.view;
  a.stream = nullptr;

  std::vector<T> expected = cache.data;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < 2 * heads && slots[r] >= 0; ++h)
      for (int64_t d = 0; d < dim; ++d)
        expected[static_cast<size_t>(slots[r] / block_size * block + (h * block_size + slots[r] % block_size) * dim +
                                     d)] = qkv[r * row + (heads + h) * dim + d];
  isa.store_kv(a);
  EXPECT_TRUE(same_bits(cache.data.data(), expected.data(), blocks * block))
      << isa.name << " heads " << heads << " dim " << dim;
}

TEST_P(StoreKvTest, EveryRowLandsInItsSlotAndNothingElseIsTouched) {
  for (const int64_t dim : {8, 64, 80, 128, 256}) {
    expect_rows_land_in_their_slots<BFloat16>(*GetParam(), 3, dim, 16);
    expect_rows_land_in_their_slots<Float16>(*GetParam(), 1, dim, 32);
    expect_rows_land_in_their_slots<float>(*GetParam(), 2, dim, 64);
  }
}

TEST_P(StoreKvTest, AttentionReadsWhatWasStored) {
  const Shape shape{4, 2, 64, 16};
  AttentionCase<BFloat16> c(shape, {{1, 50, 50}});
  c.args();
  GetParam()->paged_attention(c.args());
  const std::vector<BFloat16> expected = c.out.data;
  OwnedTensor<BFloat16> k({50, 2, 64}, BFloat16()), v({50, 2, 64}, BFloat16());
  OwnedTensor<int64_t> slots({50}, 0);
  for (int64_t t = 0; t < 50; ++t) {
    slots[t] = c.kv_blocks[t / 16] * 16 + t % 16;
    for (int64_t h = 0; h < 2; ++h) {
      std::copy_n(c.cached(c.k_cache, 0, h, t), 64, &k[(t * 2 + h) * 64]);
      std::copy_n(c.cached(c.v_cache, 0, h, t), 64, &v[(t * 2 + h) * 64]);
    }
  }
  std::fill(c.k_cache.data.begin(), c.k_cache.data.end(), not_a_number<BFloat16>());
  std::fill(c.v_cache.data.begin(), c.v_cache.data.end(), not_a_number<BFloat16>());
  GetParam()->store_kv({c.k_cache.view, c.v_cache.view, k.view, v.view, slots.view, nullptr});
  GetParam()->paged_attention(c.args());
  EXPECT_TRUE(same_bits(c.out.data.data(), expected.data(), 50 * c.row_size()));
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

TEST_P(StoreKvTest, CachesOfMoreThanTwoToThe32ElementsAreAddressed) {
  constexpr int64_t heads = 8, block_size = 16, dim = 128, block = heads * block_size * dim,
                    blocks = (int64_t{1} << 32) / block + 3;
  SparseMemory k_memory(static_cast<size_t>(blocks * block) * 2), v_memory(static_cast<size_t>(blocks * block) * 2);
  if (k_memory.data == MAP_FAILED || v_memory.data == MAP_FAILED) GTEST_SKIP() << "no 16 GiB of address space";
  const auto k_cache = view_of(k_memory.data, DType::bf16, {blocks, heads, block_size, dim});
  const auto v_cache = view_of(v_memory.data, DType::bf16, {blocks, heads, block_size, dim});
  OwnedTensor<BFloat16> k({2, heads, dim}, BFloat16(0.25f)), v({2, heads, dim}, BFloat16(1.0f));
  std::fill(v.data.begin() + heads * dim, v.data.end(), BFloat16(3.0f));
  OwnedTensor<int64_t> slots({2}, (blocks - 1) * block_size);
  slots[1] += 1;
  GetParam()->store_kv({k_cache, v_cache, k.view, v.view, slots.view, nullptr});
  EXPECT_EQ(float(v_cache.as<BFloat16>()[(blocks - 1) * block]), 1.0f);

  OwnedTensor<BFloat16> q({1, heads, dim}, BFloat16(1.0f)), out({1, heads, dim}, not_a_number<BFloat16>());
  OwnedTensor<int32_t> query_start({2}, 0), seq_lens({1}, 2), kv_start({2}, 0),
      kv_blocks({1}, static_cast<int32_t>(blocks - 1));
  query_start[1] = kv_start[1] = 1;
  GetParam()->paged_attention({out.view,
                               q.view,
                               k_cache,
                               v_cache,
                               query_start.view,
                               seq_lens.view,
                               kv_start.view,
                               kv_blocks.view,
                               {},
                               0,
                               1,
                               1,
                               0.1f,
                               nullptr});
  for (const BFloat16 x : out.data) ASSERT_EQ(float(x), 2.0f);
}

TEST(StoreKvArguments, BadSlotsAndShapesAreRefused) {
  OwnedTensor<float> k_cache({4, 2, 16, 8}, 0.0f), v_cache({4, 2, 16, 8}, 0.0f), k({3, 2, 8}, 1.0f), v({3, 2, 8}, 1.0f);
  OwnedTensor<int64_t> slots({3}, 1);
  const StoreKv good{k_cache.view, v_cache.view, k.view, v.view, slots.view, nullptr};
  slots[1] = 63, slots[2] = -9;
  EXPECT_NO_THROW(store_kv(good));
  slots[1] = 64;
  EXPECT_THROW(store_kv(good), std::invalid_argument);
  slots[1] = 5;
  StoreKv bad = good;
  bad.v.shape[0] = 2;
  EXPECT_THROW(store_kv(bad), std::invalid_argument);
  bad = good;
  bad.v.dtype = DType::bf16;
  EXPECT_THROW(store_kv(bad), std::invalid_argument);
  bad = good;
  bad.k_cache.strides[1] = 8, bad.k_cache.strides[2] = 16;  // token-major inside a block
  EXPECT_THROW(store_kv(bad), std::invalid_argument);
}

TEST(PagedAttentionArguments, InconsistentRaggedColumnsAreRefused) {
  const Shape shape{4, 2, 64, 16};
  AttentionCase<float> c(shape, {{1, 1, 20}, {2, 5, 30}});
  EXPECT_NO_THROW(paged_attention(c.args()));
  const auto refused = [&](int32_t& number, int32_t value) {
    const int32_t old = number;
    number = value;
    EXPECT_THROW(paged_attention(c.args()), std::invalid_argument) << old << " -> " << value;
    number = old;
  };
  refused(c.kv_blocks[3], static_cast<int32_t>(c.k_cache.view.shape[0]));
  refused(c.kv_blocks[0], -1);
  refused(c.seq_lens[0], 33);  // two blocks hold 32
  refused(c.seq_lens[1], 4);   // five query rows
  refused(c.seq_lens[1], -1);
  refused(c.query_start[0], -1);
  refused(c.query_start[1], 2);  // a decode has one row
  refused(c.query_start[2], 7);  // six rows in q
  refused(c.kv_start[1], 1);
  refused(c.kv_start[2], 5);
  EXPECT_NO_THROW(paged_attention(c.args()));
  PagedAttention bad = c.args();
  bad.scale = 0.0f;
  EXPECT_THROW(paged_attention(bad), std::invalid_argument);
  bad = c.args();
  bad.max_decodes = 0;  // one is
  EXPECT_THROW(paged_attention(bad), std::invalid_argument);
  bad = c.args();
  bad.num_decodes = {};
  EXPECT_THROW(paged_attention(bad), std::invalid_argument);
  bad = c.args();
  bad.max_query_len = 4;
  EXPECT_THROW(paged_attention(bad), std::invalid_argument);
  bad = c.args();
  bad.v_cache.dtype = DType::bf16;
  EXPECT_THROW(paged_attention(bad), std::invalid_argument);
}

}  // namespace
}  // namespace hybrid::test
