// Paged attention of decodes over a cache of the queries' own type.
#include "paged_decode.cuh"

namespace hybrid::cuda {

template void paged_decode(AttentionParams<BFloat16>, int64_t, bool, Stream);
template void paged_decode(AttentionParams<Float16>, int64_t, bool, Stream);

}  // namespace hybrid::cuda
