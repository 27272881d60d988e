// The plan of a step's decode attention: plan_decode writes it once, paged_decode of every layer reads it.
//
// Sequences are cut into units. A position is head * units + unit, for all (KV head, 16 query heads) and all units of
// the step; block b of a layer's launch works on positions [begin[b], begin[b + 1]), all of about as many tiles. Plan
// in memory: header, starts of the blocks, units.
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
  int32_t packed;            // index among its units, how many these are, and 2^how many tokens they have; 8 bits each

  __device__ int index() const { return packed & 255; }
  __device__ int units() const { return packed >> 8 & 255; }
  __device__ int log2() const { return packed >> 16; }
  __device__ int first() const { return index() << log2(); }                                   // token
  __device__ int end() const { return min(int64_t{index() + 1} << log2(), int64_t{tokens}); }  // behind its last token
};

// `origin`: the block that has the first unit of the sequence and head that position `begin` belongs to.
struct alignas(8) BlockStart {
  int32_t begin, origin;
};

// What decode_plan_size() counts: 1024 numbers and 128 a sequence.
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
  int seqs, places, blocks;  // places: (KV head, 16 query heads) of a sequence; blocks: of a layer's launch
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
