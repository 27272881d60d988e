// The few words that every C++ part shares.
#pragma once

#include <cstdint>

namespace hybrid {

using RequestId = uint64_t;  // given by the API server; one per choice
using BlockId = int32_t;     // physical KV block
using Token = int32_t;

// Why a request ended; the numbers cross the wire (python: wire.FinishReason).
enum class FinishReason : uint8_t { none = 0, stop = 1, length = 2, abort = 3 };

}  // namespace hybrid
