// F32: a register of floats, the one vector type that CPU kernels are written in.
//
// Included by exactly one cpu/isa_*.cpp per instruction set, after `#define HYBRID_ISA <name>`: everything lands in
// hybrid::cpu::HYBRID_ISA, hence the same kernel compiled four times never collides. Loads widen bf16, f16 and f8 to
// f32, stores round to nearest even. Partial loads fill with zero; `n` of a partial access is in [0, width].
#pragma once

#ifndef HYBRID_ISA
#error "define HYBRID_ISA before including ops/cpu/vec.h"
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "ops/float16.h"
#include "ops/float8.h"

namespace hybrid::cpu::HYBRID_ISA {

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

#if defined(__AVX512F__)

struct F32 {
  static constexpr int width = 16;
  __m512 v;
  F32() = default;
  F32(__m512 x) : v(x) {}
  explicit F32(float x) : v(_mm512_set1_ps(x)) {}

  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static F32 load(const float* p) { return _mm512_loadu_ps(p); }
  static F32 load(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static F32 widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
  static F32 load(const BFloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F32 load(const BFloat16* p, int n) { return widen(_mm256_maskz_loadu_epi16(mask(n), p)); }
  static F32 load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F32 load(const Float16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p)); }
  // An f8's exponent and mantissa are those of an f16 that is 2^8 times smaller, subnormals too.
  static F32 widen_f8(__m128i bits) {
    const __m256i x = _mm256_cvtepu8_epi16(bits), magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
    const __m256i half = _mm256_mask_mov_epi16(_mm256_slli_epi16(magnitude, 7), nan, _mm256_set1_epi16(0x7e00));
    const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(x, magnitude), 8);
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(half, sign)), _mm512_set1_ps(256.0f));
  }
  static F32 load(const Float8* p) { return widen_f8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F32 load(const Float8* p, int n) { return widen_f8(_mm_maskz_loadu_epi8(mask(n), p)); }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  __m256i as_bf16() const {
#if defined(__AVX512BF16__)
    return std::bit_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
#endif
  }
  __m256i as_f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), as_bf16()); }
  void store(BFloat16* p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), as_bf16()); }
  void store(Float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), as_f16()); }
  void store(Float16* p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), as_f16()); }
  __m128i as_f8() const {  // as Float8(float) does it
    const __m512i bits = _mm512_castps_si512(v), sign = _mm512_slli_epi32(_mm512_srli_epi32(bits, 31), 7);
    const __m512 size = _mm512_min_ps(_mm512_set1_ps(Float8::largest), _mm512_abs_ps(v));
    const __m512i u = _mm512_castps_si512(size);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 20), _mm512_set1_epi32(1));
    const __m512i shifted = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff - 0x3c000000)));
    __m512i found = _mm512_or_si512(_mm512_srli_epi32(shifted, 20), sign);
    const __mmask16 tiny = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ);
    const __m512i multiple = _mm512_cvt_roundps_epi32(_mm512_mul_ps(size, _mm512_set1_ps(512.0f)),
                                                      _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    found = _mm512_mask_or_epi32(found, tiny, multiple, sign);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi8(_mm512_mask_mov_epi32(found, nan, _mm512_set1_epi32(0x7f)));
  }
  void store(Float8* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), as_f8()); }
  void store(Float8* p, int n) const { _mm_mask_storeu_epi8(p, mask(n), as_f8()); }

  friend F32 operator+(F32 a, F32 b) { return _mm512_add_ps(a.v, b.v); }
  friend F32 operator-(F32 a, F32 b) { return _mm512_sub_ps(a.v, b.v); }
  friend F32 operator*(F32 a, F32 b) { return _mm512_mul_ps(a.v, b.v); }
  friend F32 operator/(F32 a, F32 b) { return _mm512_div_ps(a.v, b.v); }
  friend F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }  // a * b + c
  // Of two operands one of which is NaN, the second, as on x86.
  friend F32 max(F32 a, F32 b) { return _mm512_max_ps(a.v, b.v); }
  friend F32 min(F32 a, F32 b) { return _mm512_min_ps(a.v, b.v); }
  // y where !(x < limit), else 0
  friend F32 unless_below(F32 x, F32 limit, F32 y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), y.v);
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float largest() const { return _mm512_reduce_max_ps(v); }
  friend F32 round_to_int(F32 a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // a * 2^n for integral n
  friend F32 scale_by_power(F32 a, F32 n) { return _mm512_scalef_ps(a.v, n.v); }
};

#elif defined(__AVX2__)

struct F32 {
  static constexpr int width = 8;
  __m256 v;
  F32() = default;
  F32(__m256 x) : v(x) {}
  explicit F32(float x) : v(_mm256_set1_ps(x)) {}

  static __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  template <class H>
  static __m128i load_halves(const H* p, int n) {
    uint16_t bits[8] = {};
    std::memcpy(bits, p, static_cast<size_t>(n) * 2);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits));
  }
  template <class H>
  static void store_halves(H* p, __m128i x, int n) {
    uint16_t bits[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bits), x);
    std::memcpy(p, bits, static_cast<size_t>(n) * 2);
  }
  static F32 load(const float* p) { return _mm256_loadu_ps(p); }
  static F32 load(const float* p, int n) { return _mm256_maskload_ps(p, mask(n)); }
  static F32 widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
  static F32 load(const BFloat16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F32 load(const BFloat16* p, int n) { return widen(load_halves(p, n)); }
  static F32 load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F32 load(const Float16* p, int n) { return _mm256_cvtph_ps(load_halves(p, n)); }
  // An f8's exponent and mantissa are those of an f16 that is 2^8 times smaller, subnormals too.
  static F32 widen_f8(__m128i bits) {
    const __m128i x = _mm_cvtepu8_epi16(bits), magnitude = _mm_and_si128(x, _mm_set1_epi16(0x7f));
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
    const __m128i half = _mm_blendv_epi8(_mm_slli_epi16(magnitude, 7), _mm_set1_epi16(0x7e00), nan);
    const __m128i sign = _mm_slli_epi16(_mm_xor_si128(x, magnitude), 8);
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(half, sign)), _mm256_set1_ps(256.0f));
  }
  static F32 load(const Float8* p) { return widen_f8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  static F32 load(const Float8* p, int n) {
    uint8_t bits[8] = {};
    std::memcpy(bits, p, static_cast<size_t>(n));
    return widen_f8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bits)));
  }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int n) const { _mm256_maskstore_ps(p, mask(n), v); }
  __m128i as_bf16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  __m128i as_f16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  void store(BFloat16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), as_bf16()); }
  void store(BFloat16* p, int n) const { store_halves(p, as_bf16(), n); }
  void store(Float16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), as_f16()); }
  void store(Float16* p, int n) const { store_halves(p, as_f16(), n); }
  __m128i as_f8() const {  // in the low half, as Float8(float) does it
    const __m256i bits = _mm256_castps_si256(v), sign = _mm256_slli_epi32(_mm256_srli_epi32(bits, 31), 7);
    const __m256 absolute = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
    const __m256 size = _mm256_min_ps(_mm256_set1_ps(Float8::largest), absolute);
    const __m256i u = _mm256_castps_si256(size);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 20), _mm256_set1_epi32(1));
    const __m256i shifted = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff - 0x3c000000)));
    const __m256 tiny = _mm256_cmp_ps(size, _mm256_set1_ps(0x1p-6f), _CMP_LT_OQ);
    const __m256 multiple =
        _mm256_round_ps(_mm256_mul_ps(size, _mm256_set1_ps(512.0f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i magnitude =
        _mm256_blendv_epi8(_mm256_srli_epi32(shifted, 20), _mm256_cvtps_epi32(multiple), _mm256_castps_si256(tiny));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i found = _mm256_blendv_epi8(_mm256_or_si256(magnitude, sign), _mm256_set1_epi32(0x7f), nan);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
    return _mm_packus_epi16(halves, halves);
  }
  void store(Float8* p) const { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), as_f8()); }
  void store(Float8* p, int n) const {
    uint8_t bits[8];
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bits), as_f8());
    std::memcpy(p, bits, static_cast<size_t>(n));
  }

  friend F32 operator+(F32 a, F32 b) { return _mm256_add_ps(a.v, b.v); }
  friend F32 operator-(F32 a, F32 b) { return _mm256_sub_ps(a.v, b.v); }
  friend F32 operator*(F32 a, F32 b) { return _mm256_mul_ps(a.v, b.v); }
  friend F32 operator/(F32 a, F32 b) { return _mm256_div_ps(a.v, b.v); }
  friend F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
  friend F32 max(F32 a, F32 b) { return _mm256_max_ps(a.v, b.v); }
  friend F32 min(F32 a, F32 b) { return _mm256_min_ps(a.v, b.v); }
  friend F32 unless_below(F32 x, F32 limit, F32 y) {
    return _mm256_and_ps(_mm256_cmp_ps(x.v, limit.v, _CMP_NLT_UQ), y.v);
  }
  float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  float largest() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  friend F32 round_to_int(F32 a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  friend F32 scale_by_power(F32 a, F32 n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a.v, _mm256_castsi256_ps(exponent));
  }
};

#else

// Plain C++: any machine, and the readable specification of the two above.
struct F32 {
  static constexpr int width = 4;
  float v[width];
  F32() = default;
  explicit F32(float x) { std::fill_n(v, width, x); }

  template <class T>
  static F32 load(const T* p, int n = width) {
    F32 r(0.0f);
    for (int i = 0; i < n; ++i) r.v[i] = static_cast<float>(p[i]);
    return r;
  }
  template <class T>
  void store(T* p, int n = width) const {
    for (int i = 0; i < n; ++i) p[i] = static_cast<T>(v[i]);
  }
  template <class F>
  static F32 map(F32 a, F32 b, F f) {
    F32 r;
    for (int i = 0; i < width; ++i) r.v[i] = f(a.v[i], b.v[i]);
    return r;
  }
  friend F32 operator+(F32 a, F32 b) {
    return map(a, b, [](float x, float y) { return x + y; });
  }
  friend F32 operator-(F32 a, F32 b) {
    return map(a, b, [](float x, float y) { return x - y; });
  }
  friend F32 operator*(F32 a, F32 b) {
    return map(a, b, [](float x, float y) { return x * y; });
  }
  friend F32 operator/(F32 a, F32 b) {
    return map(a, b, [](float x, float y) { return x / y; });
  }
  friend F32 max(F32 a, F32 b) {
    return map(a, b, [](float x, float y) { return x > y ? x : y; });
  }
  friend F32 min(F32 a, F32 b) {
    return map(a, b, [](float x, float y) { return x < y ? x : y; });
  }
  friend F32 unless_below(F32 x, F32 limit, F32 y) {
    F32 r;
    for (int i = 0; i < width; ++i) r.v[i] = x.v[i] < limit.v[i] ? 0.0f : y.v[i];
    return r;
  }
  friend F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
  float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  float largest() const { return std::max(std::max(v[0], v[2]), std::max(v[1], v[3])); }
  friend F32 round_to_int(F32 a) {
    return map(a, a, [](float x, float) { return std::nearbyint(x); });
  }
  friend F32 scale_by_power(F32 a, F32 n) {
    return map(a, n, [](float x, float e) { return e == e ? std::ldexp(x, static_cast<int>(e)) : e; });
  }
};

#endif

// e^x to about 1 ulp for x <= 88; exactly 0 below -87.3 (so -inf gives 0); NaN of NaN. Cephes' expf polynomial.
inline F32 exp(F32 x) {
  const F32 lowest(-87.3f), clamped = max(lowest, min(F32(88.0f), x));
  const F32 n = round_to_int(clamped * F32(1.44269504088896341f));
  F32 r = fma(n, F32(-0.693359375f), clamped);
  r = fma(n, F32(2.12194440e-4f), r);
  F32 p(1.9875691500e-4f);
  p = fma(p, r, F32(1.3981999507e-3f));
  p = fma(p, r, F32(8.3334519073e-3f));
  p = fma(p, r, F32(4.1665795894e-2f));
  p = fma(p, r, F32(1.6666665459e-1f));
  p = fma(p, r, F32(5.0000001201e-1f));
  return unless_below(x, lowest, scale_by_power(fma(p, r * r, r + F32(1.0f)), n));
}

}  // namespace hybrid::cpu::HYBRID_ISA
