// The current device: facts asked for once, and memory that kernels use between their own launches.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/tensor.h"

namespace hybrid::cuda {

int64_t multiprocessors();
int64_t shared_bytes_per_multiprocessor();
bool has_wgmma();  // Hopper's own instructions: on the device, and compiled for it (sm_90a)

// At least `bytes` of scratch of the current device, 256-byte aligned, contents undefined. Its users are ordered on one
// stream per device: two streams of a device must not run ops that take scratch at the same time.
// Grows outside of capture only, so capture a graph after one eager call with the largest sizes; a size that is new
// during capture throws InternalError. What was handed out once stays valid: graphs keep its address.
void* scratch(size_t bytes, Stream stream);

// The same for counters that are zero before and, as each user guarantees, after every kernel.
int32_t* zeroed_counters(size_t count, Stream stream);

}  // namespace hybrid::cuda
