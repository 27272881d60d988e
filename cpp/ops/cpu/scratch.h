// Memory that a kernel needs for the length of one call.
#pragma once

#include <cstdint>

namespace hybrid::cpu {

// At least `bytes` bytes of the calling thread, aligned to a cache line, kept and grown from call to call; the next
// call of the same thread returns the same memory. Not inline: kernels are compiled for several instruction sets.
void* scratch(int64_t bytes);

}  // namespace hybrid::cpu
