#include "ops/cpu/scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace hybrid::cpu {

void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    constexpr int64_t step = int64_t{1} << 16;
    memory.reset();
    capacity = 0;
    const int64_t wanted = (bytes + step - 1) / step * step;
    memory.reset(std::aligned_alloc(64, static_cast<size_t>(wanted)));
    if (memory == nullptr) throw std::bad_alloc();
    capacity = wanted;
  }
  return memory.get();
}

}  // namespace hybrid::cpu
