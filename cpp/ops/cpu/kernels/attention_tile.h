// The arithmetic of attention on one tile of 64 KV tokens, for a few query rows at a time.
//
// Both products are the same small dense one, rows of A times a tile B whose columns are vector lanes:
//   scores [rows, 64]  = q [rows, dim] . keys [dim, 64]      (the K tile is transposed once, in registers)
//   out    [rows, dim] = p [rows, 64]  . values [64, dim]
// Every element is one chain of multiply-adds in ascending order of the inner index, whatever rows share the call: that
// is what makes decode, prefill and any chunking of a prompt agree bit for bit.
//
// A "word" is what one lane multiplies at a time: an f32, or two bf16 where the machine has vdpbf16ps (p is then
// rounded to bf16, and normalised by the sum of the rounded values). A cache of another type C than the queries' T is
// widened to T's words, which hold every f8 exactly; its scales are the caller's.
#pragma once

#include "ops/cpu/vec.h"

namespace hybrid::cpu::HYBRID_ISA {

constexpr int64_t kv_tile = 64;
constexpr int64_t tile_rows = 6;                            // query rows that share a pass over a tile
constexpr int64_t tile_columns = F32::width == 16 ? 4 : 2;  // registers a row: 6 x 4 (x 2) accumulators

template <class T>
struct TileMath {
  static constexpr int64_t pack = 1;  // elements a word
  static F32 step(F32 a, F32 b, F32 c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
template <>
struct TileMath<BFloat16> {
  static constexpr int64_t pack = 2;
  static F32 step(F32 a, F32 b, F32 c) {
    return _mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v));
  }
};
#endif

// c[r][0 .. V * width) = c[r] * keep[r] + a[r] . b over `depth` words; without keep, c is only written.
template <class Math, int R, int V>
inline void multiply_block(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b,
                           int64_t b_stride, int64_t depth, const float* keep) {
  F32 sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      sum[r][v] = keep ? F32::load(c + r * c_stride + v * F32::width) * F32(keep[r]) : F32(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    F32 column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) column[v] = F32::load(b + k * b_stride + v * F32::width);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32 x(a[r * a_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = Math::step(x, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v].store(c + r * c_stride + v * F32::width);
  }
}

// The same for `rows` in [1, tile_rows] and `columns`, a multiple of the width.
template <class Math, int R = tile_rows>
inline void multiply(int64_t rows, int64_t columns, float* c, int64_t c_stride, const float* a, int64_t a_stride,
                     const float* b, int64_t b_stride, int64_t depth, const float* keep) {
  if constexpr (R > 1) {
    if (rows < R) return multiply<Math, R - 1>(rows, columns, c, c_stride, a, a_stride, b, b_stride, depth, keep);
  }
  int64_t j = 0;
  for (; j + tile_columns * F32::width <= columns; j += tile_columns * F32::width)
    multiply_block<Math, R, tile_columns>(c + j, c_stride, a, a_stride, b + j, b_stride, depth, keep);
  for (; j < columns; j += F32::width)
    multiply_block<Math, R, 1>(c + j, c_stride, a, a_stride, b + j, b_stride, depth, keep);
}

#if defined(__AVX2__)
// Within 128-bit lanes: afterwards register 4q + j holds, in lane L, column 4L + j of rows 4q .. 4q + 3.
inline void transpose_lanes(F32 (&m)[F32::width]) {
#pragma GCC unroll 4
  for (int q = 0; q < F32::width; q += 4) {
#if defined(__AVX512F__)
    const auto low = [](F32 a, F32 b) { return _mm512_castps_pd(_mm512_unpacklo_ps(a.v, b.v)); };
    const auto high = [](F32 a, F32 b) { return _mm512_castps_pd(_mm512_unpackhi_ps(a.v, b.v)); };
    const auto low_pair = [](__m512d a, __m512d b) { return F32(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b))); };
    const auto high_pair = [](__m512d a, __m512d b) { return F32(_mm512_castpd_ps(_mm512_unpackhi_pd(a, b))); };
#else
    const auto low = [](F32 a, F32 b) { return _mm256_castps_pd(_mm256_unpacklo_ps(a.v, b.v)); };
    const auto high = [](F32 a, F32 b) { return _mm256_castps_pd(_mm256_unpackhi_ps(a.v, b.v)); };
    const auto low_pair = [](__m256d a, __m256d b) { return F32(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b))); };
    const auto high_pair = [](__m256d a, __m256d b) { return F32(_mm256_castpd_ps(_mm256_unpackhi_pd(a, b))); };
#endif
    const auto a = low(m[q], m[q + 1]), b = high(m[q], m[q + 1]);
    const auto c = low(m[q + 2], m[q + 3]), d = high(m[q + 2], m[q + 3]);
    m[q] = low_pair(a, c);
    m[q + 1] = high_pair(a, c);
    m[q + 2] = low_pair(b, d);
    m[q + 3] = high_pair(b, d);
  }
}
#endif

// A square of words, in place.
inline void transpose(F32 (&m)[F32::width]) {
#if defined(__AVX512F__)
  transpose_lanes(m);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(m[j].v, m[4 + j].v, 0x44),
                 b = _mm512_shuffle_f32x4(m[8 + j].v, m[12 + j].v, 0x44);
    const __m512 c = _mm512_shuffle_f32x4(m[j].v, m[4 + j].v, 0xee),
                 d = _mm512_shuffle_f32x4(m[8 + j].v, m[12 + j].v, 0xee);
    m[j] = _mm512_shuffle_f32x4(a, b, 0x88);
    m[4 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
    m[8 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
    m[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
#elif defined(__AVX2__)
  transpose_lanes(m);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m256 a = m[j].v, b = m[4 + j].v;
    m[j] = _mm256_permute2f128_ps(a, b, 0x20);
    m[4 + j] = _mm256_permute2f128_ps(a, b, 0x31);
  }
#else
  for (int i = 0; i < F32::width; ++i)
    for (int j = 0; j < i; ++j) std::swap(m[i].v[j], m[j].v[i]);
#endif
}

#if defined(__AVX512BF16__)
// 32 neighbours, or those of the mask and zeros.
constexpr __mmask32 all_of_32 = ~__mmask32{0};
inline __m512i load_32(const BFloat16* p, __mmask32 mask = all_of_32) { return _mm512_maskz_loadu_epi16(mask, p); }
inline __m512i load_32(const Float8* p, __mmask32 mask = all_of_32) {
  const __m512i x = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, p));
  const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7f));
  __m512i found = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
  // Multiples of 2^-9 below 2^-6 have no exponent of their own to move.
  const __m512i tiny =
      _mm512_castsi128_si512(_mm_setr_epi16(0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  found =
      _mm512_mask_permutexvar_epi16(found, _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(8)), magnitude, tiny);
  found = _mm512_mask_mov_epi16(found, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)),
                                _mm512_set1_epi16(0x7fc0));
  return _mm512_or_si512(found, _mm512_slli_epi16(_mm512_xor_si512(x, magnitude), 8));
}
#endif

// The `width` words at p, or `n` of them and zeros.
template <class T, class C>
inline F32 load_words(const C* p) {
#if defined(__AVX512BF16__)
  if constexpr (TileMath<T>::pack == 2) return _mm512_castsi512_ps(load_32(p));
#endif
  if constexpr (TileMath<T>::pack == 1) return F32::load(p);
}
template <class T, class C>
inline F32 load_words(const C* p, int64_t n) {
  if (n >= F32::width) return load_words<T>(p);
#if defined(__AVX512BF16__)
  if constexpr (TileMath<T>::pack == 2)
    return _mm512_castsi512_ps(load_32(p, static_cast<__mmask32>((uint64_t{1} << 2 * n) - 1)));
#endif
  if constexpr (TileMath<T>::pack == 1) return F32::load(p, static_cast<int>(n));
}

// Where the tokens of a tile lie in the cache.
template <class C>
struct TileRows {
  int64_t count = 0;
  const C* keys[kv_tile];
  const C* values[kv_tile];
};

// Fetches the next tile's rows while this one is converted, a few at a time. Blocks are scattered: the machine's own
// prefetcher stops at the end of each.
template <class C>
class TileFetch {
 public:
  TileFetch(const TileRows<C>& next, int64_t dim) : next_(next), dim_(dim) {}

  // The next n rows: first all keys, then all values.
  void fetch(int64_t n) {
    for (; n > 0 && done_ < 2 * next_.count; --n, ++done_) {
      const C* row = done_ < next_.count ? next_.keys[done_] : next_.values[done_ - next_.count];
      // Into L2: it has more misses in flight than L1, which doubles the bandwidth of scattered blocks.
      for (int64_t j = 0; j < dim_; j += static_cast<int64_t>(64 / sizeof(C))) __builtin_prefetch(row + j, 0, 2);
    }
  }

 private:
  const TileRows<C>& next_;
  int64_t dim_;
  int64_t done_ = 0;
};

// to[word][token] = the words of `width` rows from `column` on. Constant indices only: the square stays in registers.
template <class T, class C>
inline void transpose_words(float* to, const C* const* rows, int64_t column) {
  F32 square[F32::width];
#pragma GCC unroll 16
  for (int i = 0; i < F32::width; ++i) square[i] = load_words<T>(rows[i] + column);
  transpose(square);
#pragma GCC unroll 16
  for (int i = 0; i < F32::width; ++i) square[i].store(to + i * kv_tile);
}

// The same for fewer rows, the others being zero, and fewer words.
template <class T, class C>
inline void transpose_words(float* to, const C* const* rows, int64_t column, int64_t num_rows, int64_t num_words) {
  F32 square[F32::width];
  for (int i = 0; i < F32::width; ++i)
    square[i] = i < num_rows ? load_words<T>(rows[i] + column, num_words) : F32(0.0f);
  transpose(square);
  for (int i = 0; i < num_words; ++i) square[i].store(to + i * kv_tile);
}

// tile[word][token] = the key words of rows.keys[0 .. count); zero from count to the end of its group of `width`
// tokens, and those beyond are not written: their scores are masked.
template <class T, class C>
inline void load_keys(float* tile, const TileRows<C>& rows, TileFetch<C>& next, int64_t dim) {
  const int64_t words = dim / TileMath<T>::pack;
  for (int64_t t = 0; t < rows.count; t += F32::width) {
    next.fetch(F32::width);
    const int64_t num_rows = std::min<int64_t>(F32::width, rows.count - t);
    for (int64_t w = 0; w < words; w += F32::width) {
      const int64_t num_words = std::min<int64_t>(F32::width, words - w), column = w * TileMath<T>::pack;
      if (num_rows == F32::width && num_words == F32::width)
        transpose_words<T>(tile + w * kv_tile + t, rows.keys + t, column);
      else
        transpose_words<T>(tile + w * kv_tile + t, rows.keys + t, column, num_rows, num_words);
    }
  }
}

#if defined(__AVX512BF16__)
// to[j] = the pair (first[j], second[j]) of 32 columns.
inline void interleave(float* to, __m512i first, __m512i second, bool both_halves) {
  alignas(64) static constexpr uint16_t low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low_index = _mm512_load_si512(low), high_index = _mm512_add_epi16(low_index, _mm512_set1_epi16(16));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, low_index, second));
  if (both_halves) _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(first, high_index, second));
}

// Of dim columns; a null second row is zero.
template <class C>
inline void interleave_rows(float* to, const C* first, const C* second, int64_t dim) {
  int64_t j = 0;
  if (second != nullptr)
    for (; j + 32 <= dim; j += 32) interleave(to + j, load_32(first + j), load_32(second + j), true);
  for (; j < dim; j += 32) {
    const __mmask32 mask = dim - j >= 32 ? all_of_32 : (__mmask32{1} << (dim - j)) - 1;
    interleave(to + j, load_32(first + j, mask), second != nullptr ? load_32(second + j, mask) : _mm512_setzero_si512(),
               dim - j > 16);
  }
}
#endif

// tile[word][column] = the value words of rows.values[0 .. count): a word is one token's element, or two tokens' with
// pack 2. `stride` >= dim is a multiple of the width; columns from dim on are zero.
template <class T, class C>
inline void load_values(float* tile, const TileRows<C>& rows, TileFetch<C>& next, int64_t dim, int64_t stride) {
  constexpr int64_t pack = TileMath<T>::pack;
  for (int64_t t = 0; t < rows.count; t += pack) {
    next.fetch(pack);
    float* to = tile + t / pack * stride;
#if defined(__AVX512BF16__)
    if constexpr (pack == 2) {
      interleave_rows(to, rows.values[t], t + 1 < rows.count ? rows.values[t + 1] : nullptr, dim);
      continue;
    }
#endif
    for (int64_t j = 0; j < dim; j += F32::width) load_words<T>(rows.values[t] + j, dim - j).store(to + j);
  }
}

// The running softmax of one row over the tiles of a chunk.
struct RowState {
  float largest;  // score so far
  float sum;      // of exp(score - largest)
};

inline float exp_of(float x) {
  float lanes[F32::width];
  exp(F32(x)).store(lanes);
  return lanes[0];
}

// Turns the first `valid` of 64 raw scores into probability words, in place, the rest into zeros. Updates the state;
// returns the factor by which older sums shrink.
template <class T>
inline float softmax_row(float* scores, int64_t valid, float scale, RowState& state) {
  constexpr int count = static_cast<int>(kv_tile / F32::width);
  for (int64_t t = valid; t < kv_tile; ++t) scores[t] = minus_infinity;
  F32 x[count];
  for (int i = 0; i < count; ++i) x[i] = F32::load(scores + i * F32::width) * F32(scale);
  F32 top = x[0];
  for (int i = 1; i < count; ++i) top = max(top, x[i]);
  const float largest = std::max(state.largest, top.largest());
  F32 sum(0.0f);
  for (int i = 0; i < count; ++i) {
    F32 p = exp(x[i] - F32(largest));
#if defined(__AVX512BF16__)
    if constexpr (TileMath<T>::pack == 2) {
      const __m256i rounded = p.as_bf16();
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(scores + i * F32::width / 2), rounded);
      p = F32::widen(rounded);
    } else
#endif
      p.store(scores + i * F32::width);
    sum = sum + p;
  }
  const float keep = exp_of(state.largest - largest);
  state.largest = largest;
  state.sum = state.sum * keep + sum.sum();
  return keep;
}

// sums[r] = sums[r] * keep[r] + p[r] . values for rows whose row r sees the first valid[r] tokens of the tile
// (ascending). Beyond valid[r] no value is touched, even to be multiplied by zero: it may be another request's NaN.
template <class T>
inline void add_values(int64_t rows, float* sums, int64_t stride, const float* p, const float* values,
                       const int64_t* valid, const float* keep) {
  using Math = TileMath<T>;
  const int64_t common = valid[0] / Math::pack;
  multiply<Math>(rows, stride, sums, stride, p, kv_tile, values, stride, common, keep);
  constexpr float one = 1.0f;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t whole = valid[r] / Math::pack;
    if (whole > common)
      multiply<Math>(1, stride, sums + r * stride, stride, p + r * kv_tile + common, kv_tile, values + common * stride,
                     stride, whole - common, &one);
#if defined(__AVX512BF16__)
    if (valid[r] % Math::pack != 0) {  // half a word: the first token of a pair
      for (int64_t j = 0; j < stride; j += F32::width) {
        const __m512i first =
            _mm512_and_si512(_mm512_castps_si512(F32::load(values + whole * stride + j).v), _mm512_set1_epi32(0xffff));
        float* sum = sums + r * stride + j;
        Math::step(F32(p[r * kv_tile + whole]), _mm512_castsi512_ps(first), F32::load(sum)).store(sum);
      }
    }
#endif
  }
}

}  // namespace hybrid::cpu::HYBRID_ISA
