// TensorView: where a tensor lies and how it is laid out; owns nothing, knows no framework.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybrid {

enum class DType : uint8_t { f32, f16, bf16, i32, i64, u8, i8, f8 };
enum class Device : uint8_t { cpu, cuda };

constexpr int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::u8:
    case DType::i8:
    case DType::f8:
      return 1;
  }
  return 0;
}

constexpr const char* name_of(DType dtype) {
  constexpr const char* names[] = {"float32", "float16", "bfloat16", "int32",
                                   "int64",   "uint8",   "int8",     "float8_e4m3fn"};
  return names[static_cast<int>(dtype)];
}

struct TensorView {
  static constexpr int max_dims = 6;
  void* data = nullptr;
  DType dtype = DType::f32;
  Device device = Device::cpu;
  int32_t device_index = 0;
  int32_t ndim = 0;
  int64_t shape[max_dims] = {};
  int64_t strides[max_dims] = {};  // in elements

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  // Entry i of a contiguous column of i32 or i64 in host memory.
  int64_t index_at(int64_t i) const { return dtype == DType::i64 ? as<int64_t>()[i] : as<int32_t>()[i]; }
  bool defined() const { return data != nullptr || ndim > 0; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
};

// The stream to launch on; null on a CPU.
using Stream = void*;

}  // namespace hybrid
