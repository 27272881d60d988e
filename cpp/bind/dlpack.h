// The part of the DLPack 1.x binary interface that we read: the tensor itself, the capsules of `__dlpack__`, and the
// table of C functions behind `type(tensor).__dlpack_c_exchange_api__` (since 1.2). Layouts are fixed by that standard.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybrid::dlpack {

constexpr uint32_t major_version = 1, minor_version = 3;

enum class DeviceType : int32_t { cpu = 1, cuda = 2, cuda_host = 3, cuda_managed = 13 };

struct Device {
  DeviceType type;
  int32_t index;
};

enum class TypeCode : uint8_t { signed_int = 0, unsigned_int = 1, ieee_float = 2, bfloat = 4, float8_e4m3fn = 10 };

struct DataType {
  TypeCode code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: row-major (before 1.2 only)
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

// Content of a capsule named "dltensor".
struct ManagedTensor {
  Tensor tensor;
  void* manager_context;
  void (*deleter)(ManagedTensor*);
};

constexpr uint64_t read_only_flag = 1;

// Content of a capsule named "dltensor_versioned".
struct ManagedTensorVersioned {
  Version version;
  void* manager_context;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* previous;  // the same table for an older major version, or null
};

// Content of a capsule named "dlpack_exchange_api". Functions return 0, or -1 with a Python exception set.
struct ExchangeApi {
  ExchangeApiHeader header;
  int (*allocate)(Tensor* prototype, ManagedTensorVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedTensorVersioned** out);
  int (*object_from_managed)(ManagedTensorVersioned* tensor, void** out_object);
  int (*tensor_from_object)(void* object, Tensor* out);  // may be null; shape and strides live as long as the object
  int (*current_stream)(DeviceType type, int32_t index, void** out);
};

static_assert(sizeof(DataType) == 4 && sizeof(Tensor) == 48 && offsetof(Tensor, byte_offset) == 40);
static_assert(offsetof(ManagedTensorVersioned, tensor) == 32);

}  // namespace hybrid::dlpack
