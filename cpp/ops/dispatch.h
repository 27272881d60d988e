// From a DType at run time to a C++ type at compile time, for the three types a model is stored in.
#pragma once

#include <type_traits>
#include <utility>

#include "ops/float16.h"
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

}  // namespace hybrid
