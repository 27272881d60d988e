// Paged attention of prompts for Hopper over a cache of Float8.
#include "prefill_sm90.cuh"

namespace hybrid::cuda {

template void paged_prefill_sm90(const AttentionParams<BFloat16, Float8>&, Stream);
template void paged_prefill_sm90(const AttentionParams<Float16, Float8>&, Stream);
template void paged_prefixes_sm90(const AttentionParams<BFloat16, Float8>&, Stream);
template void paged_prefixes_sm90(const AttentionParams<Float16, Float8>&, Stream);

}  // namespace hybrid::cuda
