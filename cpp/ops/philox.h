// Philox4x32-10 (Salmon et al., SC 2011) and the Gumbel noise that sampling makes of it. Plain constexpr C++, the same
// bits on every device: no fused multiply-add, no library function.
//
// The noise of a token is a function of (seed, position, token id) alone: key = seed, counter = (id / 4, position, 0,
// 0), output word id % 4. Any subset of tokens can thus be drawn from in any order, on any machine, with the same
// outcome.
//
// always_inline: kernels are compiled for several instruction sets, and a shared inline function would be linked from
// any.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

namespace hybrid {

using PhiloxWords = std::array<uint32_t, 4>;

[[gnu::always_inline]] constexpr PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// log of a positive, normal x, to about 1 ulp. Cephes' logf polynomial.
[[gnu::always_inline]] constexpr float natural_log(float x) {
  // x = 2^e * m, m in [sqrt(1/2), sqrt(2))
  const uint32_t bits = std::bit_cast<uint32_t>(x) - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float m = std::bit_cast<float>((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * m + -1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m + -1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m + -1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m + -2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float square = m * m;
  return (m + ((p * m * square + e * -2.12194440e-4f) - 0.5f * square)) + e * 0.693359375f;
}

// -log(-log(1 - v)) with v uniform in [2^-33, 1 - 2^-24]: v keeps its 32 bits near 0, where the large noise comes from.
[[gnu::always_inline]] constexpr float gumbel(uint32_t bits) {
  constexpr uint32_t below_one = std::bit_cast<uint32_t>(0x1.fffffep-1f);
  // Two exact halves: integer to float conversion is signed in most instruction sets.
  const float high = static_cast<float>(static_cast<int32_t>(bits >> 16)) * 0x1p-16f;
  const float low = (static_cast<float>(static_cast<int32_t>(bits & 0xffffu)) + 0.5f) * 0x1p-32f;
  // Not to reach 1: the smaller of two positive floats is the smaller of their bits, which compilers make vectors of.
  const uint32_t sum = std::bit_cast<uint32_t>(high + low);
  const float v = std::bit_cast<float>(sum < below_one ? sum : below_one);
  // log(1 - v), with the bits that 1 - v rounded off put back to first order.
  const float u = 1.0f - v;
  const float exponential = -(natural_log(u) + ((1.0f - u) - v) / u);
  return -natural_log(exponential);
}

[[gnu::always_inline]] constexpr float gumbel_of_token(uint64_t seed, uint32_t position, uint32_t id) {
  const PhiloxWords words = philox(id / 4, position, 0, 0, seed);
  const uint32_t low = (id & 1u) != 0 ? words[1] : words[0], high = (id & 1u) != 0 ? words[3] : words[2];
  return gumbel((id & 2u) != 0 ? high : low);
}

}  // namespace hybrid
