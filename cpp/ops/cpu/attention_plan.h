// AttentionPlan: who computes what in one call of paged attention. Knows lengths and costs, never values: it decides on
// speed alone, and no choice it makes may change a bit of the result.
//
//   sequence   |---- cached ----|-- query rows --|      positions
//   chunk      |  512  |  512  |  512  | ..             each reduced on its own, then merged left to right
//   tile         one run of query rows: [row, row + tokens) x all heads of one KV head
//   span         the chunks [begin, end) of one tile: with a KV head, one piece of work for one thread
#pragma once

#include <cstdint>
#include <vector>

#include "ops/ops.h"

namespace hybrid::cpu {

constexpr int64_t attention_chunk =
    512;  // KV tokens whose sum is one partial result: fixed, so that rows are batch-invariant

struct QueryTile {
  int64_t row;       // first query row
  int64_t position;  // of that row
  int32_t tokens;    // query rows, one position each
  int32_t sequence;
  int64_t partial;  // where its partial results start, in rows of one KV head; -1: a single span, no partial results

  int64_t end() const { return position + tokens; }  // KV tokens that its last row sees
  int64_t chunks() const { return (end() + attention_chunk - 1) / attention_chunk; }
};

struct QuerySpan {
  int32_t tile;
  int32_t chunk_begin, chunk_end;
};

class AttentionPlan {
 public:
  // tile_tokens: query rows a tile may have. Reuses its memory from call to call.
  void build(const PagedAttention& a, int64_t tile_tokens, int threads);

  const std::vector<QueryTile>& tiles() const { return tiles_; }
  const std::vector<QuerySpan>& spans() const { return spans_; }
  const std::vector<int32_t>& split_tiles() const { return split_tiles_; }  // those with partial results
  int64_t partial_rows() const { return partial_rows_; }                    // of one KV head

 private:
  std::vector<QueryTile> tiles_;
  std::vector<QuerySpan> spans_;
  std::vector<int32_t> split_tiles_;
  int64_t partial_rows_ = 0;
};

}  // namespace hybrid::cpu
