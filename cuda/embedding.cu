// embedding: rows of the table by token id, 16 bytes a thread and turn; memory-bound. The table is row-major on this
// device, whether packed or plain. A row that is known by its own id is read ahead of the wait: ids come by a copy,
// `picked` from a kernel.
#include "launch.cuh"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "vec.cuh"

namespace hybrid::cuda {

namespace {

template <class T>
struct EmbeddingParams {
  T* out;
  const int32_t* __restrict__ ids;
  const int32_t* picked;
  const T* __restrict__ table;
  int64_t dim, out_row, table_row;
};

template <class T>
__global__ void embedding_kernel(const __grid_constant__ EmbeddingParams<T> p) {
  let_next_kernel_start();
  constexpr int per = Pack<T>::size;
  const int64_t row = blockIdx.x, at = (blockIdx.y * int64_t{blockDim.x} + threadIdx.x) * per;
  if (at >= p.dim) return;
  const int64_t id = p.ids[row];
  Pack<T> values{};
  if (id >= 0) values = Pack<T>::load(p.table + id * p.table_row + at);
  wait_for_previous_kernel();
  if (id < 0) values = Pack<T>::load(p.table + p.picked[-id - 1] * p.table_row + at);
  values.store(p.out + row * p.out_row + at);
}

}  // namespace

void embedding(const Embedding& a) {
  by_dtype(a.out.dtype, [&]<class T>() {
    const int64_t dim = a.out.shape[1];
    EmbeddingParams<T> p{a.out.as<T>(),
                         a.ids.as<int32_t>(),
                         a.picked.as<int32_t>(),
                         a.table.as<T>(),
                         dim,
                         a.out.strides[0],
                         a.table.ndim == 1 ? dim : a.table.strides[0]};
    require(dim % Pack<T>::size == 0, "embedding: dimension ", dim, " is not a multiple of ", Pack<T>::size);
    for (const TensorView* t : {&a.out, &a.table}) require_packs("embedding", *t);
    const int64_t packs = dim / Pack<T>::size, threads = std::min<int64_t>(ceil_div(packs, 32) * 32, 256);
    const dim3 grid(static_cast<unsigned>(a.out.shape[0]), static_cast<unsigned>(ceil_div(packs, threads)));
    launch(embedding_kernel<T>, grid, static_cast<unsigned>(threads), 0, a.stream, p);
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
