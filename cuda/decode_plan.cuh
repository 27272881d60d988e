// The plan of a step's decode attention: plan_decode writes it once, paged_decode of every layer reads it.
//
// Sequences are cut into units. A position is head * units + unit, for all (KV head, 16 query heads) and all units of
// the step; block b of a layer's launch works on positions [begin[b], begin[b + 1]), all of about as many tiles.
//
// Where decodes begin with the same blocks, these are no part of their units. Another kernel, paged_prefixes, reads
// them once for all: shares of its work are so many rows (a query head of a decode each) over so many tokens, and what
// a row of a share sums to is kept for the row's first unit to be merged with.
//
// Plan in memory: header, starts of the blocks, shares of prefixes, units.
#pragma once

#include "device.cuh"
#include "launch.cuh"
#include "ops/ops.h"

namespace hybrid::cuda {

constexpr int tile = 16, most_rows = 16;  // KV tokens and query heads of one product, at most
constexpr int most_units = 32;            // of a sequence

// 2^this many tokens are a unit of a sequence of this many. Nothing else may decide it: how a row's sum is cut decides
// its bits. Measured: to merge units costs more than to cut less than 512 tokens gains.
__device__ constexpr int unit_log2(int tokens) {
  if (tokens <= 512) return 9;
  int log2 = 8;
  while ((int64_t{most_units} << log2) < tokens) ++log2;
  return log2;
}

struct alignas(16) DecodeUnit {
  int32_t row;               // of q and out
  int32_t kv_start, tokens;  // of the sequence
  int32_t packed;            // index among its units, how many these are, 2^how many tokens they have, and parts(); 8
                             // bits each

  __device__ int index() const { return packed & 255; }
  __device__ int units() const { return packed >> 8 & 255; }
  __device__ int log2() const { return packed >> 16 & 255; }
  __device__ int parts() const { return packed >> 24; }       // partial results of the tokens ahead of the first unit
  __device__ int first() const { return index() << log2(); }  // token
  __device__ int end() const { return min(int64_t{index() + 1} << log2(), int64_t{tokens}); }  // behind its last token
};

// `origin`: the block that has the first unit of the sequence and head that position `begin` belongs to.
struct alignas(8) BlockStart {
  int32_t begin, origin;
};

// Decodes of a step in which some share beginnings, and shares of these, at most; also partial results of a head.
constexpr int most_sharers = 1024;

// Packed rows [row0, ...) of `rows` from query row `first_row` on, over `tokens` tokens of the cache.
struct alignas(16) PrefixShare {
  int32_t first_row, row0, rows, kv_start;
  int32_t tokens, part, unused[2];  // part: see Prefixes
};
// A partial result: sums of all query heads, then of each the largest score and the sum of weights.
__host__ __device__ constexpr int64_t part_floats(int64_t heads, int64_t dim) {
  return heads * dim + (heads + 1) / 2 * 4;
}

// What decode_plan_size() counts: 9216 numbers and 128 a sequence.
struct PlanView {
  static constexpr int header = 4, blocks_end = 1024, fixed = blocks_end + most_sharers * 8,
                       most_blocks = (blocks_end - header) / 2 - 1;
  // How many units and shares of prefixes there are, and partial results there may be of a query row: row r has those
  // from r * row_parts on.
  int32_t *units, *prefix_shares, *row_parts;
  BlockStart* starts;
  PrefixShare* prefix_share;
  DecodeUnit* unit;

  __host__ __device__ explicit PlanView(int32_t* data)
      : units(data),
        prefix_shares(data + 1),
        row_parts(data + 2),
        starts(reinterpret_cast<BlockStart*>(data + header)),
        prefix_share(reinterpret_cast<PrefixShare*>(data + blocks_end)),
        unit(reinterpret_cast<DecodeUnit*>(data + fixed)) {}
};

struct DecodeColumns {
  const int32_t* query_start;
  const int32_t* seq_lens;
  const int32_t* kv_start;
  const int64_t* num_decodes;
  int seqs, places, blocks;  // places: (KV head, 16 query heads) of a sequence; blocks: of a layer's launch
  // Groups of decodes with the same beginning; null: none.
  const int32_t* prefix_start;
  const int32_t* prefix_lens;
  const int64_t* num_prefixes;
  int block_shift, group, kv_heads;          // group: query heads of a KV head
  int share_rows, granule, multiprocessors;  // shares have this many rows, and a multiple of `granule` tokens
};
void launch_plan_decode(int32_t* plan, const DecodeColumns& columns, Stream stream);

inline int decode_places(int64_t heads, int64_t kv_heads) {
  return static_cast<int>(kv_heads * ceil_div(heads / kv_heads, most_rows));
}
// Blocks of every layer's launch: all at work at once.
constexpr int decode_blocks_per_multiprocessor(int64_t head_dim) { return head_dim <= 128 ? 2 : 1; }
inline int64_t decode_blocks(int64_t head_dim) {
  return std::min<int64_t>(decode_blocks_per_multiprocessor(head_dim) * multiprocessors(), PlanView::most_blocks);
}

}  // namespace hybrid::cuda
