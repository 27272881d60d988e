// The few words that every C++ part shares.
#pragma once

#include <cstdint>

namespace hybrid {

using RequestId = uint64_t;  // given by the API server; one per choice
using BlockId = int32_t;     // physical KV block
using Token = int32_t;

// Why a request ended; the numbers cross the wire (python: wire.FinishReason).
enum class FinishReason : uint8_t { none = 0, stop = 1, length = 2, abort = 3 };

// What a step did to a request besides picking tokens, and why one had to wait for its first; cross the wire too.
enum class StepEvent : uint8_t { admitted = 1, chunk = 2, preempted = 3 };
enum class WaitedFor : uint8_t { nothing = 0, blocks = 1, tokens = 2, sequences = 3, adjustments = 4 };

}  // namespace hybrid
