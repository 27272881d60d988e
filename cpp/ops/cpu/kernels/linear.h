// x @ weight^T over a packed weight: cuts the work into pieces for the cores and the caches, and stores the results.
//
//   piece = (panel of 32 outputs) x (block of 96 rows), handed out panel by panel so that a core streams its weights
//   once; inside, k in blocks of 1024 (x block and panel stay in L2), then tiles of rows that fit in the registers.
#pragma once

#include <type_traits>

#include "ops/cpu/kernels/linear_tiles.h"
#include "ops/cpu/packed.h"
#include "ops/cpu/scratch.h"
#include "ops/cpu/thread_pool.h"
#include "ops/cpu/vec.h"
#include "ops/dispatch.h"
#include "ops/ops.h"
#if defined(__AMX_BF16__)
#include "ops/cpu/kernels/linear_amx.h"
#endif

namespace hybrid::cpu::HYBRID_ISA {

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <class X>
struct PreparedRows {
  const X* data;
  int64_t stride;
};

template <class X, class T>
void copy_row(X* out, const T* x, int64_t k) {
  if constexpr (std::is_same_v<X, T>) {
    std::memcpy(out, x, static_cast<size_t>(k) * sizeof(T));
  } else {
    int64_t i = 0;
    for (; i + F32::width <= k; i += F32::width) F32::load(x + i).store(out + i);
    if (const int tail = static_cast<int>(k - i); tail > 0) F32::load(x + i, tail).store(out + i, tail);
  }
}

// x as the tiles want it: in place if it already is, else converted and zero-padded in scratch memory.
template <class Tile, class T>
PreparedRows<typename Tile::X> prepare_rows(const Linear& args) {
  using X = typename Tile::X;
  const int64_t rows = args.x.shape[0], k = args.k;
  if constexpr (std::is_same_v<X, T> && Tile::row_step == 1)
    if (k % Tile::k_step == 0) return {args.x.as<T>(), args.x.strides[0]};
  const int64_t stride = round_up(k, Tile::k_step), padded_rows = round_up(rows, Tile::row_step);
  X* data = static_cast<X*>(scratch(padded_rows * stride * static_cast<int64_t>(sizeof(X))));
  pool().parallel_for(padded_rows, rows_per_piece(stride), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t filled = row < rows ? k : 0;
      if (filled > 0) copy_row(data + row * stride, args.x.as<T>() + row * args.x.strides[0], k);
      std::memset(static_cast<void*>(data + row * stride + filled), 0,
                  static_cast<size_t>(stride - filled) * sizeof(X));
    }
  });
  return {data, stride};
}

template <class Out, class T>
void store_row(Out* out, const float* acc, const T* bias, int64_t columns) {
  for (int64_t i = 0; i < columns; i += F32::width) {
    F32 value = F32::load(acc + i);
    if (columns - i >= F32::width) {
      if (bias != nullptr) value = value + F32::load(bias + i);
      value.store(out + i);
    } else {
      const int tail = static_cast<int>(columns - i);
      if (bias != nullptr) value = value + F32::load(bias + i, tail);
      value.store(out + i, tail);
    }
  }
}

constexpr int64_t rows_per_block = 96, k_per_block = 1024;

template <class Tile, class T>
void linear_piece(const Linear& args, const PreparedRows<typename Tile::X>& x, int64_t panel, int64_t first_row) {
  alignas(64) float acc[rows_per_block * panel_columns];
  const int64_t rows = std::min(rows_per_block, args.x.shape[0] - first_row);
  const int64_t tiles = (rows + Tile::max_rows - 1) / Tile::max_rows;
  const int64_t rows_per_tile = round_up((rows + tiles - 1) / tiles, Tile::row_step);
  const int64_t k = round_up(args.k, Tile::k_step);
  const T* weight = args.weight.as<T>() + panel * panel_columns * padded_k(args.k);
  for (int64_t k_begin = 0; k_begin < k; k_begin += k_per_block) {
    const int64_t steps = std::min(k_per_block, k - k_begin) / Tile::group;
    for (int64_t row = 0; row < rows; row += rows_per_tile)
      Tile::run(static_cast<int>(std::min(rows_per_tile, rows - row)), x.data + (first_row + row) * x.stride + k_begin,
                x.stride, weight + k_begin * panel_columns, steps, acc + row * panel_columns, k_begin > 0);
  }
  const int64_t column = panel * panel_columns, columns = std::min(panel_columns, args.n - column);
  const T* bias = args.bias.defined() ? args.bias.as<T>() + column : nullptr;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = (first_row + row) * args.out.strides[0] + column;
    if (args.out.dtype == DType::f32)
      store_row(args.out.as<float>() + at, acc + row * panel_columns, bias, columns);
    else
      store_row(args.out.as<T>() + at, acc + row * panel_columns, bias, columns);
  }
}

// Pieces that a core takes at once: enough of them to even out the cores, few enough to stream, and all of them if the
// whole call is shorter than waking a worker.
inline int64_t pieces_at_once(const Linear& args, int64_t pieces) {
  if (args.x.shape[0] * args.n * args.k < int64_t{1} << 16) return pieces;
  return std::clamp<int64_t>(pieces / (int64_t{4} * pool().size()), 1, 16);
}

template <class Tile, class T>
void linear_by(const Linear& args) {
  const PreparedRows<typename Tile::X> x = prepare_rows<Tile, T>(args);
  const int64_t blocks = (args.x.shape[0] + rows_per_block - 1) / rows_per_block;
  const int64_t pieces = (args.n + panel_columns - 1) / panel_columns * blocks;
  pool().parallel_for(pieces, pieces_at_once(args, pieces), [&](int64_t begin, int64_t end) {
    const typename Tile::Session session;
    for (int64_t piece = begin; piece < end; ++piece)
      linear_piece<Tile, T>(args, x, piece / blocks, piece % blocks * rows_per_block);
  });
}

template <class T>
struct TileOf {
  using type = FmaTile<T>;
};
#if defined(__AMX_BF16__)
template <>
struct TileOf<BFloat16> {
  using type = AmxTile;
};
#elif defined(__AVX512BF16__)
template <>
struct TileOf<BFloat16> {
  using type = DotTile;
};
#endif

inline void linear(const Linear& args) {
  by_dtype(args.x.dtype, [&]<class T>() { linear_by<typename TileOf<T>::type, T>(args); });
}

}  // namespace hybrid::cpu::HYBRID_ISA
