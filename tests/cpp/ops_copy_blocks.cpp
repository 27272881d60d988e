// Whole blocks of the cache, copied to others and to another cache.
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

template <class T, class Index>
void expect_swaps(int64_t elements, int64_t gap, const std::vector<Index>& dst, const std::vector<Index>& src) {
  constexpr int64_t here = 8, there = 5;
  OwnedTensor<T> device({here, elements + gap}, T{}), host({there, elements}, T{});
  for (int64_t i = 0; i < here * (elements + gap); ++i) device[i] = static_cast<T>(i * 31 % 251);
  for (int64_t i = 0; i < there * elements; ++i) host[i] = static_cast<T>(i * 17 % 241);
  device.view.shape[1] = elements;  // a block stride of its own
  OwnedTensor<Index> dst_column(dst), src_column(src);
  std::vector<T> expected = host.data;
  for (size_t i = 0; i < dst.size(); ++i)
    std::copy_n(device.data.begin() + src[i] * (elements + gap), elements, expected.begin() + dst[i] * elements);
  const std::vector<T> before = device.data;
  swap_blocks({host.view, device.view, dst_column.view, src_column.view, nullptr});
  EXPECT_TRUE(same_bits(host.data.data(), expected.data(), there * elements));
  std::fill(device.data.begin(), device.data.end(), T{});
  swap_blocks({device.view, host.view, src_column.view, dst_column.view, nullptr});  // and back
  std::vector<T> returned(before.size(), T{});
  for (const Index block : src)
    std::copy_n(before.begin() + block * (elements + gap), elements, returned.begin() + block * (elements + gap));
  EXPECT_TRUE(same_bits(device.data.data(), returned.data(), here * (elements + gap)));
}

TEST(SwapBlocks, CopiesWholeBlocksThereAndBack) {
  expect_swaps<BFloat16, int32_t>(3, 0, {4, 0, 2}, {7, 1, 2});
  expect_swaps<float, int64_t>(70001, 3, {0, 1, 2}, {5, 6, 7});
  expect_swaps<uint8_t, int64_t>((1 << 18) + 17, 0, {3}, {0});
  expect_swaps<float, int32_t>(16, 0, {}, {});
}

TEST(SwapBlocks, BadBlocksAreRefused) {
  OwnedTensor<float> device({4, 8}, 1.0f), host({2, 8}, 1.0f), narrow({2, 7}, 1.0f);
  const auto swap = [&](const TensorView& to, const std::vector<int32_t>& dst, const std::vector<int32_t>& src) {
    OwnedTensor<int32_t> dst_column(dst), src_column(src);
    swap_blocks({to, device.view, dst_column.view, src_column.view, nullptr});
  };
  EXPECT_NO_THROW(swap(host.view, {1, 0}, {3, 3}));
  EXPECT_THROW(swap(host.view, {2}, {0}), std::invalid_argument);
  EXPECT_THROW(swap(host.view, {0}, {4}), std::invalid_argument);
  EXPECT_THROW(swap(host.view, {-1}, {0}), std::invalid_argument);
  EXPECT_THROW(swap(host.view, {0, 0}, {1, 2}), std::invalid_argument);
  EXPECT_THROW(swap(host.view, {0, 1}, {1}), std::invalid_argument);
  EXPECT_THROW(swap(narrow.view, {0}, {0}), std::invalid_argument);
  OwnedTensor<float> indices({1}, 0.0f);
  EXPECT_THROW(swap_blocks({host.view, device.view, indices.view, indices.view, nullptr}), std::invalid_argument);
  TensorView elsewhere = host.view, there = device.view;
  elsewhere.device = there.device = Device::cuda;
  OwnedTensor<int32_t> zero({1}, 0);
  EXPECT_THROW(swap_blocks({elsewhere, there, zero.view, zero.view, nullptr}), std::invalid_argument);
}

}  // namespace
}  // namespace hybrid::test
