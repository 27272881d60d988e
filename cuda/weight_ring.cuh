// A warp's way to read weights: rows of the weight in steps of one tile, piece by piece along its segment of k, through
// a ring in shared memory that cp.async fills ahead. No barrier but the warp's own.
//
// What is fetched at a time is one contiguous piece of each row, whole lines of memory. No kernel writes weights, so
// the ring fills before the wait for the previous kernel: in a chain of launches the memory never idles while small
// kernels run between two products.
#pragma once

#include "linear.cuh"
#include "reduce.cuh"

namespace hybrid::cuda {

// groups: of 8 rows of the weight in a warp's tile. piece: elements of k that a stage holds of each. depth: stages.
template <int groups_, int piece_, int depth_>
struct Ring {
  static constexpr int groups = groups_, piece = piece_, depth = depth_;
  static constexpr int rows = 8 * groups, packs = piece / 8, rows_at_once = warp_size / packs, spans = piece / 32;
  static constexpr int stage_packs = rows * packs;                   // 16-byte packs
  static constexpr size_t bytes = size_t{depth} * stage_packs * 16;  // of one warp
};

// Where pack `pack` of row `row` lies in rows of `packs` packs. Odd rows swap the halves of every 8: 8 lanes of a read,
// two rows of four packs, then hit 128 different bytes.
__device__ inline int swapped(int row, int pack, int packs) { return row * packs + (pack ^ (row % 2 * 4)); }

// Tiles first, first + step, ... below `count`. Gated: half a tile's rows are gate's, the others up's of those columns.
template <class T, class Ring, bool gated>
class WeightStream {
 public:
  static constexpr int width = gated ? Ring::rows / 2 : Ring::rows;  // columns of the output in a tile
  __device__ static int64_t tiles(const LinearParams<T>& p) { return ((gated ? p.n / 2 : p.n) + width - 1) / width; }

  __device__ WeightStream(const LinearParams<T>& p, uint4* ring, int segment, int64_t first, int64_t step,
                          int64_t count)
      : p_(p),
        ring_(ring),
        begin_(segment * p.segment),
        end_(min(p.k, begin_ + p.segment)),
        tile_(first),
        step_(step),
        count_(count) {
    pieces = begin_ < end_ ? static_cast<int>((end_ - begin_ + Ring::piece - 1) / Ring::piece) : 0;
#pragma unroll
    for (int i = 0; i < Ring::depth - 1; ++i) load_next();
  }

  // The next piece, when all lanes may read it; the one before is gone.
  __device__ const uint4* next_piece() {
    wait_copies<Ring::depth - 2>();
    __syncwarp();
    load_next();  // into the stage that all lanes left before they met
    const uint4* weight = ring_ + read_ * Ring::stage_packs;
    read_ = read_ == Ring::depth - 1 ? 0 : read_ + 1;
    return weight;
  }

  int pieces;  // of a tile

 private:
  __device__ int64_t row_of(int r) const {
    if constexpr (!gated) return tile_ * Ring::rows + r;
    const int64_t column = tile_ * width + r % width;
    return column >= p_.n / 2 ? p_.n : r < width ? column : p_.n / 2 + column;
  }
  __device__ void load_next() {
    if (tile_ < count_ && pieces > 0) {
      const int lane = threadIdx.x % warp_size, pack = lane % Ring::packs, first = lane / Ring::packs;
      const int64_t at = begin_ + piece_ * Ring::piece + pack * 8;
      const uint32_t to = shared_address(ring_ + write_ * Ring::stage_packs);
#pragma unroll
      for (int i = 0; i < Ring::rows; i += Ring::rows_at_once) {
        const int r = i + first;
        const int64_t row = row_of(r);
        const bool valid = at < end_ && row < p_.n;
        copy_async(to + swapped(r, pack, Ring::packs) * 16, p_.weight + (valid ? row * p_.k + at : 0), valid);
      }
      if (++piece_ == pieces) piece_ = 0, tile_ += step_;
    }
    commit_copies();
    write_ = write_ == Ring::depth - 1 ? 0 : write_ + 1;
  }

  const LinearParams<T>& p_;
  uint4* ring_;
  int64_t begin_, end_;
  int64_t tile_, step_, count_;  // of what is loaded next
  int piece_ = 0, write_ = 0, read_ = 0;
};

// Sum over the segments of output (row, c) of a tile, from partial[segment][row][column of the tile], stored at
// `column`.
template <class Ring, int padded_rows, bool gated, class T>
__device__ inline void store_sum(const LinearParams<T>& p, const float* partial, int row, int c, int64_t column) {
  const auto total = [&](int at) {
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < max_segments; ++s)
      if (s * p.segment < p.k) sum += partial[(s * padded_rows + row) * Ring::rows + at];
    return sum;
  };
  if constexpr (gated)
    store_gated(p, row, column, total(c), total(c + Ring::rows / 2));
  else
    store_output(p, row, column, total(c));
}

}  // namespace hybrid::cuda
