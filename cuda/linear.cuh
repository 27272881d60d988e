// What the kernels of `linear` share: their parameters and the one order in which every output is summed.
//
// k is cut into segments of equal length, a function of k alone. Inside a segment the products are added in ascending
// order by one chain of m16n8k16 steps (each 32-wide span is two steps: elements 0..3, then 4..7 of every 8), segments
// are added from the first to the last, then the bias. All kernels for 16-bit types keep to this, so that a row has the
// same bits whichever of them its batch selects.
#pragma once

#include "launch.cuh"
#include "mma.cuh"
#include "ops/ops.h"
#include "silu.cuh"
#include "vec.cuh"

namespace hybrid::cuda {

constexpr int max_segments = 8;

template <class T>
struct LinearParams {
  T* out;          // or
  float* out_f32;  // the one that is not null
  const T* __restrict__ x;
  const T* __restrict__ weight;
  const T* __restrict__ bias;
  int64_t rows, n, k, out_row, x_row;
  int64_t segment;  // elements of k, a multiple of 64
};

// norm_linear of one row: what is multiplied is its norm, and x is not read. Type of the residual and sum: float.
template <class T>
struct NormedRow {
  const T* x;
  const T* __restrict__ weight;
  const float* residual;
  float* sum;
  float eps;
  bool begins_residual;
};

inline int64_t segment_length(int64_t k) { return ceil_div(ceil_div(k, max_segments), 64) * 64; }

template <class T>
__device__ inline void store_output(const LinearParams<T>& p, int64_t row, int64_t column, float sum) {
  if (row >= p.rows || column >= p.n) return;
  if (p.bias != nullptr) sum += to_float(p.bias[column]);
  const int64_t at = row * p.out_row + column;
  if (p.out_f32 != nullptr)
    p.out_f32[at] = sum;
  else
    p.out[at] = from_float<T>(sum);
}

// Of linear_silu_mul, whose n is twice its output's width: rounds both to T first, as linear and silu_mul would.
template <class T>
__device__ inline void store_gated(const LinearParams<T>& p, int64_t row, int64_t column, float gate, float up) {
  const int64_t dim = p.n / 2;
  if (row >= p.rows || column >= dim) return;
  if (p.bias != nullptr) gate += to_float(p.bias[column]), up += to_float(p.bias[dim + column]);
  p.out[row * p.out_row + column] =
      from_float<T>(silu_product(to_float(from_float<T>(gate)), to_float(from_float<T>(up))));
}

// The two steps of a 32-wide span. Lane 4g + t brings elements 8t .. 8t + 7 of its rows: as both operands are permuted
// alike along k, 16-byte loads are fragments without any shuffle.
template <class T>
__device__ inline void multiply_span(float (&c)[4], const uint4& a_low, const uint4& a_high, const uint4& b) {
  mma<T>(c, a_low.x, a_high.x, a_low.y, a_high.y, b.x, b.y);
  mma<T>(c, a_low.z, a_high.z, a_low.w, a_high.w, b.z, b.w);
}

// The kernels for 16-bit types; the gated ones compute linear_silu_mul. Up to skinny_rows rows: streams the weights.
template <class T>
void skinny_linear(const LinearParams<T>& p, Stream stream);
template <class T>
void skinny_gated_linear(const LinearParams<T>& p, Stream stream);
constexpr int64_t skinny_rows = 32;
// norm_linear of one row. False, and nothing done, where the row is too long.
template <class T>
bool skinny_normed_linear(const LinearParams<T>& p, const NormedRow<T>& norm, bool gated, Stream stream);

template <class T>
void tiled_linear(const LinearParams<T>& p, Stream stream);
void float_linear(const LinearParams<float>& p, Stream stream);

}  // namespace hybrid::cuda
