// The vectors of simd/vector.hpp in AVX2 with FMA and F16C.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <immintrin.h>

#include "simd/halves.hpp"

namespace LAMP_ISA {

struct vf {
  static constexpr int width = 8;
  __m256 v;
};
struct vmask {
  __m256 v;
};

inline vf set1(float x) { return {_mm256_set1_ps(x)}; }
inline vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x.v); }
inline vf fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline vf fnma(vf a, vf b, vf c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline vf operator+(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
inline vf operator-(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline vf operator*(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline vf operator/(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
inline vf max(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }
inline vf min(vf a, vf b) { return {_mm256_min_ps(a.v, b.v)}; }
inline vf bit_and(vf a, vf b) { return {_mm256_and_ps(a.v, b.v)}; }
inline vf bit_or(vf a, vf b) { return {_mm256_or_ps(a.v, b.v)}; }
inline vmask gt(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline vmask le(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
inline vf select(vmask m, vf yes, vf no) { return {_mm256_blendv_ps(no.v, yes.v, m.v)}; }
inline unsigned bits(vmask m) { return static_cast<unsigned>(_mm256_movemask_ps(m.v)); }
inline vmask mask_bytes(const std::uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
}
inline vmask mask_and(vmask a, vmask b) { return {_mm256_and_ps(a.v, b.v)}; }
inline vf exp2_integer(vf n) {
  const __m256i i = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(i, 23))};
}
inline vf round_integer(vf x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline vf sqrt(vf x) { return {_mm256_sqrt_ps(x.v)}; }

// As in simd/avx512.hpp.
struct vi {
  __m256i v;
};
struct vhalves {
  __m256d v[2];
};
inline vi integers_zero() { return {_mm256_setzero_si256()}; }
inline vi add(vi a, vi b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline vi truncate(vf x) { return {_mm256_cvttps_epi32(x.v)}; }
inline vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.v)}; }
inline vf power_quotient(vf e, int bits) {
  return {_mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32((254 + bits) << 23), _mm256_castps_si256(e.v)))};
}
inline vhalves halves(vi x) {
  return {{_mm256_cvtepi32_pd(_mm256_castsi256_si128(x.v)), _mm256_cvtepi32_pd(_mm256_extracti128_si256(x.v, 1))}};
}
inline vhalves add(vhalves a, vhalves b) {
  return {{_mm256_add_pd(a.v[0], b.v[0]), _mm256_add_pd(a.v[1], b.v[1])}};
}
inline vhalves multiply(vhalves a, vhalves b) {
  return {{_mm256_mul_pd(a.v[0], b.v[0]), _mm256_mul_pd(a.v[1], b.v[1])}};
}
inline vhalves truncate(vhalves x) { return {{_mm256_round_pd(x.v[0], 3), _mm256_round_pd(x.v[1], 3)}}; }
inline vhalves halves(vf x) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.v)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1))}};
}
inline vf toward_zero(vhalves x, int bits) {
  const __m256d kept = _mm256_castsi256_pd(_mm256_set1_epi64x(static_cast<long long>(~0ull << (52 - bits))));
  return {_mm256_set_m128(_mm256_cvtpd_ps(_mm256_and_pd(x.v[1], kept)), _mm256_cvtpd_ps(_mm256_and_pd(x.v[0], kept)))};
}

// One number for each of the sixteen rows of a block.
struct vrows {
  vf v[2];
};

// Pairs of 16-bit integers, one pair for each row of a block, and a 32-bit sum for each row.
struct vpairs {
  __m256i v[2];
};
struct vsums {
  __m256i v[2];
};
inline vsums sums_zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
// Thirty-two signed bytes; as many halves of bytes, 0 ... 15 or those less 8, the first of each pair the low half.
inline vpairs signed_bytes(const std::uint8_t* p) {
  return {{_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
           _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))}};
}
inline vpairs nibbles(const std::uint8_t* p) {
  const __m128i n = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(n, low), odd = _mm_and_si128(_mm_srli_epi16(n, 4), low);
  return {{_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd)), _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(even, odd))}};
}
inline vpairs nibbles_less_8(const std::uint8_t* p) {
  const vpairs n = nibbles(p);
  const __m256i eight = _mm256_set1_epi16(8);
  return {{_mm256_sub_epi16(n.v[0], eight), _mm256_sub_epi16(n.v[1], eight)}};
}
// 16 high + low, 0 <= low < 16.
inline vpairs join(vpairs high, vpairs low) {
  return {{_mm256_or_si256(_mm256_slli_epi16(high.v[0], 4), low.v[0]),
           _mm256_or_si256(_mm256_slli_epi16(high.v[1], 4), low.v[1])}};
}
inline vsums multiply_add(vpairs a, std::int32_t pair, vsums c) {
  const __m256i x = _mm256_set1_epi32(pair);
  return {{_mm256_add_epi32(c.v[0], _mm256_madd_epi16(a.v[0], x)),
           _mm256_add_epi32(c.v[1], _mm256_madd_epi16(a.v[1], x))}};
}
inline vpairs load_pairs(const std::int16_t* p) {
  const __m256i* from = reinterpret_cast<const __m256i*>(p);
  return {{_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)}};
}
inline void store_pairs(std::int16_t* p, vpairs x) {
  __m256i* to = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(to, x.v[0]);
  _mm256_storeu_si256(to + 1, x.v[1]);
}
inline vrows to_rows(vsums x) { return {{{_mm256_cvtepi32_ps(x.v[0])}, {_mm256_cvtepi32_ps(x.v[1])}}}; }
inline vf widen_bf16(const std::uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline vrows load_scales(const std::uint16_t* p) {
  return {{widen_bf16(p), widen_bf16(p + 8)}};
}
inline void store_shorts(std::int16_t* p, const vrows& x) {
  const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.v[0].v), _mm256_cvtps_epi32(x.v[1].v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
}
inline vf widen(const std::uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

// Sum of the lanes, halves first, in the order that simd/vector.hpp asks for. The largest lane, none of them NaN.
inline float sum_halves(vf x) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline float largest_halves(vf x) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}

// Loops over integer sums are functions of their own where there are sixteen registers, and each sum is pinned to its
// registers: else GCC spills some to the stack, and every addition waits for the store of the one before. It makes a
// factor of 1.6 for three and four vectors.
#define LAMP_OWN_FUNCTION LAMP_NOINLINE
#if LAMP_MSVC
inline void pin(vsums&) {}
#else
inline void pin(vsums& x) { asm volatile("" : "+x"(x.v[0]), "+x"(x.v[1])); }
#endif

}  // namespace LAMP_ISA
