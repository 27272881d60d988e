// How a warp of paged decode gets its keys and values: what the launch is given, and the stream into the warp's ring.
#pragma once

#include "decode_tile.cuh"

namespace hybrid::cuda {

template <class T, class C>
struct DecodeParams : AttentionParams<T, C> {
  float* partials;    // most_units slots for each block that has the first unit of a sequence's head and not the last
  int32_t* counters;  // of such: units that have arrived
  int splits;         // (16 query heads) of a KV head
};

// A place in the plan: `unit` for place `place`, a KV head and up to 16 of its query heads.
struct Position {
  int unit, place;
  __device__ void advance(int units) {
    if (++unit == units) unit = 0, ++place;
  }
};

__device__ inline DecodeUnit read_unit(const PlanView& plan, int unit) {
  const int4 u = __ldcg(reinterpret_cast<const int4*>(plan.unit + unit));
  return {u.x, u.y, u.z, u.w};
}

// One warp's stream of steps from the cache into its ring; knows addresses, not what is computed. One unit is being
// loaded; the next one's block table and the description of the one after it are on their way.
template <class T, class C, int dim, class Shape>
class Feed {
  static constexpr int warps = decode_warps, per_pack = CacheElement<C>::per_pack;

 public:
  // `count` units from `from` on.
  __device__ Feed(const DecodeParams<T, C>& p, const PlanView& plan, int units, Position from, int count, uint32_t ring)
      : p_(p), plan_(plan), units_(units), left_(count), at_(from), far_at_(from.unit), ring_(ring) {
    unit_ = read_unit(plan_, at_.unit);
    ahead_ = read_far();
    far_ = read_far();
    begin_unit();
    find_head();
    blocks_ = find_blocks(unit_, token_);
    blocks_ahead_ = find_blocks(ahead_, ahead_.first() + warp() * Shape::step);
    skip_empty();
  }
  // The next step without its sequence's newest token?
  __device__ bool is_final() const { return left_ > 0 && token_ + Shape::step < unit_.tokens; }
  // Into stage `stage`, as one group of copies; an empty one behind the last step.
  __device__ void load(int stage) {
    if (left_ > 0) {
#pragma unroll
      for (int i = 0; i < Shape::tiles; ++i) {
        if (i == 0 && tile_ == warp_size) blocks_ = find_blocks(unit_, token_), tile_ = 0;
        const int block = __shfl_sync(0xffffffffu, blocks_, tile_ + i);
        load_tile(ring_ + (stage * Shape::stage_packs + i * tile * Shape::row_packs) * 16, token_ + i * tile, block);
      }
      tile_ += Shape::tiles, token_ += warps * Shape::step;
      skip_empty();
    }
    commit_copies();
  }

 private:
  __device__ static int lane() { return threadIdx.x % warp_size; }
  __device__ static int warp() { return threadIdx.x / warp_size; }

  __device__ DecodeUnit read_far() {
    if (++far_at_ == units_) far_at_ = 0;
    return read_unit(plan_, far_at_);
  }
  __device__ void begin_unit() { tile_ = 0, token_ = unit_.first() + warp() * Shape::step, end_ = unit_.end(); }
  __device__ void find_head() {
    const int head = at_.place / p_.splits;
    keys_ = p_.k_cache + head * p_.k_head + lane() * per_pack;
    values_ = p_.v_cache + head * p_.v_head + lane() * per_pack;
  }
  __device__ void skip_empty() {
    while (token_ >= end_) {
      if (--left_ == 0) return;
      const int place = at_.place;
      at_.advance(units_);
      if (at_.place != place) find_head();
      unit_ = ahead_, blocks_ = blocks_ahead_, ahead_ = far_;
      begin_unit();
      blocks_ahead_ = find_blocks(ahead_, ahead_.first() + warp() * Shape::step);
      far_ = read_far();
    }
  }
  // Lane i gets the cache block of tile i of this warp's steps from the one at `token` on.
  __device__ int find_blocks(const DecodeUnit& unit, int token) const {
    const int at = token + lane() / Shape::tiles * (warps * Shape::step) + lane() % Shape::tiles * tile;
    return at < unit.end() ? __ldcg(p_.kv_blocks + unit.kv_start + (at >> p_.block_shift)) : 0;
  }
  __device__ void load_tile(uint32_t to, int token, int block) const {
    const int in_block = (token & ((1 << p_.block_shift) - 1)) * dim;
    const C *keys = keys_ + block * p_.k_block + in_block, *values = values_ + block * p_.v_block + in_block;
    const int valid = unit_.tokens - token;
    constexpr int packs = tile * Shape::head_packs;
#pragma unroll
    for (int i = 0; i * warp_size < packs; ++i) {
      const int pack = i * warp_size + lane(), row = pack / Shape::head_packs;
      if ((i + 1) * warp_size > packs && pack >= packs) break;
      const uint32_t place = to + Shape::pack(row, pack % Shape::head_packs) * 16;
      copy_async(place, keys + i * warp_size * per_pack, row < valid);
      copy_async(place + Shape::packs * 16, values + i * warp_size * per_pack, row < valid);
    }
  }

  const DecodeParams<T, C>& p_;
  const PlanView& plan_;
  int units_, left_;
  Position at_;
  DecodeUnit unit_, ahead_, far_;
  int far_at_, blocks_, blocks_ahead_;
  int tile_, token_, end_;  // the next step's first tile in blocks_, its first token, where the unit ends
  const C *keys_, *values_;
  uint32_t ring_;
};

}  // namespace hybrid::cuda
