// store_kv: rows of new keys and values to their slots of the paged cache.
//
// One thread moves 16 bytes; consecutive threads walk one token's heads, so reads are whole cache lines and writes are
// whole head rows. Moves 4 x rows x kv_heads x dim x sizeof(T) bytes (read and written, K and V): memory-bound.
#include "launch.cuh"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "vec.cuh"

namespace hybrid::cuda {

namespace {

template <class T>
struct StoreKvParams {
  T* __restrict__ k_cache;
  T* __restrict__ v_cache;
  const T* __restrict__ k;
  const T* __restrict__ v;
  const int64_t* __restrict__ slots;
  int64_t rows, k_row, v_row;                                  // strides of k and v, in elements
  int64_t k_block, k_head, k_token, v_block, v_head, v_token;  // strides of the caches
  int kv_heads, dim, block_size;
};

template <class T>
__global__ void store_kv_kernel(const __grid_constant__ StoreKvParams<T> p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  constexpr int per = Pack<T>::size;
  const int packs = p.dim / per, row_packs = p.kv_heads * packs;
  const int64_t total = p.rows * row_packs;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < total; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / row_packs;
    const int in_row = static_cast<int>(i % row_packs), head = in_row / packs, at = in_row % packs * per;
    const int64_t slot = p.slots[row];
    if (slot < 0) continue;
    const int64_t block = slot / p.block_size, token = slot % p.block_size;
    const int64_t source = int64_t{head} * p.dim + at;
    Pack<T>::load(p.k + row * p.k_row + source)
        .store(p.k_cache + block * p.k_block + head * p.k_head + token * p.k_token + at);
    Pack<T>::load(p.v + row * p.v_row + source)
        .store(p.v_cache + block * p.v_block + head * p.v_head + token * p.v_token + at);
  }
}

}  // namespace

void store_kv(const StoreKv& a) {
  by_dtype(a.k.dtype, [&]<class T>() {
    StoreKvParams<T> p{a.k_cache.as<T>(),
                       a.v_cache.as<T>(),
                       a.k.as<T>(),
                       a.v.as<T>(),
                       a.slots.as<int64_t>(),
                       a.k.shape[0],
                       a.k.strides[0],
                       a.v.strides[0],
                       a.k_cache.strides[0],
                       a.k_cache.strides[1],
                       a.k_cache.strides[2],
                       a.v_cache.strides[0],
                       a.v_cache.strides[1],
                       a.v_cache.strides[2],
                       static_cast<int>(a.k.shape[1]),
                       static_cast<int>(a.k.shape[2]),
                       static_cast<int>(a.k_cache.shape[2])};
    require(p.dim % Pack<T>::size == 0, "store_kv: head size ", p.dim, " is not a multiple of ", Pack<T>::size);
    launch(store_kv_kernel<T>, grid_for(p.rows * p.kv_heads * (p.dim / Pack<T>::size), 256), 256, 0, a.stream, p);
  });
}

}  // namespace hybrid::cuda
