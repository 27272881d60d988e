// embedding: rows of the table by token id, 16 bytes a thread and turn; memory-bound. The table is row-major on this
// device, whether packed or plain.
#include "launch.cuh"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "vec.cuh"

namespace hybrid::cuda {

namespace {

template <class T>
struct EmbeddingParams {
  T* __restrict__ out;
  const int32_t* __restrict__ ids;
  const int32_t* __restrict__ picked;
  const T* __restrict__ table;
  int64_t rows, dim, out_row, table_row;
};

template <class T>
__global__ void embedding_kernel(const __grid_constant__ EmbeddingParams<T> p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  constexpr int per = Pack<T>::size;
  const int64_t packs = p.dim / per, total = p.rows * packs;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < total; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / packs, at = i % packs * per;
    int64_t id = p.ids[row];
    if (id < 0) id = p.picked[-id - 1];
    Pack<T>::load(p.table + id * p.table_row + at).store(p.out + row * p.out_row + at);
  }
}

}  // namespace

void embedding(const Embedding& a) {
  by_dtype(a.out.dtype, [&]<class T>() {
    const int64_t dim = a.out.shape[1];
    EmbeddingParams<T> p{a.out.as<T>(),          a.ids.as<int32_t>(),
                         a.picked.as<int32_t>(), a.table.as<T>(),
                         a.out.shape[0],         dim,
                         a.out.strides[0],       a.table.ndim == 1 ? dim : a.table.strides[0]};
    require(dim % Pack<T>::size == 0, "embedding: dimension ", dim, " is not a multiple of ", Pack<T>::size);
    launch(embedding_kernel<T>, grid_for(p.rows * (dim / Pack<T>::size), 256), 256, 0, a.stream, p);
  });
}

void pack_weight(const PackWeight& a) {
  // Row-major is what the device's products read: one strided copy.
  const size_t row = static_cast<size_t>(a.weight.shape[1] * item_size(a.weight.dtype));
  const size_t pitch = static_cast<size_t>(a.weight.strides[0] * item_size(a.weight.dtype));
  check(cudaMemcpy2DAsync(a.out.data, row, a.weight.data, pitch, row, static_cast<size_t>(a.weight.shape[0]),
                          cudaMemcpyDeviceToDevice, nullptr));
}

}  // namespace hybrid::cuda
