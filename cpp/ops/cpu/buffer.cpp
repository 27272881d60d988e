#include "ops/cpu/buffer.h"

#include <cstddef>
#include <new>

namespace hybrid::cpu {

namespace {
constexpr std::align_val_t alignment{64};
}

Buffer::~Buffer() { ::operator delete(data_, alignment); }

void* Buffer::bytes(int64_t bytes) {
  if (bytes > size_) {
    ::operator delete(data_, alignment);
    data_ = nullptr;
    size_ = 0;
    data_ = ::operator new(static_cast<size_t>(bytes), alignment);
    size_ = bytes;
  }
  return data_;
}

}  // namespace hybrid::cpu
