// Float8: E4M3 as a storage type of the KV cache: sign, 4 bits of exponent, 3 of mantissa, no infinities. Conversion
// from float rounds to nearest even and stops at +-448; NaN stays NaN.
#pragma once

#include <bit>
#include <cstdint>

namespace hybrid {

struct Float8 {
  static constexpr float largest = 448.0f;
  uint8_t bits = 0;
  Float8() = default;
  explicit Float8(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x), magnitude = u & 0x7fffffffu;
    const auto sign = static_cast<uint8_t>(u >> 24 & 0x80u);
    if (magnitude > 0x7f800000u) {
      bits = 0x7f;  // NaN
    } else if (magnitude >= 0x43e00000u) {
      bits = sign | 0x7e;  // 448 and more
    } else if (magnitude < 0x3c800000u) {
      // Subnormal, below 2^-6: beside 2^14 the float's own rounding keeps multiples of 2^-9.
      const float shifted = std::bit_cast<float>(magnitude) + 0x1p14f;
      bits = static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(shifted) & 0xfu));
    } else {
      const uint32_t odd = magnitude >> 20 & 1u;
      bits = static_cast<uint8_t>(sign | ((magnitude - 0x3c000000u + 0x7ffffu + odd) >> 20));
    }
  }
  explicit operator float() const {
    const uint32_t sign = (bits & 0x80u) << 24, exponent = bits >> 3 & 0xfu, mantissa = bits & 7u;
    if ((bits & 0x7fu) == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
    if (exponent == 0) {
      const float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
      return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
    }
    return std::bit_cast<float>(sign | ((exponent + 120u) << 23) | (mantissa << 20));
  }
};

static_assert(sizeof(Float8) == 1);

}  // namespace hybrid
