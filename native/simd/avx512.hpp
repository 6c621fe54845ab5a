// The vectors of simd/vector.hpp in AVX-512 (F, BW, VL and DQ), with VNNI where the compiler may use it.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <immintrin.h>

#include "simd/halves.hpp"

namespace LAMP_ISA {

struct vf {
  static constexpr int width = 16;
  __m512 v;
};
using vmask = __mmask16;

inline vf set1(float x) { return {_mm512_set1_ps(x)}; }
inline vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x.v); }
inline vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline vf fnma(vf a, vf b, vf c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
inline vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
inline vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
inline vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
inline vf bit_and(vf a, vf b) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}
inline vf bit_or(vf a, vf b) {
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}
inline vmask gt(vf a, vf b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline vmask le(vf a, vf b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
inline vf select(vmask m, vf yes, vf no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
inline unsigned bits(vmask m) { return m; }
inline vmask mask_bytes(const std::uint8_t* p) {
  return _mm_test_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(-1));
}
inline vmask mask_and(vmask a, vmask b) { return a & b; }
// 2^n for the integer-valued floats n in [-126, 127].
inline vf exp2_integer(vf n) {
  const __m512i i = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(i, 23))};
}
inline vf round_integer(vf x) { return {_mm512_roundscale_ps(x.v, 0)}; }
inline vf sqrt(vf x) { return {_mm512_sqrt_ps(x.v)}; }

// Thirty-two-bit integers, one a lane, and float64 numbers, as aligned sums need them (simulation/unit_sums.hpp):
// `truncate` cuts toward zero, `power_quotient` is 2^bits / e for a power of two e, and `toward_zero` keeps as many bits
// after the leading one and cuts the rest.
struct vi {
  __m512i v;
};
struct vhalves {
  __m512d v[2];
};
inline vi integers_zero() { return {_mm512_setzero_si512()}; }
inline vi add(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline vi truncate(vf x) { return {_mm512_cvttps_epi32(x.v)}; }
inline vf to_float(vi x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline vf power_quotient(vf e, int bits) {
  return {_mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32((254 + bits) << 23), _mm512_castps_si512(e.v)))};
}
inline vhalves halves(vi x) {
  return {{_mm512_cvtepi32_pd(_mm512_castsi512_si256(x.v)), _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(x.v, 1))}};
}
inline vhalves add(vhalves a, vhalves b) {
  return {{_mm512_add_pd(a.v[0], b.v[0]), _mm512_add_pd(a.v[1], b.v[1])}};
}
inline vhalves multiply(vhalves a, vhalves b) {
  return {{_mm512_mul_pd(a.v[0], b.v[0]), _mm512_mul_pd(a.v[1], b.v[1])}};
}
inline vhalves truncate(vhalves x) { return {{_mm512_roundscale_pd(x.v[0], 3), _mm512_roundscale_pd(x.v[1], 3)}}; }
inline vhalves halves(vf x) {
  return {{_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))}};
}
inline vf toward_zero(vhalves x, int bits) {
  const __m512d kept = _mm512_castsi512_pd(_mm512_set1_epi64(static_cast<long long>(~0ull << (52 - bits))));
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_and_pd(x.v[0], kept))),
                             _mm512_cvtpd_ps(_mm512_and_pd(x.v[1], kept)), 1)};
}

// One number for each of the sixteen rows of a block.
struct vrows {
  vf v[1];
};

// Pairs of 16-bit integers, one pair for each row of a block, and a 32-bit sum for each row.
struct vpairs {
  __m512i v;
};
struct vsums {
  __m512i v;
};
inline vsums sums_zero() { return {_mm512_setzero_si512()}; }
// Thirty-two signed bytes; as many halves of bytes, 0 ... 15 or those less 8, the first of each pair the low half.
inline vpairs signed_bytes(const std::uint8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline __m256i halves_of_bytes(const std::uint8_t* p) {
  const __m128i n = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(n, low), odd = _mm_and_si128(_mm_srli_epi16(n, 4), low);
  return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}
inline vpairs nibbles(const std::uint8_t* p) { return {_mm512_cvtepu8_epi16(halves_of_bytes(p))}; }
inline vpairs nibbles_less_8(const std::uint8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_sub_epi8(halves_of_bytes(p), _mm256_set1_epi8(8)))};
}
// 16 high + low, 0 <= low < 16.
inline vpairs join(vpairs high, vpairs low) { return {_mm512_or_si512(_mm512_slli_epi16(high.v, 4), low.v)}; }
inline vsums multiply_add(vpairs a, std::int32_t pair, vsums c) {
#if defined(LAMP_VNNI) && LAMP_MSVC
  return {_mm512_dpwssd_epi32(c.v, a.v, _mm512_set1_epi32(pair))};
#elif defined(LAMP_VNNI)
  // As assembly, since GCC copies every sum before and after the intrinsic, which costs a quarter of the time.
  asm("vpdpwssd %2, %1, %0" : "+v"(c.v) : "v"(a.v), "v"(_mm512_set1_epi32(pair)));
  return c;
#else
  return {_mm512_add_epi32(c.v, _mm512_madd_epi16(a.v, _mm512_set1_epi32(pair)))};
#endif
}
inline vpairs load_pairs(const std::int16_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_pairs(std::int16_t* p, vpairs x) { _mm512_storeu_si512(p, x.v); }
inline vrows to_rows(vsums x) { return {{{_mm512_cvtepi32_ps(x.v)}}}; }
inline vf widen_bf16(const std::uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline vrows load_scales(const std::uint16_t* p) { return {{widen_bf16(p)}}; }
// Integers to nearest; what isn't a number or doesn't fit gives any.
inline void store_shorts(std::int16_t* p, const vrows& x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x.v[0].v)));
}
inline vf widen(const std::uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

// Sum of the lanes, halves first, in the order that simd/vector.hpp asks for. The largest lane, none of them NaN.
inline float sum_halves(vf x) {
  const __m256 e = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline float largest_halves(vf x) { return _mm512_reduce_max_ps(x.v); }

#define LAMP_OWN_FUNCTION
inline void pin(vsums&) {}

}  // namespace LAMP_ISA
