// Philox against the published vectors, and the noise made of it.
#include <gtest/gtest.h>

#include <cmath>

#include "ops/philox.h"

namespace hybrid {
namespace {

static_assert(philox(0, 0, 0, 0, 0) == PhiloxWords{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});

TEST(Philox, AgreesWithTheVectorsOfItsAuthors) {
  EXPECT_EQ(philox(~0u, ~0u, ~0u, ~0u, ~uint64_t{0}),
            (PhiloxWords{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
  EXPECT_EQ(philox(0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0x299f31d0a4093822u),
            (PhiloxWords{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}));
}

TEST(Philox, NaturalLogIsGoodToAnUlpOrTwo) {
  for (float x = 1e-10f; x < 30.0f; x *= 1.00037f) {
    const double expected = std::log(double(x));
    EXPECT_NEAR(natural_log(x), expected, 1.5e-7 * std::max(0.25, std::abs(expected))) << x;
  }
}

// In double precision, of the same v in single precision.
double exact_gumbel(uint32_t bits) {
  const float v = std::min(static_cast<float>((double(bits) + 0.5) * 0x1p-32), 0x1.fffffep-1f);
  return -std::log(-std::log1p(-double(v)));
}

TEST(Philox, GumbelNoiseIsFiniteForEveryWordAndMatchesItsFormula) {
  float largest = -INFINITY, smallest = INFINITY;
  for (const uint32_t bits : {0u, 1u, 2u, 255u, 256u, 65535u, 65536u, 0x7fffffffu, 0x80000000u, 0xfffffe00u,
                              0xffffff7fu, 0xffffff80u, 0xfffffffeu, 0xffffffffu}) {
    const float noise = gumbel(bits);
    ASSERT_TRUE(std::isfinite(noise)) << bits;
    EXPECT_NEAR(noise, exact_gumbel(bits), 2e-6) << bits;
    largest = std::max(largest, noise);
    smallest = std::min(smallest, noise);
  }
  EXPECT_NEAR(largest, 33 * std::log(2.0), 1e-4);
  EXPECT_NEAR(smallest, -std::log(24 * std::log(2.0)), 1e-4);
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 65521)
    ASSERT_NEAR(gumbel(static_cast<uint32_t>(bits)), exact_gumbel(static_cast<uint32_t>(bits)), 2e-6) << bits;
}

TEST(Philox, GumbelNoiseHasTheMeanAndVarianceOfItsDistribution) {
  double sum = 0, squares = 0;
  constexpr int n = 400000;
  for (uint32_t id = 0; id < n; ++id) {
    const double x = gumbel_of_token(7, 3, id);
    sum += x;
    squares += x * x;
  }
  const double mean = sum / n, variance = squares / n - mean * mean;
  EXPECT_NEAR(mean, 0.5772157, 4 * std::sqrt(1.645 / n));
  EXPECT_NEAR(variance, M_PI * M_PI / 6, 0.02);
}

TEST(Philox, SeedPositionAndTokenEachChangeTheNoise) {
  const float base = gumbel_of_token(1, 2, 3);
  EXPECT_EQ(base, gumbel_of_token(1, 2, 3));
  EXPECT_NE(base, gumbel_of_token(2, 2, 3));
  EXPECT_NE(base, gumbel_of_token(uint64_t{1} << 32 | 1, 2, 3));
  EXPECT_NE(base, gumbel_of_token(1, 3, 3));
  for (uint32_t id = 0; id < 12; ++id)
    if (id != 3) {
      EXPECT_NE(base, gumbel_of_token(1, 2, id));
    }
}

}  // namespace
}  // namespace hybrid
