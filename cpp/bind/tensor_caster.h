// Python tensors as function arguments: reads where a tensor lies by DLPack, copies nothing, keeps nothing past the
// call.
//
// torch answers through a table of C functions found on its type (some 20 ns a tensor); anything else that has
// `__dlpack__`, such as numpy, goes through a capsule. None becomes an undefined view.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "bind/dlpack.h"
#include "common/check.h"
#include "ops/tensor.h"

namespace hybrid::bind {

namespace py = pybind11;

// An argument that is read; `Output` is one that is written, hence refuses read-only memory.
struct Input {
  TensorView view;
  const dlpack::ExchangeApi* api = nullptr;
};
struct Output : Input {};

// The table of a type, or null; looked up once a type. Cached types are kept alive, so their addresses stay theirs.
class ExchangeApis {
 public:
  const dlpack::ExchangeApi* of(PyTypeObject* type) {
    for (size_t i = 0; i < count_; ++i)
      if (entries_[i].type == type) return entries_[i].api;
    const dlpack::ExchangeApi* api = look_up(type);
    if (count_ < entries_.size()) {
      Py_INCREF(reinterpret_cast<PyObject*>(type));
      entries_[count_++] = {type, api};
    }
    return api;
  }

 private:
  static const dlpack::ExchangeApi* look_up(PyTypeObject* type) {
    const py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
    if (capsule.is_none()) return nullptr;
    void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (pointer == nullptr) throw py::error_already_set();
    auto* header = static_cast<dlpack::ExchangeApiHeader*>(pointer);
    while (header != nullptr && header->version.major != dlpack::major_version) header = header->previous;
    auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
    return api != nullptr && api->tensor_from_object != nullptr ? api : nullptr;
  }

  struct Entry {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;
  };
  std::array<Entry, 8> entries_{};
  size_t count_ = 0;
};

inline DType dtype_of(dlpack::DataType t) {
  using enum dlpack::TypeCode;
  if (t.lanes == 1) {
    if (t.code == ieee_float && t.bits == 32) return DType::f32;
    if (t.code == bfloat && t.bits == 16) return DType::bf16;
    if (t.code == ieee_float && t.bits == 16) return DType::f16;
    if (t.code == signed_int && t.bits == 32) return DType::i32;
    if (t.code == signed_int && t.bits == 64) return DType::i64;
    if (t.code == unsigned_int && t.bits == 8) return DType::u8;
    if (t.code == signed_int && t.bits == 8) return DType::i8;
    if (t.code == float8_e4m3fn && t.bits == 8) return DType::f8;
  }
  throw std::invalid_argument(concat("tensor has an unsupported dtype: DLPack code ", static_cast<int>(t.code), ", ",
                                     static_cast<int>(t.bits), " bits, ", t.lanes, " lanes"));
}

inline TensorView view_of(const dlpack::Tensor& t) {
  require(t.ndim <= TensorView::max_dims, "tensor has ", t.ndim, " dimensions, at most ", TensorView::max_dims,
          " are supported");
  const bool cuda = t.device.type == dlpack::DeviceType::cuda || t.device.type == dlpack::DeviceType::cuda_managed;
  const bool cpu = t.device.type == dlpack::DeviceType::cpu || t.device.type == dlpack::DeviceType::cuda_host;
  require(cuda || cpu, "tensor is on DLPack device ", static_cast<int>(t.device.type),
          ", expected CPU (1) or CUDA (2)");
  TensorView view;
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.dtype = dtype_of(t.dtype);
  view.device = cuda ? hybrid::Device::cuda : hybrid::Device::cpu;
  view.device_index = cuda ? t.device.index : 0;
  view.ndim = t.ndim;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    view.shape[i] = t.shape[i];
    view.strides[i] = t.strides != nullptr ? t.strides[i] : stride;
    stride *= t.shape[i];
  }
  return view;
}

// The slow way, by `__dlpack__`. The capsule owns the exported tensor and has to outlive the view.
inline py::object capsule_of(py::handle source) {
  const std::string type = Py_TYPE(source.ptr())->tp_name;
  if (!py::hasattr(source, "__dlpack__"))
    throw py::type_error(concat("expected a tensor (an object with __dlpack__) or None, got ", type));
  try {
    return source.attr("__dlpack__")(py::arg("max_version") =
                                         py::make_tuple(dlpack::major_version, dlpack::minor_version));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    return source.attr("__dlpack__")();  // a producer from before DLPack 1.0
  }
}

inline TensorView view_of_capsule(const py::object& capsule, bool writable) {
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor"))
    return view_of(static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor);
  auto* managed =
      static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
  if (managed == nullptr) throw py::error_already_set();
  require(managed->version.major == dlpack::major_version, "tensor speaks DLPack ", managed->version.major,
          ", expected version ", dlpack::major_version);
  require(!writable || (managed->flags & dlpack::read_only_flag) == 0, "an output tensor is read-only");
  return view_of(managed->tensor);
}

template <class Argument>
struct TensorCaster {
  PYBIND11_TYPE_CASTER(Argument, py::detail::const_name("Tensor | None"));

  bool load(py::handle source, bool) {
    static ExchangeApis apis;
    if (source.is_none()) return true;
    value.api = apis.of(Py_TYPE(source.ptr()));
    if (value.api == nullptr) {
      capsule_ = capsule_of(source);
      value.view = view_of_capsule(capsule_, std::is_same_v<Argument, Output>);
      return true;
    }
    dlpack::Tensor tensor;
    if (value.api->tensor_from_object(source.ptr(), &tensor) != 0) throw py::error_already_set();
    value.view = view_of(tensor);
    return true;
  }

 private:
  py::object capsule_;
};

// The stream that the caller's framework works on now.
inline Stream stream_of(const Input& tensor) {
  if (tensor.view.device == hybrid::Device::cpu) return nullptr;
  require(tensor.api != nullptr, "CUDA tensors need a framework with __dlpack_c_exchange_api__ (torch 2.10 or later)");
  void* stream = nullptr;
  if (tensor.api->current_stream(dlpack::DeviceType::cuda, tensor.view.device_index, &stream) != 0)
    throw py::error_already_set();
  return stream;
}

}  // namespace hybrid::bind

template <>
struct pybind11::detail::type_caster<hybrid::bind::Input> : hybrid::bind::TensorCaster<hybrid::bind::Input> {};
template <>
struct pybind11::detail::type_caster<hybrid::bind::Output> : hybrid::bind::TensorCaster<hybrid::bind::Output> {};
