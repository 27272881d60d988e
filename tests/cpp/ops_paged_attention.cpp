// Paged attention against naive loops in double precision, and its promise: a row's bits depend on the row and its KV
// alone.
#include <gtest/gtest.h>

#include "attention_case.h"
#include "ops/cpu/thread_pool.h"
#include "refusal.h"

namespace hybrid::test {
namespace {

template <class T>
double tolerance() {
  if constexpr (std::is_same_v<T, float>) return 2e-6;
  if constexpr (std::is_same_v<T, Float16>) return 1e-3;
  return 6e-3;  // bf16: 8 bits of mantissa in the output, and in the probabilities where vdpbf16ps is used
}

template <class T, class C = T>
void expect_matches_reference(const cpu::Kernels& isa, const Shape& shape, const std::vector<Sequence>& sequences) {
  AttentionCase<T, C> c(shape, sequences);
  isa.paged_attention(c.args());
  double worst = 0;
  int64_t row = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (int32_t i = 0; i < sequences[s].query_len; ++i, ++row) {
      const auto expected = c.reference(s, row, sequences[s].seq_len - sequences[s].query_len + i);
      for (size_t j = 0; j < expected.size(); ++j) {
        const double got = float(c.row(row)[j]);
        ASSERT_FALSE(std::isnan(got)) << isa.name << " sequence " << s << " row " << i << " element " << j;
        worst = std::max(worst, std::abs(got - expected[j]));
      }
    }
  }
  EXPECT_LE(worst, tolerance<T>()) << isa.name << " " << name_of(dtype_of<T>()) << " over " << name_of(dtype_of<C>())
                                   << " heads " << shape.heads << "/" << shape.kv_heads << " dim " << shape.dim
                                   << " block " << shape.block_size;
}

class PagedAttentionTest : public ::testing::TestWithParam<const cpu::Kernels*> {
 protected:
  const cpu::Kernels& isa() const { return *GetParam(); }
  void TearDown() override { cpu::set_num_threads(0); }
};

INSTANTIATE_TEST_SUITE_P(EveryIsa, PagedAttentionTest, ::testing::ValuesIn(cpu::supported_kernels()),
                         [](const auto& test) { return std::string(test.param->name); });

TEST_P(PagedAttentionTest, MatchesNaiveLoopsForEveryHeadSizeAndDtype) {
  const std::vector<Sequence> mixed = {{1, 1, 77}, {2, 1, 1}, {3, 37, 37}, {4, 13, 141}};
  for (const int64_t dim : {8, 64, 72, 80, 96, 128, 256}) {
    const Shape shape{4, 2, dim, 16};
    expect_matches_reference<float>(isa(), shape, mixed);
    expect_matches_reference<BFloat16>(isa(), shape, mixed);
    expect_matches_reference<Float16>(isa(), shape, mixed);
    expect_matches_reference<float, Float8>(isa(), shape, mixed);
    expect_matches_reference<BFloat16, Float8>(isa(), shape, mixed);
    expect_matches_reference<Float16, Float8>(isa(), shape, mixed);
  }
}

TEST_P(PagedAttentionTest, MatchesNaiveLoopsForEveryGroupAndBlockSize) {
  const std::vector<Sequence> mixed = {{5, 1, 64}, {6, 1, 65}, {7, 70, 130}};
  for (const auto& [heads, kv_heads] : {std::pair{1, 1}, {3, 3}, {9, 3}, {14, 2}, {8, 1}, {10, 2}})
    for (const int64_t block_size : {16, 32, 64}) {
      expect_matches_reference<BFloat16>(isa(), {heads, kv_heads, 64, block_size}, mixed);
      expect_matches_reference<float>(isa(), {heads, kv_heads, 32, block_size}, mixed);
    }
}

TEST_P(PagedAttentionTest, MatchesNaiveLoopsForRandomRaggedBatches) {
  std::mt19937 random(7);
  for (int round = 0; round < 6; ++round) {
    std::vector<Sequence> sequences;
    const int decodes = static_cast<int>(random() % 5), prefills = static_cast<int>(random() % 3) + (decodes == 0);
    for (int i = 0; i < decodes; ++i)
      sequences.push_back({static_cast<uint32_t>(random()), 1, 1 + static_cast<int32_t>(random() % 1200)});
    for (int i = 0; i < prefills; ++i) {
      const int32_t rows = 1 + static_cast<int32_t>(random() % 90);
      sequences.push_back({static_cast<uint32_t>(random()), rows, rows + static_cast<int32_t>(random() % 600)});
    }
    expect_matches_reference<BFloat16>(isa(), {6, 2, 64, 32}, sequences);
    expect_matches_reference<float>(isa(), {6, 2, 64, 32}, sequences);
    expect_matches_reference<BFloat16, Float8>(isa(), {6, 2, 64, 32}, sequences);
  }
}

TEST_P(PagedAttentionTest, LongContextIsSplitOverThreadsAndStaysExact) {
  expect_matches_reference<BFloat16>(isa(), {4, 1, 64, 32}, {{8, 1, 5000}});
  expect_matches_reference<float>(isa(), {2, 1, 64, 64}, {{9, 1, 33000}, {10, 1, 3}});
}

// The rows of one sequence as they come out of a single prefill of everything.
template <class T, class C>
std::vector<T> whole(const cpu::Kernels& isa, const Shape& shape, uint32_t seed, int32_t tokens) {
  AttentionCase<T, C> c(shape, {{seed, tokens, tokens}});
  isa.paged_attention(c.args());
  return c.out.data;
}

template <class T, class C>
void expect_rows(AttentionCase<T, C>& c, int64_t row, const std::vector<T>& all, int32_t position, int32_t rows,
                 const char* what) {
  ASSERT_TRUE(same_bits(c.row(row), all.data() + position * c.row_size(), rows * c.row_size()))
      << what << ": rows of positions " << position << " to " << position + rows << " differ";
}

// Positions at which a decode is compared: every one below the first number, then each so many-th.
#ifdef __SANITIZE_ADDRESS__  // some 30 times slower, and what it looks for is there at few positions, too
constexpr int32_t dense_positions = 40, position_stride = 61;
#else
constexpr int32_t dense_positions = 200, position_stride = 13;
#endif

template <class T, class C = T>
void expect_chunking_changes_no_bit(const cpu::Kernels& isa, const Shape& shape) {
  constexpr int32_t tokens = 1100;  // three chunks of KV
  const std::vector<T> all = whole<T, C>(isa, shape, 11, tokens);
  for (const auto& ends :
       {std::vector<int32_t>{1, 64, 65, 511, 513, 1024, 1100}, {333, 700, 1100}, {600, 1099, 1100}}) {
    int32_t done = 0;
    for (const int32_t end : ends) {
      AttentionCase<T, C> c(shape, {{11, end - done, end}}, 5);
      isa.paged_attention(c.args());
      expect_rows(c, 0, all, done, end - done, "chunked prefill");
      done = end;
    }
  }
  for (int32_t position = 0; position < tokens; position += position < dense_positions ? 1 : position_stride) {
    AttentionCase<T, C> c(shape, {{11, 1, position + 1}}, 6);
    isa.paged_attention(c.args());
    expect_rows(c, 0, all, position, 1, "decode");
  }
}

TEST_P(PagedAttentionTest, DecodeAndAnyChunkingOfAPromptGiveTheSameBits) {
  expect_chunking_changes_no_bit<BFloat16>(isa(), {3, 1, 64, 16});
  expect_chunking_changes_no_bit<BFloat16>(isa(), {2, 2, 24, 32});
  expect_chunking_changes_no_bit<Float16>(isa(), {7, 1, 8, 64});
  expect_chunking_changes_no_bit<float>(isa(), {2, 1, 40, 32});
  expect_chunking_changes_no_bit<BFloat16, Float8>(isa(), {3, 1, 72, 16});
}

// S54: of one token, attention is its value.
TEST_P(PagedAttentionTest, ReadsEveryFloat8AsWhatItStandsFor) {
  AttentionCase<float, Float8> c({1, 1, 256, 16}, {{12, 1, 1}});
  Float8* value = const_cast<Float8*>(c.cached(c.v_cache, 0, 0, 0));
  for (int i = 0; i < 256; ++i) value[i].bits = static_cast<uint8_t>(i);
  isa().paged_attention(c.args());
  for (int i = 0; i < 256; ++i) {
    const float expected = float(value[i]) * c.v_scale, got = c.row(0)[i];
    EXPECT_TRUE(got == expected || (std::isnan(got) && std::isnan(expected))) << i << ": " << got << " " << expected;
  }
}

TEST_P(PagedAttentionTest, BatchMatesAndThreadsChangeNoBit) {
  const Shape shape{6, 2, 64, 32};
  const std::vector<Sequence> batch = {{21, 1, 2100}, {22, 1, 5}, {23, 1, 1030}, {24, 90, 700}, {25, 3, 64}};
  for (const int threads : {1, 2, 3}) {
    cpu::set_num_threads(threads);
    AttentionCase<BFloat16> together(shape, batch, 9);
    isa().paged_attention(together.args());
    cpu::set_num_threads(1);
    int64_t row = 0;
    for (const Sequence& s : batch) {
      AttentionCase<BFloat16> alone(shape, {s}, 10);
      isa().paged_attention(alone.args());
      ASSERT_TRUE(same_bits(together.row(row), alone.row(0), s.query_len * alone.row_size()))
          << threads << " threads, sequence of seed " << s.seed;
      row += s.query_len;
    }
  }
}

TEST_P(PagedAttentionTest, LaterTokensOfTheSameChunkCannotReachARow) {
  const Shape shape{3, 1, 64, 16};
  AttentionCase<BFloat16> clean(shape, {{31, 150, 150}}), dirty(shape, {{31, 150, 150}});
  isa().paged_attention(clean.args());
  for (const int64_t t : {int64_t{101}, int64_t{102}})
    for (int64_t d = 0; d < shape.dim; ++d) {
      const_cast<BFloat16*>(dirty.cached(dirty.v_cache, 0, 0, t))[d] = BFloat16(INFINITY);
      const_cast<BFloat16*>(dirty.cached(dirty.k_cache, 0, 0, t))[d] = not_a_number<BFloat16>();
    }
  isa().paged_attention(dirty.args());
  EXPECT_TRUE(same_bits(clean.row(0), dirty.row(0), 101 * clean.row_size()));
  EXPECT_TRUE(std::isnan(float(dirty.row(101)[0])));
}

TEST_P(PagedAttentionTest, NaNInARowStaysInThatRow) {
  const Shape shape{2, 1, 64, 16};
  AttentionCase<float> clean(shape, {{41, 20, 90}}), dirty(shape, {{41, 20, 90}});
  dirty.q[7 * clean.row_size()] = NAN;  // row 7, head 0
  isa().paged_attention(clean.args());
  isa().paged_attention(dirty.args());
  EXPECT_TRUE(std::isnan(dirty.row(7)[0]));
  EXPECT_TRUE(same_bits(clean.row(0), dirty.row(0), 7 * clean.row_size()));
  EXPECT_TRUE(same_bits(clean.row(7) + shape.dim, dirty.row(7) + shape.dim, 12 * clean.row_size() + shape.dim));
}

TEST_P(PagedAttentionTest, HonoursRowAndBlockStrides) {
  // q is a slice of a fused qkv row, the caches are slices of blocks that hold K and V of all layers.
  const Shape shape{4, 2, 64, 16};
  const std::vector<Sequence> sequences = {{51, 1, 40}, {52, 9, 30}};
  AttentionCase<BFloat16> plain(shape, sequences), strided(shape, sequences);
  isa().paged_attention(plain.args());
  const int64_t width = 2 * plain.row_size(), block = shape.kv_heads * shape.block_size * shape.dim;
  OwnedTensor<BFloat16> qkv({10, width}, not_a_number<BFloat16>());
  OwnedTensor<BFloat16> pool({plain.k_cache.view.shape[0], 2, block}, not_a_number<BFloat16>());
  for (int64_t r = 0; r < 10; ++r)
    std::copy_n(plain.q.data.begin() + r * plain.row_size(), plain.row_size(), qkv.data.begin() + r * width);
  for (int64_t b = 0; b < pool.view.shape[0]; ++b) {
    std::copy_n(plain.k_cache.data.begin() + b * block, block, pool.data.begin() + 2 * b * block);
    std::copy_n(plain.v_cache.data.begin() + b * block, block, pool.data.begin() + (2 * b + 1) * block);
  }
  PagedAttention args = strided.args();
  args.q.data = qkv.data.data();
  args.q.strides[0] = width;
  args.k_cache.data = pool.data.data();
  args.v_cache.data = pool.data.data() + block;
  args.k_cache.strides[0] = args.v_cache.strides[0] = 2 * block;
  isa().paged_attention(args);
  EXPECT_TRUE(same_bits(plain.row(0), strided.row(0), 10 * plain.row_size()));
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
  bad = c.args();
  bad.k_cache.dtype = DType::f8;  // the values are not
  EXPECT_THROW(paged_attention(bad), std::invalid_argument);
  bad = c.args();
  bad.v_scale = 2.0f;
  EXPECT_EQ(message_of([&] { paged_attention(bad); }),
            "paged_attention: v_cache is float32 and has a scale of 2, only float8_e4m3fn has one");
  AttentionCase<float, Float8> small(shape, {{1, 1, 20}});
  bad = small.args();
  bad.k_scale = 0.0f;
  EXPECT_EQ(message_of([&] { paged_attention(bad); }),
            "paged_attention: k_cache has a scale of 0, must be positive and finite");
}

}  // namespace
}  // namespace hybrid::test
