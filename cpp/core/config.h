// Config: the capacities that the core is built for. Plain numbers; knows no model, device or memory size.
#pragma once

#include <cstdint>
#include <vector>

#include "common/siphash.h"

namespace hybrid {

struct Config {
  int64_t num_blocks = 0;
  int64_t block_size = 0;  // tokens
  int64_t max_num_seqs = 0;
  int64_t max_num_batched_tokens = 0;  // token budget of a step
  int64_t max_model_len = 0;           // prompt + output tokens
  int64_t vocab_size = 0;
  int64_t num_clients = 1;
  int64_t depth = 1;  // batches in flight
  bool enable_prefix_caching = true;
  int64_t num_host_blocks = 0;  // for preempted requests; 0: they compute everything again
  int64_t swap_cost = 0;        // tokens that are computed in the time that a block takes to the host and back
  int64_t max_adjustments = 0;  // of one batch; 0: validate() makes it 4 * vocab_size
  SipHash128::Key hash_key{};
  // Sizes that batches are padded to, ascending; a batch above the last of its kind keeps its own. Of batches of
  // decodes only (their tokens are as many as their sequences), and of the others.
  std::vector<int64_t> decode_sizes = {}, mixed_seq_sizes = {}, mixed_token_sizes = {};

  // Fills in defaults; throws std::invalid_argument naming the field and its value if the capacities cannot work
  // together.
  void validate();

  int64_t pool_tokens() const { return num_blocks * block_size; }
  int64_t blocks_for(int64_t num_tokens) const { return (num_tokens + block_size - 1) / block_size; }
  int64_t max_blocks_per_seq() const;
};

}  // namespace hybrid
