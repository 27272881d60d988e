// Paged attention of prompts, and of beginnings that decodes share, over a cache of the queries' own type: here the
// choice of the kernel.
#include "device.cuh"
#include "prefill_block.cuh"

namespace hybrid::cuda {

namespace {

bool has_sm90_kernel(int64_t dim) { return has_wgmma() && (dim == 64 || dim == 128); }

}  // namespace

template <class T, class C>
void paged_prefill(const AttentionParams<T, C>& p, Stream stream) {
  has_sm90_kernel(p.dim) ? paged_prefill_sm90(p, stream) : paged_prefill_any(p, stream);
}

template <class T, class C>
void paged_prefixes(const AttentionParams<T, C>& p, Stream stream) {
  has_sm90_kernel(p.dim) ? paged_prefixes_sm90(p, stream) : paged_prefixes_any(p, stream);
}

int prefill_share_rows(int64_t dim) {
  if (has_sm90_kernel(dim)) return dim == 64 ? 192 : 128;
  return dim <= 128 ? 128 : 64;
}

template void paged_prefill(const AttentionParams<BFloat16>&, Stream);
template void paged_prefill(const AttentionParams<Float16>&, Stream);
template void paged_prefixes(const AttentionParams<BFloat16>&, Stream);
template void paged_prefixes(const AttentionParams<Float16>&, Stream);

}  // namespace hybrid::cuda
