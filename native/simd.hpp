// One vector of floats, in three spellings: AVX-512, AVX2 with FMA, and plain C++ that any compiler vectorises.
//
// The kernels are written once against this page and compiled once per spelling, each in the namespace LAMP_ISA.
// Everything here rounds as IEEE float32 does: fma() is a true fused multiply-add in all three. max and min return the
// second operand where one is NaN, in all three: the value that must keep its NaN goes there.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace LAMP_ISA {

#if defined(__AVX512F__)

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

#elif defined(__AVX2__)

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

#else

struct vf {
  static constexpr int width = 8;
  float v[width];
};
struct vmask {
  bool v[vf::width];
};

template <class F>
inline vf lanes(F f) {
  vf r;
  for (int i = 0; i < vf::width; ++i) r.v[i] = f(i);
  return r;
}
template <class F>
inline vmask flags(F f) {
  vmask r;
  for (int i = 0; i < vf::width; ++i) r.v[i] = f(i);
  return r;
}
inline std::uint32_t as_bits(float x) { return std::bit_cast<std::uint32_t>(x); }
inline float as_float(std::uint32_t x) { return std::bit_cast<float>(x); }

inline vf set1(float x) { return lanes([&](int) { return x; }); }
inline vf load(const float* p) { return lanes([&](int i) { return p[i]; }); }
inline void store(float* p, vf x) {
  for (int i = 0; i < vf::width; ++i) p[i] = x.v[i];
}
inline vf fma(vf a, vf b, vf c) { return lanes([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); }); }
inline vf fnma(vf a, vf b, vf c) { return lanes([&](int i) { return std::fma(-a.v[i], b.v[i], c.v[i]); }); }
inline vf operator+(vf a, vf b) { return lanes([&](int i) { return a.v[i] + b.v[i]; }); }
inline vf operator-(vf a, vf b) { return lanes([&](int i) { return a.v[i] - b.v[i]; }); }
inline vf operator*(vf a, vf b) { return lanes([&](int i) { return a.v[i] * b.v[i]; }); }
inline vf operator/(vf a, vf b) { return lanes([&](int i) { return a.v[i] / b.v[i]; }); }
inline vf max(vf a, vf b) { return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline vf min(vf a, vf b) { return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline vf bit_and(vf a, vf b) { return lanes([&](int i) { return as_float(as_bits(a.v[i]) & as_bits(b.v[i])); }); }
inline vf bit_or(vf a, vf b) { return lanes([&](int i) { return as_float(as_bits(a.v[i]) | as_bits(b.v[i])); }); }
inline vmask gt(vf a, vf b) { return flags([&](int i) { return a.v[i] > b.v[i]; }); }
inline vmask le(vf a, vf b) { return flags([&](int i) { return a.v[i] <= b.v[i]; }); }
inline vf select(vmask m, vf yes, vf no) { return lanes([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; }); }
inline unsigned bits(vmask m) {
  unsigned r = 0;
  for (int i = 0; i < vf::width; ++i) r |= static_cast<unsigned>(m.v[i]) << i;
  return r;
}
inline vmask mask_bytes(const std::uint8_t* p) { return flags([&](int i) { return p[i] != 0; }); }
inline vmask mask_and(vmask a, vmask b) { return flags([&](int i) { return a.v[i] && b.v[i]; }); }
inline vf exp2_integer(vf n) {
  return lanes([&](int i) { return as_float(static_cast<std::uint32_t>(static_cast<int>(n.v[i]) + 127) << 23); });
}
inline vf round_integer(vf x) { return lanes([&](int i) { return std::nearbyint(x.v[i]); }); }
inline vf sqrt(vf x) { return lanes([&](int i) { return std::sqrt(x.v[i]); }); }

#endif

inline vf from_bits(std::uint32_t x) { return set1(std::bit_cast<float>(x)); }
inline vf zero() { return set1(0.0f); }
inline vf abs(vf x) { return bit_and(x, from_bits(0x7fffffffu)); }
inline vf sign(vf x) { return bit_and(x, from_bits(0x80000000u)); }

template <class Combine>
inline float reduce(vf x, Combine combine) {
  alignas(64) float lane[vf::width];
  store(lane, x);
  float r = lane[0];
  for (int i = 1; i < vf::width; ++i) r = combine(r, lane[i]);
  return r;
}
inline float sum(vf x) {
  return reduce(x, [](float a, float b) { return a + b; });
}
inline float largest(vf x) {
  return reduce(x, [](float a, float b) { return a > b ? a : b; });
}

// exp(x) for x <= 0 (any x <= 88) to about one unit in the last place: Cody-Waite reduction by ln 2 and a polynomial
// of degree 6. Below -87.3 the result is 0; NaN stays NaN.
inline vf exp(vf x) {
  const vf y = max(set1(-87.33f), x);
  const vf n = round_integer(y * set1(1.44269504088896341f));
  vf r = fnma(n, set1(0.693359375f), y);
  r = fnma(n, set1(-2.12194440e-4f), r);
  vf p = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r + set1(1.0f));
  return select(gt(set1(-87.33f), x), zero(), p * exp2_integer(n));
}

// tanh(x) to about two units in the last place: an odd polynomial near zero, exponentials beyond 5/8.
inline vf tanh(vf x) {
  const vf m = abs(x), s = x * x;
  vf p = fma(set1(-5.70498872745e-3f), s, set1(2.06390887954e-2f));
  p = fma(p, s, set1(-5.37397155531e-2f));
  p = fma(p, s, set1(1.33314422036e-1f));
  p = fma(p, s, set1(-3.33332819422e-1f));
  const vf near_zero = fma(p * s, x, x);
  const vf e = exp(min(zero(), m * set1(-2.0f)));
  const vf far = bit_or((set1(1.0f) - e) / (set1(1.0f) + e), sign(x));
  return select(gt(set1(0.625f), m), near_zero, select(le(set1(0.625f), m), far, x));  // NaN is neither
}

}  // namespace LAMP_ISA
