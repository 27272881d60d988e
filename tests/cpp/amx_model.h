// The AMX instructions that linear uses, in plain C++ after Intel's definition of them, so that the kernel is tested on
// machines without them. Include before the kernel, in place of <immintrin.h>.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ops/float16.h"

namespace hybrid::amx_model {

struct Tiles {
  bool configured = false;
  int rows[8] = {}, row_bytes[8] = {};
  unsigned char data[8][16][64] = {};
};
inline thread_local Tiles tiles;

inline void load_config(const void* memory) {
  unsigned char config[64];
  std::memcpy(config, memory, sizeof config);
  ASSERT_EQ(config[0], 1) << "palette";
  for (int i = 1; i < 16; ++i) ASSERT_EQ(config[i], 0) << "start row or reserved byte " << i;
  for (int tile = 0; tile < 8; ++tile) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, config + 16 + 2 * tile, sizeof row_bytes);
    tiles.row_bytes[tile] = row_bytes;
    tiles.rows[tile] = config[48 + tile];
    ASSERT_TRUE(row_bytes <= 64 && tiles.rows[tile] <= 16) << "tile " << tile;
  }
  for (int i = 32; i < 48; ++i) ASSERT_EQ(config[i], 0) << "tiles that do not exist";
  for (int i = 56; i < 64; ++i) ASSERT_EQ(config[i], 0) << "tiles that do not exist";
  std::memset(tiles.data, 0, sizeof tiles.data);
  tiles.configured = true;
}

inline void release() { tiles.configured = false; }

inline void zero(int tile) {
  ASSERT_TRUE(tiles.configured);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

inline void load(int tile, const void* base, int64_t stride) {
  ASSERT_TRUE(tiles.configured);
  zero(tile);
  for (int row = 0; row < tiles.rows[tile]; ++row)
    std::memcpy(tiles.data[tile][row], static_cast<const char*>(base) + row * stride,
                static_cast<size_t>(tiles.row_bytes[tile]));
}

inline void store(int tile, void* base, int64_t stride) {
  ASSERT_TRUE(tiles.configured);
  for (int row = 0; row < tiles.rows[tile]; ++row)
    std::memcpy(static_cast<char*>(base) + row * stride, tiles.data[tile][row],
                static_cast<size_t>(tiles.row_bytes[tile]));
}

inline float bf16_at(int tile, int row, int column) {
  BFloat16 value;
  std::memcpy(&value, &tiles.data[tile][row][2 * column], sizeof value);
  return static_cast<float>(value);
}

// Even and odd products add up apart, then meet.
inline void dot_bf16(int sum, int a, int b) {
  ASSERT_TRUE(tiles.configured);
  ASSERT_TRUE(tiles.rows[sum] == tiles.rows[a] && tiles.row_bytes[sum] == tiles.row_bytes[b]);
  ASSERT_EQ(tiles.row_bytes[a] / 4, tiles.rows[b]);
  for (int row = 0; row < tiles.rows[sum]; ++row)
    for (int column = 0; column < tiles.row_bytes[sum] / 4; ++column) {
      float even = 0.0f, odd = 0.0f, total;
      for (int k = 0; k < tiles.rows[b]; ++k) {
        even = std::fma(bf16_at(a, row, 2 * k), bf16_at(b, k, 2 * column), even);
        odd = std::fma(bf16_at(a, row, 2 * k + 1), bf16_at(b, k, 2 * column + 1), odd);
      }
      std::memcpy(&total, &tiles.data[sum][row][4 * column], sizeof total);
      total += even + odd;
      std::memcpy(&tiles.data[sum][row][4 * column], &total, sizeof total);
    }
}

}  // namespace hybrid::amx_model

#define __AMX_BF16__ 1
#define _tile_loadconfig hybrid::amx_model::load_config
#define _tile_release hybrid::amx_model::release
#define _tile_zero hybrid::amx_model::zero
#define _tile_loadd hybrid::amx_model::load
#define _tile_stored hybrid::amx_model::store
#define _tile_dpbf16ps hybrid::amx_model::dot_bf16
