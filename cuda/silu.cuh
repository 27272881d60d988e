// silu(gate) * up, the same bits in every kernel that computes it.
#pragma once

namespace hybrid::cuda {

__device__ inline float silu_product(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

}  // namespace hybrid::cuda
