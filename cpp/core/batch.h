// Batch: one step's work, one contiguous range of bytes that every reader understands by BatchLayout alone. Knows
// columns and offsets; decides nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/config.h"
#include "core/kv_cache.h"
#include "core/request.h"

namespace hybrid {

struct Column {
  const char* name;
  const char* dtype;  // numpy's name
  int64_t item_bytes, capacity, offset;
};

// Order of the columns. The ragged ones come last and share their memory: adjustments lie where the batch's blocks end,
// hence what a batch uses is one short prefix of the arena. What is swapped stands behind that: only the host reads it.
enum class Col : uint8_t {
  header,
  token_ids,
  positions,
  slots,
  query_start,
  seq_lens,
  sample_rows,
  temperature,
  top_p,
  min_p,
  repetition_penalty,
  top_k,
  num_logprobs,
  seeds,
  sample_positions,
  adjust_start,
  copy_src,
  copy_dst,
  prefix_start,
  prefix_lens,
  kv_start,
  kv_blocks,
  adjustments,  // AdjustmentEntry, from adjust_start[0] on; begins with kv_blocks
  swap_src,
  swap_dst
};

// Where each column lies; a function of the configuration.
class BatchLayout {
 public:
  static constexpr int64_t alignment = 64, header_size = 16;

  explicit BatchLayout(const Config& config);

  int64_t bytes() const { return bytes_; }
  std::span<const Column> columns() const { return columns_; }
  const Column& operator[](Col column) const { return columns_[static_cast<size_t>(column)]; }

 private:
  std::vector<Column> columns_;
  int64_t bytes_ = 0;
};

// The first entries of the header column, in this order.
struct Batch {
  int64_t step = 0, num_tokens = 0, num_seqs = 0, num_decodes = 0, num_sampled = 0;
  int64_t max_query_len = 0, max_seq_len = 0, num_copies = 0, num_adjustments = 0, bytes_used = 0;
  int64_t num_prefixes = 0;                    // groups of decodes that begin alike; 0: none
  int64_t padded_tokens = 0, padded_seqs = 0;  // rows of the columns that hold values, see BatchWriter::pad
  // Entries of swap_src and swap_dst: first device -> host, then host -> device; all before copy_src -> copy_dst, and
  // that before the batch writes any KV.
  int64_t num_swap_outs = 0, num_swap_ins = 0;
  bool is_padded = false;  // to sizes of the configuration; false: the batch is larger than those. Not in the header.
  int64_t arena = 0;       // not in the header: which of the scheduler's arenas holds it
};

class BatchWriter {
 public:
  // `arenas`: memory that others own, layout.bytes() each, 8-byte aligned.
  BatchWriter(const Config& config, const BatchLayout& layout, std::span<std::byte* const> arenas);

  // `num_blocks`: as many as the batch is going to list, if any row of it has adjustments.
  void begin(int64_t step, int64_t num_blocks);
  // A sequence with its next `num_new` tokens, for which its KV has room. Decodes, whose earlier tokens all were
  // computed by steps before this one, come first. Returns the row of the token that is picked for it, -1 if tokens
  // remain to be computed.
  int32_t add(const Request& request, int64_t num_new, bool is_decode);
  // The next `num_decodes` decodes begin with the same blocks, those of so many tokens; groups are all decodes, or
  // none.
  void add_prefix(int64_t num_decodes, int64_t num_tokens);
  const Batch& finish(const CopyList& copies, const CopyList& swap_outs, const CopyList& swap_ins);

 private:
  struct Arena {
    int64_t* header;
    int32_t *token_ids, *positions;
    int64_t* slots;
    int32_t *query_start, *seq_lens, *sample_rows;
    float *temperature, *top_p, *min_p, *repetition_penalty;
    int32_t *top_k, *num_logprobs;
    int64_t* seeds;
    int32_t *sample_positions, *adjust_start, *copy_src, *copy_dst, *prefix_start, *prefix_lens, *kv_start, *kv_blocks;
    AdjustmentEntry* adjustments;
    int32_t *swap_src, *swap_dst;
  };
  // A captured graph runs with fixed sizes: up to one of those, tokens that belong to nobody and are not stored, and
  // sequences that own nothing and pick a token that nobody reads.
  void pad();
  void add_tokens(const Request& request, int64_t num_new);
  void add_sample(const Request& request, int64_t position);

  const Config config_;
  const BatchLayout layout_;
  std::vector<Arena> arenas_;
  Arena at_{};  // the arena being written
  Batch batch_;
};

}  // namespace hybrid
