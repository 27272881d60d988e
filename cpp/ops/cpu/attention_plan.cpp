#include "ops/cpu/attention_plan.h"

#include <algorithm>

namespace hybrid::cpu {

namespace {

// Reading and converting a KV token costs about as much as 8 query rows' arithmetic on it.
int64_t cost_per_token(int64_t query_rows) { return query_rows + 8; }

// Spans per thread: the last one that a thread takes alone is then about an eighth of its work at most.
constexpr int64_t spans_per_thread = 8;

}  // namespace

void AttentionPlan::build(const PagedAttention& a, int64_t tile_tokens, int threads) {
  tiles_.clear();
  spans_.clear();
  split_tiles_.clear();
  partial_rows_ = 0;
  const auto* query_start = a.query_start.as<const int32_t>();
  const auto* seq_lens = a.seq_lens.as<const int32_t>();
  const int64_t kv_heads = a.k_cache.shape[1], group = a.q.shape[1] / kv_heads;

  int64_t total = 0;
  for (int64_t s = 0; s < a.seq_lens.shape[0]; ++s) {
    const int64_t begin = query_start[s], end = query_start[s + 1], first_position = seq_lens[s] - (end - begin);
    // The last rows see most: hand them out first.
    for (int64_t tile_end = end; tile_end > begin; tile_end -= tile_tokens) {
      const int64_t row = std::max(begin, tile_end - tile_tokens);
      tiles_.push_back(
          {row, first_position + row - begin, static_cast<int32_t>(tile_end - row), static_cast<int32_t>(s), -1});
      total += tiles_.back().end() * cost_per_token((tile_end - row) * group) * kv_heads;
    }
  }

  const int64_t limit = total / (spans_per_thread * threads) + 1;
  for (size_t i = 0; i < tiles_.size(); ++i) {
    QueryTile& tile = tiles_[i];
    const int64_t chunks = tile.chunks();
    const int64_t chunk_cost = attention_chunk * cost_per_token(tile.tokens * group) * kv_heads;
    const int64_t per_span = threads == 1 ? chunks : std::clamp<int64_t>(limit / chunk_cost, 1, chunks);
    for (int64_t c = 0; c < chunks; c += per_span)
      spans_.push_back(
          {static_cast<int32_t>(i), static_cast<int32_t>(c), static_cast<int32_t>(std::min(chunks, c + per_span))});
    if (per_span < chunks) {
      tile.partial = partial_rows_;
      partial_rows_ += chunks * tile.tokens * group;
      split_tiles_.push_back(static_cast<int32_t>(i));
    }
  }
}

void plan_decode(const PlanDecode&) {}  // every call builds its own AttentionPlan

}  // namespace hybrid::cpu
