// The kernels for sequences with several query rows; paged_prefill() (attention.cuh) chooses.
#pragma once

#include "attention.cuh"

namespace hybrid::cuda {

// For devices where has_wgmma(), head sizes 64 and 128.
template <class T>
void paged_prefill_sm90(const AttentionParams<T>& p, Stream stream);
template <class T>
void paged_prefixes_sm90(const AttentionParams<T>& p, Stream stream);

// Rows of a share of the kernel that paged_prefill() and paged_prefixes() choose.
int prefill_share_rows(int64_t dim);

}  // namespace hybrid::cuda
