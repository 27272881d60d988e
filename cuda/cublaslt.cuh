// cuBLASLt, looked for at run time: nothing links to it, and without it our own kernels do all the work.
#pragma once

#include "linear.cuh"

namespace hybrid::cuda {

// linear of 16-bit types. False, and nothing done, where the library is not there or has no kernel for these arguments.
// The order of its sums depends on the number of rows, so a row's bits do too.
template <class T>
bool library_linear(const LinearParams<T>& p, Stream stream);

}  // namespace hybrid::cuda
