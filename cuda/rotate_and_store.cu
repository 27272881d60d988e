// rotate_and_store: head norm, rotary embedding and cache write of one step's q, k and v in one pass.
//
// A block works on heads of one row. `lanes` threads share a head; each holds two packs of it, the ones that turn
// together, so only the norm's sum crosses threads. Values of v are copied by the same grid. Ahead of the wait it
// reads what no kernel of a step writes: slot, position, angles and the norm's weights. Without a norm the results are
// the CPU's bit for bit. Moves 2 x rows x (heads + 2 x kv_heads) x dim x sizeof(T) bytes, fewer where the cache is of
// Float8: memory-bound.
#include <bit>

#include "cache_element.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "ops/dispatch.h"
#include "ops/ops.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace hybrid::cuda {

namespace {

template <class T, class C>
struct RotateAndStoreParams {
  T* q;
  C *k_cache, *v_cache;
  const T *k, *v;  // written by the kernel before, so read as ordinary memory
  const T* __restrict__ q_weight, * __restrict__ k_weight;
  const float* __restrict__ cos_sin;
  const int32_t* __restrict__ positions;
  const int64_t* __restrict__ slots;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, k_block, v_block, cos_sin_row;  // strides, in elements
  int heads, kv_heads, dim, half;                                                      // half: rotary_dim / 2
  uint32_t block_size;
  float eps;
  float k_factor, v_factor;  // of what a Float8 cache keeps: 1 / scale
};

// The part of a head that one thread holds: two packs that turn together.
template <class T>
struct HeadPart {
  static constexpr int per = Pack<T>::size;
  Pack<T> first, second;

  __device__ void load(const T* head, int at, int other) {
    first = Pack<T>::load(head + at), second = Pack<T>::load(head + other);
  }
  __device__ void store(T* head, int at, int other) const { first.store(head + at), second.store(head + other); }
  // To a cache of either type.
  __device__ void store_scaled(T* head, int at, int other, float) const { store(head, at, other); }
  __device__ void store_scaled(Float8* head, int at, int other, float by) const {
    const auto narrow = [by](const Pack<T>& x, Float8* to) {
      float wide[per];
      uint32_t bytes[per / 4];
      x.widen(wide);
#pragma unroll
      for (int i = 0; i < per / 4; ++i) {
        const float* four = wide + 4 * i;
        bytes[i] = narrowed(__fmul_rn(four[0], by), __fmul_rn(four[1], by)) |
                   narrowed(__fmul_rn(four[2], by), __fmul_rn(four[3], by)) << 16;
      }
      if constexpr (per == 8)
        *reinterpret_cast<uint2*>(to) = make_uint2(bytes[0], bytes[1]);
      else
        *reinterpret_cast<uint32_t*>(to) = bytes[0];
    };
    narrow(first, head + at), narrow(second, head + other);
  }
  __device__ float squares() const {
    float a[per], b[per], sum = 0.0f;
    first.widen(a), second.widen(b);
#pragma unroll
    for (int i = 0; i < per; ++i) sum = fmaf(a[i], a[i], fmaf(b[i], b[i], sum));
    return sum;
  }
  __device__ void scale(float by, const HeadPart& weight) {
    const auto scaled = [by](const Pack<T>& x, const Pack<T>& w) {
      float a[per], b[per];
      x.widen(a), w.widen(b);
#pragma unroll
      for (int i = 0; i < per; ++i) a[i] = a[i] * by * b[i];
      return Pack<T>::narrow(a);
    };
    first = scaled(first, weight.first), second = scaled(second, weight.second);
  }
  __device__ void turn(const float (&cosine)[per], const float (&sine)[per]) {
    float a[per], b[per], x[per], y[per];
    first.widen(a), second.widen(b);
#pragma unroll
    for (int i = 0; i < per; ++i) {
      x[i] = __fsub_rn(__fmul_rn(a[i], cosine[i]), __fmul_rn(b[i], sine[i]));
      y[i] = __fadd_rn(__fmul_rn(b[i], cosine[i]), __fmul_rn(a[i], sine[i]));
    }
    first = Pack<T>::narrow(x), second = Pack<T>::narrow(y);
  }
};

template <int count>
__device__ inline void load_floats(float (&to)[count], const float* __restrict__ from) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// `turns` heads a thread: more loads in flight, angles read once.
template <class T, class C, int lanes, int turns>
__global__ void __launch_bounds__(256) rotate_and_store_kernel(const __grid_constant__ RotateAndStoreParams<T, C> p) {
  let_next_kernel_start();
  constexpr int per = Pack<T>::size;
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % lanes, groups = blockDim.x / lanes;
  const int first_head = static_cast<int>(blockIdx.y) * groups * turns + static_cast<int>(threadIdx.x) / lanes;
  // The lanes behind those that turn share what is behind rotary_dim.
  const int turning = p.half / per, working = p.dim / per / 2;
  const bool works = lane < working, turns_pair = lane < turning;
  const int at = (turns_pair ? lane : lane + turning) * per;
  const int other = at + (turns_pair ? turning : working - turning) * per;
  const int64_t slot = p.slots[row];
  float cosine[per], sine[per];
  if (turns_pair) {
    const float* angles = p.cos_sin + p.positions[row] * p.cos_sin_row + lane * per;
    load_floats(cosine, angles);
    load_floats(sine, angles + p.half);
  }
  const int first_key = p.heads, first_value = first_key + p.kv_heads, end = first_value + p.kv_heads;
  const auto has_work = [&](int head) { return works && head < (slot < 0 ? first_key : end); };
  HeadPart<T> weight[turns] = {}, x[turns] = {};
  if (p.q_weight != nullptr) {
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
      const int head = first_head + turn * groups;
      if (works && head < first_value) weight[turn].load(head < first_key ? p.q_weight : p.k_weight, at, other);
    }
  }
  wait_for_previous_kernel();

#pragma unroll
  for (int turn = 0; turn < turns; ++turn) {
    const int head = first_head + turn * groups;
    if (!has_work(head)) continue;
    const T* from = head < first_key     ? p.q + row * p.q_row + head * p.q_head
                    : head < first_value ? p.k + row * p.k_row + (head - first_key) * p.k_head
                                         : p.v + row * p.v_row + (head - first_value) * p.v_head;
    x[turn].load(from, at, other);
  }
  const uint32_t block = static_cast<uint32_t>(slot) / p.block_size, token = static_cast<uint32_t>(slot) % p.block_size;
#pragma unroll
  for (int turn = 0; turn < turns; ++turn) {
    const int head = first_head + turn * groups;
    if (p.q_weight != nullptr) {
      float sum = x[turn].squares();
#pragma unroll
      for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (head < first_value) x[turn].scale(rsqrtf(sum / static_cast<float>(p.dim) + p.eps), weight[turn]);
    }
    if (!has_work(head)) continue;
    if (turns_pair && head < first_value) x[turn].turn(cosine, sine);
    if (head < first_key) {
      x[turn].store(p.q + row * p.q_row + head * p.q_head, at, other);
      continue;
    }
    const bool is_key = head < first_value;
    const int64_t in_block = (int64_t{head - (is_key ? first_key : first_value)} * p.block_size + token) * p.dim;
    C* to = is_key ? p.k_cache + block * p.k_block + in_block : p.v_cache + block * p.v_block + in_block;
    x[turn].store_scaled(to, at, other, is_key ? p.k_factor : p.v_factor);
  }
}

template <class T, class C, int lanes>
void launch_with(const RotateAndStoreParams<T, C>& p, int64_t rows, Stream stream) {
  const int64_t heads = p.heads + 2 * p.kv_heads;
  const auto run = [&]<int turns>() {
    // A row's threads in equal blocks of up to 128, none of them half idle.
    const int64_t threads = ceil_div(heads, turns) * lanes, blocks = ceil_div(threads, 128);
    const int64_t block = ceil_div(ceil_div(threads, blocks), warp_size) * warp_size;
    const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(heads, block / lanes * turns)));
    launch(rotate_and_store_kernel<T, C, lanes, turns>, grid, static_cast<unsigned>(block), 0, stream, p);
  };
  if (rows * heads * lanes > multiprocessors() * 4096)
    run.template operator()<2>();
  else
    run.template operator()<1>();
}

}  // namespace

void rotate_and_store(const RotateAndStore& a) {
  by_cache_dtype(a.q.dtype, a.k_cache.dtype, [&]<class T, class C>() {
    constexpr int per = Pack<T>::size;
    const int64_t dim = a.q.shape[2], half = a.cos_sin.shape[1] / 2, block_size = a.k_cache.shape[2];
    require(dim % (2 * per) == 0 && half % per == 0 && dim <= 2 * per * warp_size, "rotate_and_store: head size ", dim,
            " and rotary_dim ", 2 * half, " must be multiples of ", 2 * per, ", at most ", 2 * per * warp_size);
    require(a.k_cache.shape[0] * block_size <= int64_t{1} << 32, "rotate_and_store: ", a.k_cache.shape[0],
            " blocks of ", block_size, " are more than 2^32 slots");
    for (const TensorView* t : {&a.q, &a.k_cache, &a.v_cache, &a.k, &a.v, &a.q_weight, &a.k_weight, &a.cos_sin})
      require_packs("rotate_and_store", *t);
    const RotateAndStoreParams<T, C> p{a.q.as<T>(),
                                       a.k_cache.as<C>(),
                                       a.v_cache.as<C>(),
                                       a.k.as<T>(),
                                       a.v.as<T>(),
                                       a.q_weight.as<T>(),
                                       a.k_weight.as<T>(),
                                       a.cos_sin.as<float>(),
                                       a.positions.as<int32_t>(),
                                       a.slots.as<int64_t>(),
                                       a.q.strides[0],
                                       a.q.strides[1],
                                       a.k.strides[0],
                                       a.k.strides[1],
                                       a.v.strides[0],
                                       a.v.strides[1],
                                       a.k_cache.strides[0],
                                       a.v_cache.strides[0],
                                       a.cos_sin.strides[0],
                                       static_cast<int>(a.q.shape[1]),
                                       static_cast<int>(a.k.shape[1]),
                                       static_cast<int>(dim),
                                       static_cast<int>(half),
                                       static_cast<uint32_t>(block_size),
                                       a.eps,
                                       1.0f / a.k_scale,
                                       1.0f / a.v_scale};
    switch (std::bit_ceil(static_cast<uint64_t>(dim / per / 2))) {
      case 32:
        return launch_with<T, C, 32>(p, a.q.shape[0], a.stream);
      case 16:
        return launch_with<T, C, 16>(p, a.q.shape[0], a.stream);
      case 8:
        return launch_with<T, C, 8>(p, a.q.shape[0], a.stream);
      default:
        return launch_with<T, C, 4>(p, a.q.shape[0], a.stream);
    }
  });
}

}  // namespace hybrid::cuda
