#include "core/batch.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <tuple>

#include "common/check.h"

namespace hybrid {

namespace {

constexpr int64_t entry_words = std::tuple_size_v<AdjustmentEntry>;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

BatchLayout::BatchLayout(const Config& config) {
  invariant(config.max_adjustments > 0, "the configuration was not validated");
  const int64_t tokens = config.max_num_batched_tokens, seqs = config.max_num_seqs;
  const int64_t blocks = seqs * config.max_blocks_per_seq(), adjustments = config.max_adjustments;
  columns_ = {
      {"header", "int64", 8, header_size, 0},
      {"token_ids", "int32", 4, tokens, 0},
      {"positions", "int32", 4, tokens, 0},
      {"slots", "int64", 8, tokens, 0},
      {"query_start", "int32", 4, seqs + 1, 0},
      {"seq_lens", "int32", 4, seqs, 0},
      {"sample_rows", "int32", 4, seqs, 0},
      {"temperature", "float32", 4, seqs, 0},
      {"top_p", "float32", 4, seqs, 0},
      {"min_p", "float32", 4, seqs, 0},
      {"repetition_penalty", "float32", 4, seqs, 0},
      {"top_k", "int32", 4, seqs, 0},
      {"num_logprobs", "int32", 4, seqs, 0},
      {"seeds", "int64", 8, seqs, 0},
      {"sample_positions", "int32", 4, seqs, 0},
      {"adjust_start", "int32", 4, seqs + 1, 0},
      {"copy_src", "int32", 4, seqs, 0},
      {"copy_dst", "int32", 4, seqs, 0},
      {"prefix_start", "int32", 4, seqs + 1, 0},
      {"prefix_lens", "int32", 4, seqs, 0},
      {"kv_start", "int32", 4, seqs + 1, 0},
      {"kv_blocks", "int32", 4, blocks, 0},
      {"adjustments", "int32", 4, entry_words * (ceil_div(blocks, entry_words) + adjustments), 0},
      {"swap_src", "int32", 4, config.num_host_blocks, 0},
      {"swap_dst", "int32", 4, config.num_host_blocks, 0},
  };
  for (Column& column : columns_) {
    const bool shares = &column == &columns_[static_cast<size_t>(Col::adjustments)];
    column.offset = shares ? (&column - 1)->offset : bytes_;
    bytes_ = column.offset + ceil_div(column.item_bytes * column.capacity, alignment) * alignment;
  }
}

BatchWriter::BatchWriter(const Config& config, const BatchLayout& layout, std::span<std::byte* const> arenas)
    : config_(config), layout_(layout) {
  for (std::byte* base : arenas) {
    const auto column = [&]<class T>(Col which, T*& out) { out = reinterpret_cast<T*>(base + layout_[which].offset); };
    Arena a{};
    column(Col::header, a.header);
    column(Col::token_ids, a.token_ids);
    column(Col::positions, a.positions);
    column(Col::slots, a.slots);
    column(Col::query_start, a.query_start);
    column(Col::seq_lens, a.seq_lens);
    column(Col::sample_rows, a.sample_rows);
    column(Col::temperature, a.temperature);
    column(Col::top_p, a.top_p);
    column(Col::min_p, a.min_p);
    column(Col::repetition_penalty, a.repetition_penalty);
    column(Col::top_k, a.top_k);
    column(Col::num_logprobs, a.num_logprobs);
    column(Col::seeds, a.seeds);
    column(Col::sample_positions, a.sample_positions);
    column(Col::adjust_start, a.adjust_start);
    column(Col::copy_src, a.copy_src);
    column(Col::copy_dst, a.copy_dst);
    column(Col::prefix_start, a.prefix_start);
    column(Col::prefix_lens, a.prefix_lens);
    column(Col::kv_start, a.kv_start);
    column(Col::kv_blocks, a.kv_blocks);
    column(Col::adjustments, a.adjustments);
    column(Col::swap_src, a.swap_src);
    column(Col::swap_dst, a.swap_dst);
    arenas_.push_back(a);
  }
}

void BatchWriter::begin(int64_t step, int64_t num_blocks) {
  batch_ = Batch{.step = step, .arena = step % static_cast<int64_t>(arenas_.size())};
  at_ = arenas_[static_cast<size_t>(batch_.arena)];
  at_.query_start[0] = at_.kv_start[0] = at_.prefix_start[0] = 0;
  at_.adjust_start[0] = static_cast<int32_t>(ceil_div(num_blocks, entry_words));
}

int32_t BatchWriter::add(const Request& request, int64_t num_new, bool is_decode) {
  const int64_t seq = batch_.num_seqs++;
  const int64_t length = request.num_computed + num_new;
  invariant(!is_decode || (batch_.num_decodes == seq && request.is_decode(num_new)), "a decode behind a prompt");
  add_tokens(request, num_new);
  batch_.num_decodes += is_decode;
  batch_.max_query_len = std::max(batch_.max_query_len, num_new);
  batch_.max_seq_len = std::max(batch_.max_seq_len, length);
  at_.query_start[seq + 1] = static_cast<int32_t>(batch_.num_tokens);
  at_.seq_lens[seq] = static_cast<int32_t>(length);

  const auto blocks = request.kv.blocks().first(static_cast<size_t>(config_.blocks_for(length)));
  const int32_t kv_start = at_.kv_start[seq];
  std::ranges::copy(blocks, at_.kv_blocks + kv_start);
  at_.kv_start[seq + 1] = kv_start + static_cast<int32_t>(blocks.size());
  if (length < request.num_tokens()) return -1;
  add_sample(request, length);
  return static_cast<int32_t>(batch_.num_sampled++);
}

void BatchWriter::add_tokens(const Request& request, int64_t num_new) {
  const int64_t block_size = config_.block_size;
  const auto blocks = request.kv.blocks();
  const auto num_known = static_cast<int64_t>(request.tokens.size());
  int64_t row = batch_.num_tokens;
  batch_.num_tokens += num_new;
  invariant(batch_.num_tokens <= config_.max_num_batched_tokens, "S1: more tokens than the budget");
  for (int64_t position = request.num_computed; position < request.num_computed + num_new; ++position, ++row) {
    at_.token_ids[row] =
        position < num_known ? request.tokens[static_cast<size_t>(position)] : -(request.sampled_row + 1);
    at_.positions[row] = static_cast<int32_t>(position);
    const int64_t block = blocks[static_cast<size_t>(position / block_size)];
    at_.slots[row] = block * block_size + position % block_size;
  }
}

void BatchWriter::add_sample(const Request& request, int64_t position) {
  const int64_t row = batch_.num_sampled;
  const SamplingRow& sampling = request.sampling;
  at_.sample_rows[row] = static_cast<int32_t>(batch_.num_tokens - 1);
  at_.temperature[row] = static_cast<float>(sampling.temperature);
  at_.top_p[row] = static_cast<float>(sampling.top_p);
  at_.min_p[row] = static_cast<float>(sampling.min_p);
  at_.repetition_penalty[row] = static_cast<float>(sampling.repetition_penalty);
  at_.top_k[row] = static_cast<int32_t>(std::min(sampling.top_k, config_.vocab_size));
  at_.num_logprobs[row] = static_cast<int32_t>(sampling.num_logprobs);
  at_.seeds[row] = std::bit_cast<int64_t>(sampling.seed);
  at_.sample_positions[row] = static_cast<int32_t>(position);
  int32_t end = at_.adjust_start[row];
  if (!request.adjustments.empty())
    end += static_cast<int32_t>(request.adjustments.write(request.num_generated(), at_.adjustments + end));
  at_.adjust_start[row + 1] = end;
}

void BatchWriter::add_prefix(int64_t num_decodes, int64_t num_tokens) {
  const int64_t prefix = batch_.num_prefixes++;
  at_.prefix_start[prefix + 1] = at_.prefix_start[prefix] + static_cast<int32_t>(num_decodes);
  at_.prefix_lens[prefix] = static_cast<int32_t>(num_tokens);
}

void BatchWriter::pad() {
  const bool decodes_only = batch_.num_decodes == batch_.num_seqs;
  const auto up = [](const std::vector<int64_t>& sizes, int64_t n) {
    const auto size = std::ranges::lower_bound(sizes, n);
    return size == sizes.end() ? int64_t{0} : *size;
  };
  const int64_t seqs = up(decodes_only ? config_.decode_sizes : config_.mixed_seq_sizes, batch_.num_seqs);
  const int64_t tokens = decodes_only ? seqs : up(config_.mixed_token_sizes, batch_.num_tokens);
  batch_.is_padded = seqs > 0 && tokens > 0;
  batch_.padded_seqs = batch_.is_padded ? seqs : batch_.num_seqs;
  batch_.padded_tokens = batch_.is_padded ? tokens : batch_.num_tokens;
  for (int64_t row = batch_.num_tokens; row < batch_.padded_tokens; ++row) {
    at_.token_ids[row] = at_.positions[row] = 0;
    at_.slots[row] = -1;
  }
  for (int64_t seq = batch_.num_seqs; seq < batch_.padded_seqs; ++seq) {
    at_.query_start[seq + 1] = at_.query_start[seq];
    at_.kv_start[seq + 1] = at_.kv_start[seq];
    at_.seq_lens[seq] = 0;
  }
  for (int64_t row = batch_.num_sampled; row < batch_.padded_seqs; ++row) {
    at_.sample_rows[row] = at_.top_k[row] = at_.sample_positions[row] = 0;
    at_.temperature[row] = at_.min_p[row] = 0;
    at_.top_p[row] = at_.repetition_penalty[row] = 1;
    at_.num_logprobs[row] = -1;
    at_.seeds[row] = 0;
    at_.adjust_start[row + 1] = at_.adjust_start[row];
  }
}

const Batch& BatchWriter::finish(const CopyList& copies, const CopyList& swap_outs, const CopyList& swap_ins) {
  invariant(copies.size() <= static_cast<size_t>(config_.max_num_seqs), "more copies than sequences");
  for (const auto& [source, destination] : copies) {
    at_.copy_src[batch_.num_copies] = source;
    at_.copy_dst[batch_.num_copies++] = destination;
  }
  batch_.num_swap_outs = std::ssize(swap_outs), batch_.num_swap_ins = std::ssize(swap_ins);
  invariant(batch_.num_swap_outs + batch_.num_swap_ins <= config_.num_host_blocks, "more swaps than host blocks");
  int64_t swap = 0;
  for (const CopyList* swaps : {&swap_outs, &swap_ins}) {
    for (const auto& [source, destination] : *swaps) {
      at_.swap_src[swap] = source;
      at_.swap_dst[swap++] = destination;
    }
  }
  pad();
  const int64_t first = at_.adjust_start[0], end = at_.adjust_start[batch_.num_sampled];
  const int64_t num_blocks = at_.kv_start[batch_.num_seqs];
  batch_.num_adjustments = end - first;
  invariant(end == first || num_blocks <= first * entry_words, "adjustments among the blocks");
  batch_.bytes_used = layout_[Col::kv_blocks].offset + 4 * (end > first ? end * entry_words : num_blocks);
  const int64_t header[BatchLayout::header_size] = {
      batch_.step,          batch_.num_tokens,  batch_.num_seqs,      batch_.num_decodes,     batch_.num_sampled,
      batch_.max_query_len, batch_.max_seq_len, batch_.num_copies,    batch_.num_adjustments, batch_.bytes_used,
      batch_.padded_tokens, batch_.padded_seqs, batch_.num_swap_outs, batch_.num_swap_ins,    batch_.num_prefixes};
  std::memcpy(at_.header, header, sizeof header);
  return batch_;
}

}  // namespace hybrid
