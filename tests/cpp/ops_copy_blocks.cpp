// Whole blocks of the cache, copied to others.
#include <gtest/gtest.h>

#include <numeric>
#include <stdexcept>

#include "ops/ops.h"
#include "owned_tensor.h"

namespace hybrid::test {
namespace {

template <class T>
void expect_copies(int64_t blocks, int64_t elements, const std::vector<int32_t>& src, const std::vector<int32_t>& dst) {
  OwnedTensor<T> cache({blocks, elements}, T{});
  for (int64_t i = 0; i < blocks * elements; ++i) cache[i] = static_cast<T>(i * 31 % 251);
  std::vector<T> expected = cache.data;
  for (size_t i = 0; i < src.size(); ++i)
    std::copy_n(cache.data.begin() + src[i] * elements, elements, expected.begin() + dst[i] * elements);
  OwnedTensor<int32_t> src_column(src), dst_column(dst);
  copy_blocks({cache.view, src_column.view, dst_column.view, nullptr});
  EXPECT_TRUE(same_bits(cache.data.data(), expected.data(), blocks * elements)) << blocks << " x " << elements;
}

TEST(CopyBlocks, CopiesWholeRowsAndNothingElse) {
  expect_copies<BFloat16>(8, 3, {0, 5}, {7, 2});
  expect_copies<float>(5, 70001, {4, 4, 4}, {0, 3, 1});  // one source may serve many
  expect_copies<uint8_t>(6, (1 << 18) * 3 + 17, {1, 2}, {5, 0});
  expect_copies<float>(4, 16, {}, {});
}

TEST(CopyBlocks, BadBlocksAreRefused) {
  OwnedTensor<float> cache({4, 8}, 1.0f);
  const auto copy = [&](const std::vector<int32_t>& src, const std::vector<int32_t>& dst) {
    OwnedTensor<int32_t> src_column(src), dst_column(dst);
    copy_blocks({cache.view, src_column.view, dst_column.view, nullptr});
  };
  EXPECT_NO_THROW(copy({0, 1}, {2, 3}));
  EXPECT_THROW(copy({0}, {4}), std::invalid_argument);
  EXPECT_THROW(copy({-1}, {0}), std::invalid_argument);
  EXPECT_THROW(copy({0, 1}, {2}), std::invalid_argument);
  EXPECT_THROW(copy({0, 1}, {2, 2}), std::invalid_argument);
  EXPECT_THROW(copy({0, 1}, {1, 2}), std::invalid_argument);
  EXPECT_THROW(copy({0}, {0}), std::invalid_argument);
}

}  // namespace
}  // namespace hybrid::test
