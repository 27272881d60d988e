// The computing warpgroups of linear_sm90.cu.
#pragma once

#include <iterator>
#include <utility>

#include "linear_tiles.cuh"
#include "wgmma.cuh"

namespace hybrid::cuda::tiles {

// The transpose of an 8 x 8 matrix of pairs as mma.sync's results lie.
__device__ inline uint32_t transposed(uint32_t pairs) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(pairs));
  return r;
}

// A computing warpgroup: 64 rows of the weight of every tile.
template <class T, class Tile>
class Consumer {
  static constexpr int eights = Tile::rows / 8;       // of rows of x
  static constexpr int batch = eights >= 16 ? 4 : 2;  // of them, and
  static constexpr int few_sharers = 4;               // to be read at a time
  using Sums = float[eights][4];

 public:
  __device__ Consumer(const Params<T>& params, const Layout<Tile>& layout)
      : params_(params),
        p_(params.linear),
        layout_(layout),
        lane_(threadIdx.x % warp_size),
        strip_(threadIdx.x / warp_size - group_threads / warp_size) {}

  __device__ void run() {
    Shares shares(params_.schedule, Tile::cluster_index());
    Share share;
    while (shares.next(share)) {
      Sums c;
      multiply(share, c);
      const Output to(*this, share);
      if ((share.begin == 0 && share.end == params_.schedule.slices) || add_parts(share, c, to)) store(to, c);
    }
  }

 private:
  // Where this lane's outputs of a tile go. Floats: of every eight two rows and, 8 apart, two columns. Else four
  // columns of one row: of the strip's 16 columns; gated, where it has 8, of two eights.
  struct Output {
    int64_t at;          // of the first
    int rows, columns;   // left from there on
    float bias[2] = {};  // of the sums' two columns

    __device__ Output(const Consumer& c, const Share& share) {
      const LinearParams<T>& p = c.p_;
      const int x_tiles = c.params_.x_tiles, tile = share.tile / x_tiles * Tile::cluster + Tile::rank();
      const int g = c.lane_ / 4, t = c.lane_ % 4;
      const bool wide = p.out_f32 != nullptr;
      const int64_t width = Tile::gated ? p.n / 2 : p.n;
      const int64_t strip = (int64_t{tile} * Tile::strips + c.strip_) * (Tile::gated ? 8 : 16);
      const int64_t column = strip + (wide ? g : t / 2 * 4 + (Tile::gated ? 0 : t % 2 * 8));
      const int64_t row =
          int64_t{share.tile % x_tiles} * Tile::rows + (wide ? 2 * t : g + (Tile::gated ? t % 2 * 8 : 0));
      at = row * p.out_row + column;
      const int64_t tile_end = int64_t{share.tile % x_tiles + 1} * Tile::rows;
      rows = static_cast<int>(min(p.rows, tile_end) - row);
      columns = static_cast<int>(min(width - column, int64_t{16}));
      if (p.bias == nullptr) return;
      const int64_t low = strip + g, high = Tile::gated ? width + low : low + 8;
      if (low < width) bias[0] = to_float(p.bias[low]);
      if (high < p.n) bias[1] = to_float(p.bias[high]);
    }
  };

  __device__ void multiply(const Share& share, Sums& c) {
    const uint64_t a0 = swizzled_tile(layout_.start + strip_ / 4 * 64 * row_bytes),
                   b0 = swizzled_tile(layout_.start + Tile::weight_bytes);
    const auto start_products = [&]<bool first>() {
      layout_.ring.wait_full(used_);
      const int stage = Layout<Tile>::Stages::stage(used_) * Tile::stage_bytes;
      const uint64_t a = moved(a0, stage), b = moved(b0, stage);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < slice / 16; ++k) product<T>(c, moved(a, k * 32), moved(b, k * 32), !first || k > 0);
      commit_products();
      ++used_;
    };
    pin(c);
    start_products.template operator()<true>();
#pragma unroll 1
    for (int at = share.begin + 1; at < share.end; ++at) {
      start_products.template operator()<false>();
      wait_products<1>();
      release(used_ - 2);
    }
    wait_products<0>();
    pin(c);
    release(used_ - 1);
  }
  // A stage may be filled when all warps of all blocks of the cluster have left it.
  __device__ void release(uint32_t n) const {
    __syncwarp();
    if constexpr (Tile::cluster == 1) {
      if (lane_ == 0) arrive(layout_.ring.empty(n));
    } else {
      if (lane_ < Tile::cluster) arrive_at(layout_.ring.empty(n), lane_);
    }
  }

  // Where a cluster leaves its part of its first or second cut tile.
  __device__ float4* partial(int owner, bool second) const {
    const int64_t slot = (int64_t{owner} * Tile::cluster + Tile::rank()) * 2 + second;
    return params_.partial + slot * eights * Tile::computing_threads + (threadIdx.x - group_threads);
  }
  // Of a tile cut among clusters. True where this warp has the sums in c. Else it leaves its part for the others, and
  // if this is the last work of the cluster, adds and stores its share of the tile.
  __device__ bool add_parts(const Share& share, Sums& c, const Output& to) const {
    const Schedule& s = params_.schedule;
    const int tile_end = (share.tile + 1) * s.slices, head = s.owner(share.tile * s.slices);
    const int sharers = s.owner(tile_end - 1) - head + 1, me = Tile::cluster_index() - head;
    const int adders = sharers - (s.begin(head + sharers) > tile_end);  // the last one may have more to do
    const bool second = s.begin(head) < share.tile * s.slices;          // of the head; to the others it is the first
    int32_t* const count = params_.counters + (share.tile * Tile::cluster + Tile::rank()) * Tile::strips + strip_;
    const bool alone = adders == 1 && me == 0;
    if (!alone) {
      float4* const mine = partial(head + me, me == 0 && second);
#pragma unroll
      for (int e = 0; e < eights; ++e)
        __stcg(mine + e * Tile::computing_threads, make_float4(c[e][0], c[e][1], c[e][2], c[e][3]));
    }
    __syncwarp();
    if (lane_ == 0) add_release(count, 1);
    if (me >= adders) return false;
    if (lane_ == 0) {
      while (read_acquire(count) < sharers) {
      }
      if (add_release(count, 1) == sharers + adders - 1) *count = 0;  // all know
    }
    __syncwarp();
    if (alone) {
      for (int i = 1; i < sharers; ++i) add_part(c, partial(head + i, false));
      return true;
    }
    const int last = (me + 1) * (eights / 2) / adders * 2;
    for (int e = me * (eights / 2) / adders * 2; e < last; e += batch)
      add_eights(head, second, sharers, e, min(batch, last - e), to);
    return false;
  }
  __device__ static void add_part(Sums& c, const float4* part) {
    constexpr int at_a_time = eights < 8 ? eights : 8;
#pragma unroll
    for (int e0 = 0; e0 < eights; e0 += at_a_time) {
      float4 v[at_a_time];
#pragma unroll
      for (int e = 0; e < at_a_time; ++e) v[e] = __ldcg(part + (e0 + e) * Tile::computing_threads);
#pragma unroll
      for (int e = 0; e < at_a_time; ++e)
        c[e0 + e][0] += v[e].x, c[e0 + e][1] += v[e].y, c[e0 + e][2] += v[e].z, c[e0 + e][3] += v[e].w;
    }
  }
  // Adds the parts of eights [e0, e0 + count) in the order of k and stores the sums.
  __device__ void add_eights(int head, bool second, int sharers, int e0, int count, const Output& to) const {
    float sum[batch][4] = {};
    for (int first = 0; first < sharers; first += few_sharers) {
      float4 v[few_sharers][batch] = {};
#pragma unroll
      for (int i = 0; i < few_sharers; ++i) {
        const float4* const part = partial(head + first + i, first + i == 0 && second) + e0 * Tile::computing_threads;
#pragma unroll
        for (int e = 0; e < batch; ++e)
          if (first + i < sharers && e < count) v[i][e] = __ldcg(part + e * Tile::computing_threads);
      }
#pragma unroll
      for (int i = 0; i < few_sharers; ++i)
#pragma unroll
        for (int e = 0; e < batch; ++e)
          sum[e][0] += v[i][e].x, sum[e][1] += v[i][e].y, sum[e][2] += v[i][e].z, sum[e][3] += v[i][e].w;
    }
#pragma unroll
    for (int e = 0; e < batch; e += 2)
      if (e < count) store_eights<2>(to, e0 + e, sum, e);
  }

  __device__ void store(const Output& to, Sums& c) const {
    constexpr int at_a_time = eights < 4 ? 2 : 4;
    // Not a loop: where the compiler did not unroll it, the sums would lie in memory.
    [&]<int... i>(std::integer_sequence<int, i...>) {
      (store_eights<at_a_time>(to, i * at_a_time, c, i * at_a_time), ...);
    }(std::make_integer_sequence<int, eights / at_a_time>());
  }
  // Stores `count` eights from e0 on, whose sums begin at `first`: so many at a time hide their latency and need few
  // registers.
  template <int count, int size>
  __device__ void store_eights(const Output& to, int e0, float (&sum)[size][4], int first) const {
#pragma unroll
    for (int e = 0; e < count; ++e) {
      pin(sum[first + e]);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[first + e][j] += to.bias[j / 2];
    }
    if (!Tile::gated && p_.out_f32 != nullptr) {
#pragma unroll
      for (int e = 0; e < count; ++e) store_floats(to, e0 + e, sum[first + e]);
      return;
    }
    uint32_t pairs[Tile::gated ? count : 2 * count];  // two rows of x, one column
#pragma unroll
    for (int e = 0; e < count; ++e) {
      const float (&s)[4] = sum[first + e];
      if constexpr (Tile::gated)
        pairs[e] = pair_of<T>(gate(s[0], s[2]), gate(s[1], s[3]));
      else
        pairs[2 * e] = pair_of<T>(s[0], s[1]), pairs[2 * e + 1] = pair_of<T>(s[2], s[3]);
    }
#pragma unroll
    for (uint32_t& pair : pairs) pair = transposed(pair);
#pragma unroll
    for (int i = 0; i < static_cast<int>(std::size(pairs)); i += 2)
      store_four(to, e0 + (Tile::gated ? i : i / 2), pairs[i], pairs[i + 1]);
  }
  // Rounds both to T first, as linear and silu_mul would.
  __device__ static float gate(float gate, float up) {
    return silu_product(to_float(from_float<T>(gate)), to_float(from_float<T>(up)));
  }
  __device__ void store_floats(const Output& to, int e, const float (&sum)[4]) const {
    float* const out = p_.out_f32 + to.at + e * 8 * p_.out_row;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (e * 8 + j % 2 < to.rows && to.columns > j / 2 * 8) out[j % 2 * p_.out_row + j / 2 * 8] = sum[j];
  }
  // Of two matrices every lane has two columns of a row: neighbouring lanes exchange halves, for four columns of one.
  __device__ void store_four(const Output& to, int e, uint32_t low, uint32_t high) const {
    const bool odd = lane_ % 2 == 1;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
    const uint2 four = odd ? make_uint2(other, high) : make_uint2(low, other);
    T* const out = p_.out + to.at + e * 8 * p_.out_row;
    if (e * 8 >= to.rows) return;
    if (params_.fours) {
      if (to.columns > 0) *reinterpret_cast<uint2*>(out) = four;
    } else {
      if (to.columns > 0) out[0].bits = static_cast<uint16_t>(four.x);
      if (to.columns > 1) out[1].bits = static_cast<uint16_t>(four.x >> 16);
      if (to.columns > 2) out[2].bits = static_cast<uint16_t>(four.y);
      if (to.columns > 3) out[3].bits = static_cast<uint16_t>(four.y >> 16);
    }
  }

  const Params<T>& params_;
  const LinearParams<T>& p_;
  const Layout<Tile>& layout_;
  const int lane_, strip_;  // strip: 16 rows of the tile's weight
  uint32_t used_ = 0;       // stages of the ring, ever
};

}  // namespace hybrid::cuda::tiles
