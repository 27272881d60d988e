// silu(gate) * up, the same bits in every kernel that computes it. The division may be off by two units in the last
// place of a float, far below what its result is rounded to.
#pragma once

namespace hybrid::cuda {

__device__ inline float silu_product(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

}  // namespace hybrid::cuda
