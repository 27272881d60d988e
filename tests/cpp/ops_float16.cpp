#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "ops/float16.h"

namespace hybrid {
namespace {

// The value that `exponent_bits` and `mantissa_bits` give a bit pattern, by the definition of the format.
double value_of(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

template <class T>
T of_bits(int bits) {
  T value;
  value.bits = static_cast<uint16_t>(bits);
  return value;
}

template <class T>
void expect_every_pattern_reads_right_and_comes_back(int exponent_bits, int mantissa_bits) {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const float read = static_cast<float>(of_bits<T>(bits));
    const double expected = value_of(static_cast<uint16_t>(bits), exponent_bits, mantissa_bits);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(read) && std::isnan(static_cast<float>(T(read)))) << bits;
      continue;
    }
    ASSERT_EQ(read, expected) << bits;
    ASSERT_EQ(std::signbit(read), std::signbit(expected)) << bits;
    ASSERT_EQ(T(read).bits, bits);
  }
}

// Between two neighbours, the middle goes to the even one and everything else to the nearer one.
template <class T>
void expect_ties_to_even(int infinity) {
  for (int bits = 0; bits < infinity - 1; ++bits) {
    const float low = static_cast<float>(of_bits<T>(bits)), high = static_cast<float>(of_bits<T>(bits + 1));
    const auto middle = static_cast<float>((double{low} + high) / 2.0);
    if (double{middle} != (double{low} + high) / 2.0) continue;  // not a float: below the smallest bf16 numbers
    ASSERT_EQ(T(middle).bits, bits + bits % 2) << bits;
    ASSERT_EQ(T(std::nextafter(middle, 0.0f)).bits, bits) << bits;
    ASSERT_EQ(T(std::nextafter(middle, INFINITY)).bits, bits + 1) << bits;
    ASSERT_EQ(T(-middle).bits, 0x8000 | (bits + bits % 2)) << bits;
  }
}

TEST(BFloat16, reads_every_pattern_and_writes_it_back) {
  expect_every_pattern_reads_right_and_comes_back<BFloat16>(8, 7);
}
TEST(Float16, reads_every_pattern_and_writes_it_back) {
  expect_every_pattern_reads_right_and_comes_back<Float16>(5, 10);
}
TEST(BFloat16, rounds_to_nearest_even) { expect_ties_to_even<BFloat16>(0x7f80); }
TEST(Float16, rounds_to_nearest_even) { expect_ties_to_even<Float16>(0x7c00); }

TEST(Float16, overflows_to_infinity_from_65520_on) {
  EXPECT_EQ(Float16(65519.996f).bits, 0x7bff);
  EXPECT_EQ(Float16(65520.0f).bits, 0x7c00);
  EXPECT_EQ(Float16(-1e30f).bits, 0xfc00);
  EXPECT_EQ(Float16(-INFINITY).bits, 0xfc00);
}

TEST(BFloat16, overflows_to_infinity_past_its_largest_number) {
  const float largest = static_cast<float>(of_bits<BFloat16>(0x7f7f));
  EXPECT_EQ(BFloat16(std::nextafter(std::ldexp(511.0f, 119), 0.0f)).bits, 0x7f7f) << largest;
  EXPECT_EQ(BFloat16(std::numeric_limits<float>::max()).bits, 0x7f80);
}

TEST(BFloat16, keeps_nan_when_its_payload_is_cut_off) {
  EXPECT_TRUE(std::isnan(static_cast<float>(BFloat16(std::bit_cast<float>(0x7f800001u)))));
  EXPECT_TRUE(std::isnan(static_cast<float>(BFloat16(std::bit_cast<float>(0xffffffffu)))));
}

}  // namespace
}  // namespace hybrid
