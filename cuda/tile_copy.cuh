// Copies of tiles into shared memory by Hopper's copy engine, barriers that count their bytes, and what else warps of
// different roles say to each other (sm_90).
#pragma once

#include <cudaTypedefs.h>

#include "launch.cuh"

namespace hybrid::cuda {

// The driver's call that describes a tensor to the copy engine; linked at run time, so that no driver is needed to
// load this library.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
    invariant(found == cudaDriverEntryPointSuccess, "the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return encode;
}

// A barrier in shared memory, 8 bytes. Phase n (0, 1, ...) ends when all its arrivals came and all bytes it expects.
__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Shows initialised barriers to the copy engine; a __syncthreads() must follow.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// The same at the barrier of another block of the cluster. It orders nothing there but the copies that wait for it: a
// release to the cluster would cost a trip to L2.
__device__ inline void arrive_at(uint32_t barrier, int block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}
// Returns when the latest phase of this parity has ended.
__device__ inline void wait_barrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(barrier),
      "r"(parity)
      : "memory");
}

// Stages of a ring that a producer fills and consumers empty. The n-th use of the ring takes stage n % stages.
template <int stages>
struct Ring {
  static constexpr int size = stages, barriers = 2 * stages;
  uint32_t barrier;  // shared address of `barriers` barriers

  __device__ void init(int fillers, int emptiers) const {
    for (int i = 0; i < stages; ++i) init_barrier(full(i), fillers), init_barrier(empty(i), emptiers);
  }
  static __device__ int stage(uint32_t n) { return n % stages; }
  __device__ uint32_t full(uint32_t n) const { return barrier + stage(n) * 16; }
  __device__ uint32_t empty(uint32_t n) const { return barrier + stage(n) * 16 + 8; }
  __device__ void wait_full(uint32_t n) const { wait_barrier(full(n), n / stages & 1); }
  __device__ void wait_empty(uint32_t n) const { wait_barrier(empty(n), n / stages & 1 ^ 1); }
};

// A box of a 4-dimensional tensor; its bytes count for `barrier`.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, int z, int w, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
      : "memory");
}
// The same for data that is read once: the first to go from L2.
__device__ inline uint64_t read_once() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, int z, int w, uint32_t barrier,
                                uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier), "l"(policy)
      : "memory");
}
// The same into all `blocks` blocks of the cluster, each of which counts the bytes for its own barrier.
template <int blocks>
__device__ inline void copy_box_to_all(uint32_t to, const CUtensorMap* map, int x, int y, int z, int w,
                                       uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier), "h"(static_cast<uint16_t>((1 << blocks) - 1))
      : "memory");
}
__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Makes ordinary writes to shared memory visible to the copy engine and to wgmma; a barrier must follow.
__device__ inline void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// All threads of a cluster: what was written before the one is seen after the other.
__device__ inline void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// A count in memory that orders what was written before it, on any block, against what is read after it was seen.
__device__ inline int add_release(int32_t* count, int n) {
  int before;
  asm volatile("atom.release.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(count), "r"(n) : "memory");
  return before;
}
__device__ inline int read_acquire(const int32_t* count) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
  return value;
}

// Named barriers (1 to 15) among `threads` threads: meet waits for the others, pass does not.
__device__ inline void meet(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
__device__ inline void pass(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

}  // namespace hybrid::cuda
