// The kernels for sequences with several query rows; paged_prefill() (attention.cuh) chooses.
#pragma once

#include "attention.cuh"

namespace hybrid::cuda {

// For devices where has_wgmma(), head sizes 64 and 128; over a cache of Float8, groups of which a share has a whole
// number.
template <class T, class C>
void paged_prefill_sm90(const AttentionParams<T, C>& p, Stream stream);
template <class T, class C>
void paged_prefixes_sm90(const AttentionParams<T, C>& p, Stream stream);

// Rows of a share of the kernel that paged_prefixes() chooses for a cache of T, and mostly for one of Float8.
int prefill_share_rows(int64_t dim);

}  // namespace hybrid::cuda
