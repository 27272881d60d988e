// linear on AMX tiles: 16 or 32 rows of x times one panel of 32 outputs.
//
// Every row count goes this way, one row included: TDPBF16PS adds even and odd k apart before they meet, so another
// path would give a row other bits in another batch.
#pragma once

#include "ops/cpu/packed.h"
#include "ops/cpu/vec.h"

namespace hybrid::cpu::HYBRID_ISA {

struct AmxTile {
  using X = BFloat16;
  static constexpr int tile_rows = 16;
  static constexpr int64_t tile_steps = 16;  // pairs of k in a tile
  static constexpr int max_rows = 2 * tile_rows, row_step = tile_rows;
  static constexpr int64_t group = 2, k_step = group * tile_steps;

  // The tile registers are configured while a thread works on a call; released, they cost nothing at a context switch.
  struct Session {
    Session() {
      struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes_per_row[16] = {};
        uint8_t rows[16] = {};
      } config;
      for (int tile = 0; tile < 8; ++tile) config.bytes_per_row[tile] = 64, config.rows[tile] = tile_rows;
      // GCC 12 declares 8 bytes of the operand as read and would drop the other stores.
      __asm__ volatile("" : : "r"(&config) : "memory");
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  // Tiles 0-3: sums of (rows 0-15, 16-31) x (outputs 0-15, 16-31); 4, 5: x; 6, 7: weights.
  static void run(int rows, const BFloat16* x, int64_t x_stride, const BFloat16* w, int64_t steps, float* acc,
                  bool resume) {
    constexpr int64_t acc_stride = panel_columns * static_cast<int64_t>(sizeof(float)), w_stride = panel_columns * 4;
    const int64_t x_bytes = x_stride * static_cast<int64_t>(sizeof(BFloat16));
    float* low = acc + tile_rows * panel_columns;
    const BFloat16* low_x = x + tile_rows * x_stride;
    const bool two = rows > tile_rows;
    if (resume) {
      _tile_loadd(0, acc, acc_stride);
      _tile_loadd(1, acc + 16, acc_stride);
      if (two) _tile_loadd(2, low, acc_stride);
      if (two) _tile_loadd(3, low + 16, acc_stride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step += tile_steps, w += tile_steps * panel_columns * group) {
      for (int line = 0; line < 32; ++line) __builtin_prefetch(reinterpret_cast<const char*>(w) + 4096 + line * 64);
      _tile_loadd(6, w, w_stride);
      _tile_loadd(7, w + panel_columns, w_stride);
      _tile_loadd(4, x + step * group, x_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (!two) continue;
      _tile_loadd(5, low_x + step * group, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, acc, acc_stride);
    _tile_stored(1, acc + 16, acc_stride);
    if (two) _tile_stored(2, low, acc_stride);
    if (two) _tile_stored(3, low + 16, acc_stride);
  }
};

}  // namespace hybrid::cpu::HYBRID_ISA
