// linear of 16-bit types on Hopper's warpgroup products (linear_sm90.cu).
#pragma once

#include <optional>

#include "linear.cuh"

namespace hybrid::cuda {

// How a launch is cut: into tiles of 128 columns of the output (gated: 64 of gate, 64 of up), which are rows of the
// weight, by `rows` of x. The blocks of a cluster take neighbouring columns and share what they read of x.
struct TilePlan {
  int rows;      // 32, 64 or 128; gated also 192 or 256
  int cluster;   // 1 or, gated and of 256 rows, 2
  int clusters;  // of the launch, at most as many as have a multiprocessor for each of their blocks
};
// None: other kernels are faster, or the device or the build has no warpgroup products, or gate and up are no multiple
// of 8 wide.
std::optional<TilePlan> plan_tiles(bool gated, int64_t rows, int64_t n, int64_t k);

// Gated: linear_silu_mul, of gates and ups that are a multiple of 8 wide. A row's bits depend on the plan.
template <class T>
void warpgroup_linear(const LinearParams<T>& p, bool gated, const TilePlan& plan, Stream stream);

}  // namespace hybrid::cuda
