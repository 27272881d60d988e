// Stats: gauges and running totals of a scheduler.
#pragma once

#include <cstdint>

namespace hybrid {

struct Stats {
  int64_t num_running = 0, num_waiting = 0;
  int64_t blocks_used = 0, blocks_total = 0;
  int64_t num_preemptions = 0;
  int64_t prefix_queries = 0, prefix_hits = 0;  // prompt tokens looked up, and found, when a choice first ran
  int64_t steps = 0, step_tokens = 0;           // batches, and the tokens they computed
};

}  // namespace hybrid
