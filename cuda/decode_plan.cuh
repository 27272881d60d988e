// The plan of a step's decode attention: plan_decode writes it once, paged_decode of every layer reads it.
//
// Sequences are cut into units. A position is head * units + unit, for all (KV head, 16 query heads) and all units of
// the step; block b of a layer's launch works on positions [begin[b], begin[b + 1]), all of about as many tiles. Plan in
// memory: header, starts of the blocks, units.
#pragma once

#include "device.cuh"
#include "launch.cuh"
#include "ops/ops.h"

namespace hybrid::cuda {

constexpr int tile = 16, most_rows = 16;  // KV tokens and query heads of one product
constexpr int shortest_unit = 128;        // tokens
constexpr int most_units = 64;            // of a sequence

// Of a sequence of this many tokens. Nothing else may decide it: how a row's sum is cut decides its bits.
__host__ __device__ constexpr int unit_length(int tokens) {
  int64_t length = shortest_unit;
  while (length * most_units < tokens) length *= 2;
  return static_cast<int>(length);
}

struct alignas(16) DecodeUnit {
  int32_t row;  // of q and out
  int32_t kv_start, tokens;  // of the sequence
  int32_t index;             // among its units
};

// `origin`: the block that has the first unit of the sequence and head that position `begin` belongs to.
struct alignas(8) BlockStart {
  int32_t begin, origin;
};

// What decode_plan_size() counts: 1024 numbers and 256 a sequence.
struct PlanView {
  static constexpr int header = 4, fixed = 1024, most_blocks = (fixed - header) / 2 - 1;
  int32_t* units;  // how many there are
  BlockStart* starts;
  DecodeUnit* unit;

  __host__ __device__ explicit PlanView(int32_t* data)
      : units(data),
        starts(reinterpret_cast<BlockStart*>(data + header)),
        unit(reinterpret_cast<DecodeUnit*>(data + fixed)) {}
};

struct DecodeColumns {
  const int32_t* query_start;
  const int32_t* seq_lens;
  const int32_t* kv_start;
  const int64_t* num_decodes;
  int seqs, places;  // places: (KV head, 16 query heads) of a sequence
};
void launch_plan_decode(int32_t* plan, const DecodeColumns& columns, Stream stream);

inline int decode_places(int64_t heads, int64_t kv_heads) {
  return static_cast<int>(kv_heads * ceil_div(heads / kv_heads, most_rows));
}
// Blocks of every layer's launch.
inline int64_t decode_blocks() { return std::min<int64_t>(2 * multiprocessors(), PlanView::most_blocks); }

}  // namespace hybrid::cuda
