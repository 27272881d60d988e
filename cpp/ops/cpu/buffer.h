// Buffer: memory that only grows, aligned for vector loads. Knows nothing of what lies in it: a growth loses the
// contents.
#pragma once

#include <cstdint>

namespace hybrid::cpu {

class Buffer {
 public:
  Buffer() = default;
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // At least `bytes` bytes on a cache line. Throws std::bad_alloc.
  void* bytes(int64_t bytes);
  float* floats(int64_t n) { return static_cast<float*>(bytes(n * static_cast<int64_t>(sizeof(float)))); }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace hybrid::cpu
