#include <gtest/gtest.h>

#include <cmath>

#include "ops/float8.h"

namespace hybrid {
namespace {

Float8 of_bits(int bits) {
  Float8 value;
  value.bits = static_cast<uint8_t>(bits);
  return value;
}

// By the definition of the format: bias 7, no infinities, NaN where all seven bits are ones.
double value_of(int bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double sign = bits & 0x80 ? -1.0 : 1.0;
  if ((bits & 0x7f) == 0x7f) return NAN;
  return sign * (exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(mantissa + 8, exponent - 10));
}

TEST(Float8, reads_every_pattern_and_writes_it_back) {
  for (int bits = 0; bits < 256; ++bits) {
    const float read = static_cast<float>(of_bits(bits));
    if (std::isnan(value_of(bits))) {
      EXPECT_TRUE(std::isnan(read) && std::isnan(static_cast<float>(Float8(read)))) << bits;
      continue;
    }
    EXPECT_EQ(read, value_of(bits)) << bits;
    EXPECT_EQ(std::signbit(read), bits > 127) << bits;
    EXPECT_EQ(Float8(read).bits, bits);
  }
}

TEST(Float8, rounds_to_nearest_even) {
  for (int bits = 0; bits < 0x7e; ++bits) {
    const auto middle = static_cast<float>((value_of(bits) + value_of(bits + 1)) / 2.0);
    EXPECT_EQ(Float8(middle).bits, bits + bits % 2) << bits;
    EXPECT_EQ(Float8(std::nextafter(middle, 0.0f)).bits, bits) << bits;
    EXPECT_EQ(Float8(std::nextafter(middle, INFINITY)).bits, bits + 1) << bits;
    EXPECT_EQ(Float8(-middle).bits, 0x80 | (bits + bits % 2)) << bits;
  }
}

TEST(Float8, stops_at_448) {
  for (const float x : {448.0f, 463.0f, 480.0f, 1e30f, INFINITY}) {
    EXPECT_EQ(static_cast<float>(Float8(x)), Float8::largest) << x;
    EXPECT_EQ(static_cast<float>(Float8(-x)), -Float8::largest) << x;
  }
}

}  // namespace
}  // namespace hybrid
