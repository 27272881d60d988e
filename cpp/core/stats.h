// Stats: gauges and running totals of a scheduler.
#pragma once

#include <array>
#include <cstdint>

namespace hybrid {

inline constexpr std::array<int64_t, 15> kStepTokenBounds{1,   2,   4,    8,    16,   32,   64,   128,
                                                          256, 512, 1024, 2048, 4096, 8192, 16384};

struct Stats {
  int64_t num_running = 0, num_waiting = 0;
  int64_t waiting_since = -1;  // of the one that has waited longest, by the clock of RequestSpec::now; -1: nobody waits
  int64_t blocks_used = 0, blocks_total = 0;
  int64_t empty_slots = 0;  // places of tokens in the used blocks that no token has taken yet
  int64_t num_swapped = 0;  // of the waiting ones, those that the host keeps KV of
  int64_t host_blocks_used = 0, host_blocks_total = 0;
  int64_t blocks_swapped_out = 0, blocks_swapped_in = 0;
  int64_t num_preemptions = 0;
  int64_t prefix_queries = 0, prefix_hits = 0;  // prompt tokens looked up, and found, when a choice first ran
  int64_t steps = 0, step_tokens = 0;           // batches, and the tokens they computed
  // Batches by their tokens: [i] those of at most kStepTokenBounds[i] and more than the bound before, the last the
  // rest.
  std::array<int64_t, kStepTokenBounds.size() + 1> step_token_counts{};
};

}  // namespace hybrid
