#include "core/config.h"

#include <algorithm>
#include <limits>

#include "common/check.h"

namespace hybrid {

namespace {

void in_range(const char* field, int64_t value, int64_t low, int64_t high) {
  require(low <= value && value <= high, field, " is ", value, ", must be in [", low, ", ", high, "]");
}

void sizes(const char* field, const std::vector<int64_t>& values, int64_t largest) {
  for (size_t i = 0; i < values.size(); ++i)
    require(values[i] > (i > 0 ? values[i - 1] : 0) && values[i] <= largest, field, " holds ", values[i],
            ", must ascend from 1 to at most ", largest);
}

}  // namespace

int64_t Config::max_blocks_per_seq() const { return std::min(blocks_for(max_model_len), num_blocks); }

void Config::validate() {
  // Positions, rows and block numbers are i32 in the batch; the limits keep every sum of them below 2^31.
  constexpr int64_t i32_max = std::numeric_limits<int32_t>::max();
  in_range("num_blocks", num_blocks, 1, i32_max - 1);
  in_range("block_size", block_size, 1, 1 << 16);
  in_range("max_num_seqs", max_num_seqs, 1, 1 << 16);
  in_range("max_num_batched_tokens", max_num_batched_tokens, 1, 1 << 24);
  in_range("max_model_len", max_model_len, 2, i32_max - 1);
  in_range("vocab_size", vocab_size, 1, 1 << 28);
  in_range("num_clients", num_clients, 1, 1 << 16);
  in_range("depth", depth, 1, 2);
  in_range("num_host_blocks", num_host_blocks, 0, i32_max - 1);
  in_range("swap_cost", swap_cost, 0, 1 << 24);
  if (max_adjustments == 0) max_adjustments = 4 * vocab_size;
  in_range("max_adjustments", max_adjustments, 1, i32_max);
  sizes("decode_sizes", decode_sizes, max_num_seqs);
  sizes("mixed_seq_sizes", mixed_seq_sizes, max_num_seqs);
  sizes("mixed_token_sizes", mixed_token_sizes, max_num_batched_tokens);
  require(max_num_batched_tokens >= max_num_seqs, "max_num_batched_tokens is ", max_num_batched_tokens,
          ", must be at least max_num_seqs, ", max_num_seqs, ": every running request needs a token a step");
  require(pool_tokens() >= 2, "num_blocks x block_size is ", num_blocks, " x ", block_size,
          ", must hold at least 2 tokens");
  require(max_num_seqs * max_blocks_per_seq() <= i32_max, "max_num_seqs ", max_num_seqs, " x ", max_blocks_per_seq(),
          " blocks a sequence (max_model_len ", max_model_len, ", block_size ", block_size, ") is more than ", i32_max);
}

}  // namespace hybrid
