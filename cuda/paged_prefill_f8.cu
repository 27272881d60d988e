// Paged attention of prompts, and of beginnings that decodes share, over a cache of Float8: the choice of the kernel.
#include "device.cuh"
#include "prefill_block.cuh"

namespace hybrid::cuda {

namespace {

// A share's queries come by the copy engine, or not at all: the other warps are at work.
template <class T>
bool has_sm90_kernel(const AttentionParams<T, Float8>& p) {
  return has_wgmma() && (p.dim == 64 || p.dim == 128) && prefill_share_rows(p.dim) % p.group == 0;
}

}  // namespace

template <class T, class C>
void paged_prefill(const AttentionParams<T, C>& p, Stream stream) {
  has_sm90_kernel(p) ? paged_prefill_sm90(p, stream) : paged_prefill_any(p, stream);
}

template <class T, class C>
void paged_prefixes(const AttentionParams<T, C>& p, Stream stream) {
  has_sm90_kernel(p) ? paged_prefixes_sm90(p, stream) : paged_prefixes_any(p, stream);
}

template void paged_prefill(const AttentionParams<BFloat16, Float8>&, Stream);
template void paged_prefill(const AttentionParams<Float16, Float8>&, Stream);
template void paged_prefixes(const AttentionParams<BFloat16, Float8>&, Stream);
template void paged_prefixes(const AttentionParams<Float16, Float8>&, Stream);

}  // namespace hybrid::cuda
