// Outputs: what one step gave, as columns grouped by client. Valid until the next commit.
#pragma once

#include <cstdint>
#include <vector>

#include "common/types.h"

namespace hybrid {

struct Outputs {
  int64_t step = -1;
  int64_t num_tokens = 0, num_seqs = 0;  // of the batch
  int64_t scheduled = 0;                 // what schedule() was told when it made the batch
  int64_t num_rows = 0;                  // of every column but client_start
  std::vector<int32_t> client_start;     // client c owns rows [client_start[c], client_start[c + 1])
  std::vector<RequestId> ids;
  std::vector<Token> tokens;
  std::vector<FinishReason> finish;
  std::vector<int32_t> cached_tokens;    // prompt tokens found in the cache, on a choice's first row; -1 after
  std::vector<int32_t> rows;             // sampled row of the batch that a row came from
  std::vector<int32_t> num_preemptions;  // of the choice so far
  std::vector<int64_t> scheduled_at;  // what schedule() was told when it first ran, on a choice's first row; -1 after

  // Rows of their own, grouped in the same way: a request's admission (value: tokens found in the cache), a piece of
  // its prompt (tokens), a preemption (tokens that it has to compute again).
  std::vector<int32_t> event_start;
  std::vector<RequestId> event_ids;
  std::vector<int32_t> event_values;
  std::vector<uint8_t> event_kinds;  // StepEvent | WaitedFor << 4

  Outputs(int64_t num_clients, int64_t max_rows)
      : client_start(static_cast<size_t>(num_clients) + 1),
        ids(static_cast<size_t>(max_rows)),
        tokens(ids.size()),
        finish(ids.size()),
        cached_tokens(ids.size()),
        rows(ids.size()),
        num_preemptions(ids.size()),
        scheduled_at(ids.size()),
        event_start(client_start.size()) {}
};

}  // namespace hybrid
