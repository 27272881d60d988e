// Products of a warpgroup on Hopper's tensor cores (sm_90a): 64 rows a warpgroup, operands of a 16-bit type, float
// sums.
//
// Of a 64-row tile, warp w holds rows [16 w, 16 w + 16) laid out as by mma.sync (mma.cuh): c[n][0..3] are columns
// [8 n, 8 n + 8). Products run in the background: wgmma_fence() before the first, after registers they use changed;
// commit_products() closes a group; until wait_products() the registers of a group may not be touched.
#pragma once

#include "mma.cuh"

namespace hybrid::cuda {

// A tile of shared memory, 128-byte rows of 64 elements with 16-byte pack i of row r stored at pack i ^ r % 8, as a
// product's operand. Rows lie 128 bytes apart; a tile starts at a multiple of 1024 bytes. For a tile whose rows run
// along the depth of the product (transposed), `next_columns` is the distance to the next 64 columns, in bytes.
__device__ inline uint64_t swizzled_tile(uint32_t address, uint32_t next_columns = 0) {
  constexpr uint64_t swizzle_128 = uint64_t{1} << 62, next_8_rows = uint64_t{1024 >> 4} << 32;
  // The same in all lanes anyway; said so, it is computed once a warp.
  const uint32_t low = __shfl_sync(0xffffffffu, next_columns >> 4 << 16 | (address & 0x3ffff) >> 4, 0);
  return swizzle_128 | next_8_rows | low;
}
// The operand that starts `bytes` further.
__device__ inline uint64_t moved(uint64_t tile, int bytes) { return tile + (bytes >> 4); }

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving uses of registers, as of those that a product in the background works on.
__device__ inline void pin(float (&c)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(c[j])::"memory");
}
template <int columns>
__device__ inline void pin(float (&c)[columns][4]) {
#pragma unroll
  for (int n = 0; n < columns; ++n) pin(c[n]);
}

#define HYBRID_C2(c, n)                                                                                                \
  "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3]), "+f"(c[n + 1][0]), "+f"(c[n + 1][1]), "+f"(c[n + 1][2]), \
      "+f"(c[n + 1][3])
#define HYBRID_C8(c, n) HYBRID_C2(c, n), HYBRID_C2(c, n + 2), HYBRID_C2(c, n + 4), HYBRID_C2(c, n + 6)
#define HYBRID_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define HYBRID_32                                                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HYBRID_64                                                                                \
  HYBRID_32                                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HYBRID_96                                                                    \
  HYBRID_64                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define HYBRID_128                                                                               \
  HYBRID_96                                                                                      \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// c = a . b^T or, with `add`, c += a . b^T: 64 x 128 elements over a depth of 16; both operands' rows run along the
// depth.
template <class T>
__device__ inline void product(float (&c)[16][4], uint64_t a, uint64_t b, bool add) {
#define HYBRID_PRODUCT(type)                                                                                     \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type \
               "." type " {" HYBRID_64 "}, %64, %65, add, 1, 1, 0, 0;\n}"                                        \
               : HYBRID_C8(c, 0), HYBRID_C8(c, 8)                                                                \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, BFloat16>)
    HYBRID_PRODUCT("bf16");
  else
    HYBRID_PRODUCT("f16");
#undef HYBRID_PRODUCT
}

// c = a . b^T or, with `add`, c += a . b^T, of as many columns as c has: 64 x 8 for each element of c.
#define HYBRID_PRODUCT(type, shape, list, at_a, at_b, at_add, ...)                                             \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" at_add ", 0;\nwgmma.mma_async.sync.aligned.m64n" shape \
               "k16.f32." type "." type " {" list "}, %" at_a ", %" at_b ", add, 1, 1, 0, 0;\n}"               \
               : __VA_ARGS__                                                                                   \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define HYBRID_PRODUCT_OF(columns, shape, list, at_a, at_b, at_add, ...)                     \
  template <class T>                                                                         \
  __device__ inline void product(float (&c)[columns][4], uint64_t a, uint64_t b, bool add) { \
    if constexpr (std::is_same_v<T, BFloat16>)                                               \
      HYBRID_PRODUCT("bf16", shape, list, at_a, at_b, at_add, __VA_ARGS__);                  \
    else                                                                                     \
      HYBRID_PRODUCT("f16", shape, list, at_a, at_b, at_add, __VA_ARGS__);                   \
  }
HYBRID_PRODUCT_OF(4, "32", HYBRID_16, "16", "17", "18", HYBRID_C2(c, 0), HYBRID_C2(c, 2))
HYBRID_PRODUCT_OF(8, "64", HYBRID_32, "32", "33", "34", HYBRID_C8(c, 0))
HYBRID_PRODUCT_OF(24, "192", HYBRID_96, "96", "97", "98", HYBRID_C8(c, 0), HYBRID_C8(c, 8), HYBRID_C8(c, 16))
HYBRID_PRODUCT_OF(32, "256", HYBRID_128, "128", "129", "130", HYBRID_C8(c, 0), HYBRID_C8(c, 8), HYBRID_C8(c, 16),
                  HYBRID_C8(c, 24))
#undef HYBRID_PRODUCT_OF
#undef HYBRID_PRODUCT

// c += a . b: a in registers as by mma.sync, the rows of b run along the columns of c, 64 or 128 of them.
template <class T>
__device__ inline void add_product(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
#define HYBRID_PRODUCT(type)                                                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" HYBRID_64 \
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                 \
               : HYBRID_C8(c, 0), HYBRID_C8(c, 8)                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (std::is_same_v<T, BFloat16>)
    HYBRID_PRODUCT("bf16");
  else
    HYBRID_PRODUCT("f16");
#undef HYBRID_PRODUCT
}
template <class T>
__device__ inline void add_product(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
#define HYBRID_PRODUCT(type)                                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" HYBRID_32 \
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                \
               : HYBRID_C8(c, 0)                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (std::is_same_v<T, BFloat16>)
    HYBRID_PRODUCT("bf16");
  else
    HYBRID_PRODUCT("f16");
#undef HYBRID_PRODUCT
}

#undef HYBRID_C2
#undef HYBRID_C8
#undef HYBRID_16
#undef HYBRID_32
#undef HYBRID_64
#undef HYBRID_96
#undef HYBRID_128

}  // namespace hybrid::cuda
