// SipHash-2-4 with 128 bits of output (Aumasson and Bernstein): a keyed hash, so that nobody outside can craft two
// prompts whose blocks collide. Knows words and bytes, not tokens.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <span>

namespace hybrid {

struct Hash128 {
  uint64_t lo = 0, hi = 0;
  bool operator==(const Hash128&) const = default;
};

class SipHash128 {
 public:
  using Key = std::array<uint8_t, 16>;

  explicit SipHash128(const Key& key) {
    const uint64_t k0 = load(key.data()), k1 = load(key.data() + 8);
    v0_ = k0 ^ 0x736f6d6570736575;
    v1_ = k1 ^ 0x646f72616e646f6d ^ 0xee;
    v2_ = k0 ^ 0x6c7967656e657261;
    v3_ = k1 ^ 0x7465646279746573;
  }

  void word(uint64_t m) {
    v3_ ^= m;
    rounds(2);
    v0_ ^= m;
    length_ += 8;
  }

  // Ends the message with any number of bytes.
  Hash128 finish(std::span<const uint8_t> bytes) {
    while (bytes.size() >= 8) {
      word(load(bytes.data()));
      bytes = bytes.subspan(8);
    }
    uint64_t last = static_cast<uint64_t>(length_ + bytes.size()) << 56;
    for (size_t i = 0; i < bytes.size(); ++i) last |= static_cast<uint64_t>(bytes[i]) << (8 * i);
    word(last);
    Hash128 hash;
    v2_ ^= 0xee;
    rounds(4);
    hash.lo = v0_ ^ v1_ ^ v2_ ^ v3_;
    v1_ ^= 0xdd;
    rounds(4);
    hash.hi = v0_ ^ v1_ ^ v2_ ^ v3_;
    return hash;
  }

 private:
  static uint64_t load(const uint8_t* bytes) {
    static_assert(std::endian::native == std::endian::little);
    uint64_t m;
    std::memcpy(&m, bytes, sizeof m);
    return m;
  }

  void rounds(int n) {
    for (int i = 0; i < n; ++i) {
      v0_ += v1_;
      v2_ += v3_;
      v1_ = std::rotl(v1_, 13) ^ v0_;
      v3_ = std::rotl(v3_, 16) ^ v2_;
      v0_ = std::rotl(v0_, 32);
      v2_ += v1_;
      v0_ += v3_;
      v1_ = std::rotl(v1_, 17) ^ v2_;
      v3_ = std::rotl(v3_, 21) ^ v0_;
      v2_ = std::rotl(v2_, 32);
    }
  }

  uint64_t v0_, v1_, v2_, v3_;
  size_t length_ = 0;
};

}  // namespace hybrid
