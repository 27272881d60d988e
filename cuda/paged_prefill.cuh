// The kernels for sequences with several query rows; paged_prefill() (attention.cuh) chooses.
#pragma once

#include "attention.cuh"

namespace hybrid::cuda {

// For devices where has_wgmma(), head sizes 64 and 128.
template <class T>
void paged_prefill_sm90(const AttentionParams<T>& p, int64_t rows, Stream stream);

}  // namespace hybrid::cuda
