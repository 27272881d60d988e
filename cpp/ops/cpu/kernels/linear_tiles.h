// The inner loops of linear: a few rows of x times one panel of 32 outputs, by fused multiply-add or by bf16 dot
// product.
//
// A Tile policy says
//   X                how x is prepared (rows of k elements, zero-padded to a multiple of k_step),
//   max_rows         how many rows' accumulators fit in the registers,
//   row_step         rows are prepared (with zeros) up to a multiple of it,
//   Session          state of the thread while it runs tiles,
//   run(...)         acc[rows][32] = or += x @ panel^T over `steps` steps of k (a step is 1 element, or 2 of a 16-bit
//   type).
// Each output is one chain of additions in the order of k, whatever the number of rows: this is what makes results
// independent of the batch. Latency is hidden by the other outputs' chains, never by splitting k.
#pragma once

#include "ops/cpu/packed.h"
#include "ops/cpu/vec.h"

namespace hybrid::cpu::HYBRID_ISA {

struct NoSession {
  ~NoSession() {}
};

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// How far ahead of the multiplication weights are fetched. They are one stream through all panels, so running past the
// end of a panel fetches the next one.
constexpr int64_t prefetch_bytes = 2048;

// One vector of outputs' weights of one step, as f32.
inline void load_group(const float* w, F32 (&out)[1]) { out[0] = F32::load(w); }

#if defined(__AVX512F__)
inline void load_group(const BFloat16* w, F32 (&out)[2]) {
  const __m512i raw = _mm512_loadu_si512(w);
  out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
  out[1] = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void load_group(const Float16* w, F32 (&out)[2]) {
  const __m512i raw = _mm512_loadu_si512(w);
  out[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(raw));
  out[1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(raw, 16)));
}
#elif defined(__AVX2__)
inline void load_group(const BFloat16* w, F32 (&out)[2]) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
  out[1] = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void load_group(const Float16* w, F32 (&out)[2]) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  const __m256i low = _mm256_and_si256(raw, _mm256_set1_epi32(0xffff)), high = _mm256_srli_epi32(raw, 16);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);  // 8 first, then 8 second ones
  out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}
#else
template <class T>
void load_group(const T* w, F32 (&out)[2]) {
  for (int i = 0; i < F32::width; ++i)
    for (int j = 0; j < 2; ++j) out[j].v[i] = static_cast<float>(w[2 * i + j]);
}
#endif

// Calls body.template operator()<rows>() for rows in [1, max_rows].
template <int max_rows, class Body>
void by_rows(int rows, const Body& body) {
  if constexpr (max_rows > 1)
    if (rows < max_rows) return by_rows<max_rows - 1>(rows, body);
  body.template operator()<max_rows>();
}

// f32 arithmetic; weights of 16 bits are widened on the way in.
template <class T>
struct FmaTile {
  using X = float;
  using Session = NoSession;
  static constexpr int max_rows = F32::width == 16 ? 12 : 4;  // of 32 registers, or of 16
  static constexpr int row_step = 1;
  static constexpr int64_t group = sizeof(T) == 2 ? 2 : 1, k_step = group;

  // `vectors` registers' worth of columns of the panel.
  template <int rows, int vectors>
  static void run_columns(const float* x, int64_t x_stride, const T* w, int64_t steps, float* acc, bool resume) {
    F32 sum[rows][vectors];
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < vectors; ++j)
        sum[r][j] = resume ? F32::load(acc + r * panel_columns + j * F32::width) : F32(0.0f);
    for (int64_t step = 0; step < steps; ++step, w += panel_columns * group, x += group) {
      for (int64_t line = 0; line < int64_t{vectors} * F32::width * group * static_cast<int64_t>(sizeof(T)); line += 64)
        prefetch(reinterpret_cast<const char*>(w) + line + prefetch_bytes);
      F32 weight[vectors][group];
      for (int j = 0; j < vectors; ++j) load_group(w + j * F32::width * group, weight[j]);
      for (int i = 0; i < group; ++i)
        for (int r = 0; r < rows; ++r) {
          const F32 value(x[r * x_stride + i]);
          for (int j = 0; j < vectors; ++j) sum[r][j] = fma(value, weight[j][i], sum[r][j]);
        }
    }
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < vectors; ++j) sum[r][j].store(acc + r * panel_columns + j * F32::width);
  }

  static void run(int rows, const float* x, int64_t x_stride, const T* w, int64_t steps, float* acc, bool resume) {
    by_rows<max_rows>(rows, [&]<int count>() {
      constexpr int vectors = F32::width == 8 && count == 1 ? 4 : 2;  // one row alone needs more chains to hide latency
      for (int64_t column = 0; column < panel_columns; column += vectors * F32::width)
        run_columns<count, vectors>(x, x_stride, w + column * group, steps, acc + column, resume);
    });
  }
};

#if defined(__AVX512BF16__)

struct DotTile {
  using X = BFloat16;
  using Session = NoSession;
  static constexpr int max_rows = 12;  // 24 accumulators, 2 weights
  static constexpr int row_step = 1;
  static constexpr int64_t group = 2, k_step = 2;

  static __m512bh pair(const BFloat16* x) {
    int bits;
    std::memcpy(&bits, x, sizeof bits);
    return std::bit_cast<__m512bh>(_mm512_set1_epi32(bits));
  }

  template <int rows>
  static void run(const BFloat16* x, int64_t x_stride, const BFloat16* w, int64_t steps, float* acc, bool resume) {
    __m512 sum[rows][2];
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < 2; ++j)
        sum[r][j] = resume ? _mm512_loadu_ps(acc + r * panel_columns + j * 16) : _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; ++step, w += 2 * panel_columns, x += 2) {
      prefetch(reinterpret_cast<const char*>(w) + prefetch_bytes);
      prefetch(reinterpret_cast<const char*>(w) + prefetch_bytes + 64);
      const auto first = std::bit_cast<__m512bh>(_mm512_loadu_si512(w));
      const auto second = std::bit_cast<__m512bh>(_mm512_loadu_si512(w + panel_columns));
      for (int r = 0; r < rows; ++r) {
        const __m512bh value = pair(x + r * x_stride);
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], value, first);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], value, second);
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < 2; ++j) _mm512_storeu_ps(acc + r * panel_columns + j * 16, sum[r][j]);
  }

  static void run(int rows, const BFloat16* x, int64_t x_stride, const BFloat16* w, int64_t steps, float* acc,
                  bool resume) {
    by_rows<max_rows>(rows, [&]<int count>() { run<count>(x, x_stride, w, steps, acc, resume); });
  }
};

#endif

}  // namespace hybrid::cpu::HYBRID_ISA
