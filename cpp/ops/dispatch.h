// From a DType at run time to a C++ type at compile time, for the three types a model is stored in.
#pragma once

#include <type_traits>
#include <utility>

#include "ops/float16.h"
#include "ops/float8.h"
#include "ops/tensor.h"

namespace hybrid {

// Throws InternalError. Not inline: kernels are compiled for several instruction sets, and a shared inline function
// would be linked from any of them.
[[noreturn]] void not_a_float_type(DType dtype);

// by_dtype(x.dtype, [&]<class T>() { ... }) with T = float, BFloat16 or Float16.
template <class Body>
decltype(auto) by_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32:
      return std::forward<Body>(body).template operator()<float>();
    case DType::bf16:
      return std::forward<Body>(body).template operator()<BFloat16>();
    case DType::f16:
      return std::forward<Body>(body).template operator()<Float16>();
    default:
      not_a_float_type(dtype);
  }
}

// The same with the type C of the elements of a cache beside T: T itself, or Float8.
template <class Body>
decltype(auto) by_cache_dtype(DType dtype, DType cache, Body&& body) {
  return by_dtype(dtype, [&]<class T>() -> decltype(auto) {
    return cache == DType::f8 ? body.template operator()<T, Float8>() : body.template operator()<T, T>();
  });
}

}  // namespace hybrid
