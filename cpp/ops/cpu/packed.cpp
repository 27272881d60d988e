// The packed layout of linear weights on a CPU: writing it, and reading single rows of it as an embedding table.
#include "ops/cpu/packed.h"

#include <algorithm>

#include "ops/cpu/thread_pool.h"
#include "ops/dispatch.h"
#include "ops/ops.h"

namespace hybrid {

int64_t packed_size(int64_t n, int64_t k) {
  return (n + cpu::panel_columns - 1) / cpu::panel_columns * cpu::panel_columns * cpu::padded_k(k);
}

namespace cpu {

namespace {

template <class T>
void pack_panel(T* out, const PackWeight& args, int64_t panel) {
  const int64_t n = args.weight.shape[0], k = args.weight.shape[1];
  std::fill_n(out, panel_columns * padded_k(k), T{});
  const int64_t columns = std::min(panel_columns, n - panel * panel_columns);
  for (int64_t column = 0; column < columns; ++column) {
    const T* row = args.weight.as<T>() + (panel * panel_columns + column) * args.weight.strides[0];
    for (int64_t i = 0; i < k; ++i) out[packed_offset<T>(column, i)] = row[i];
  }
}

template <class T>
void unpack_row(T* out, const T* table, int64_t id, int64_t k) {
  const T* panel = table + id / panel_columns * panel_columns * padded_k(k);
  for (int64_t i = 0; i < k; ++i) out[i] = panel[packed_offset<T>(id % panel_columns, i)];
}

}  // namespace

void pack_weight(const PackWeight& args) {
  const int64_t n = args.weight.shape[0], panel_size = panel_columns * padded_k(args.weight.shape[1]);
  by_dtype(args.weight.dtype, [&]<class T>() {
    pool().parallel_for((n + panel_columns - 1) / panel_columns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) pack_panel(args.out.as<T>() + panel * panel_size, args, panel);
    });
  });
}

void embedding(const Embedding& args) {
  const int64_t dim = args.out.shape[1];
  const bool packed = args.table.ndim == 1;
  by_dtype(args.out.dtype, [&]<class T>() {
    pool().parallel_for(args.out.shape[0], rows_per_piece(dim * 16), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        int64_t id = args.ids.as<int32_t>()[row * args.ids.strides[0]];
        if (id < 0) id = args.picked.as<int32_t>()[-id - 1];
        T* out = args.out.as<T>() + row * args.out.strides[0];
        if (packed)
          unpack_row(out, args.table.as<T>(), id, dim);
        else
          std::copy_n(args.table.as<T>() + id * args.table.strides[0], dim, out);
      }
    });
  });
}

}  // namespace cpu
}  // namespace hybrid
