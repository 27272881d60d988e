// Paged attention of decodes over a cache of Float8: half the bytes.
#include "paged_decode.cuh"

namespace hybrid::cuda {

template void paged_decode(AttentionParams<BFloat16, Float8>, int64_t, bool, Stream);
template void paged_decode(AttentionParams<Float16, Float8>, int64_t, bool, Stream);

}  // namespace hybrid::cuda
