// How the clusters of a launch share its tiles: whole tiles in turn, and those that are left over, or all where they
// are few, cut along k into equal shares.
#pragma once

namespace hybrid::cuda {

// Slices [begin, end) of a tile.
struct Share {
  int tile, begin, end;
};

struct Schedule {
  int tiles, slices;  // of a tile, along k
  int clusters;
  int cut_tiles, cutters;  // the first tiles are cut, among the first clusters

  // Where cluster c's part of the cut tiles begins, in slices; that of c + 1 is where it ends.
  __device__ int begin(int c) const { return c < cutters ? cut_tiles * slices * c / cutters : cut_tiles * slices; }
  // The cluster whose part has this slice of the cut tiles.
  __device__ int owner(int slice) const { return ((slice + 1) * cutters - 1) / (cut_tiles * slices); }
};

// The shares of one cluster, in order.
class Shares {
 public:
  __device__ Shares(const Schedule& all, int cluster)
      : all_(all), next_(all.begin(cluster)), end_(all.begin(cluster + 1)), tile_(all.cut_tiles + cluster) {}

  __device__ bool next(Share& share) {
    if (next_ < end_) {
      share.tile = next_ / all_.slices, share.begin = next_ % all_.slices;
      share.end = min(all_.slices, share.begin + end_ - next_);
      next_ += share.end - share.begin;
      return true;
    }
    share = {tile_, 0, all_.slices};
    tile_ += all_.clusters;
    return share.tile < all_.tiles;
  }

 private:
  const Schedule& all_;
  int next_, end_;
  int tile_;  // the next whole one
};

}  // namespace hybrid::cuda
