// Integer vectors of the low-bit kernels: sixteen rows times a pair of columns at once, and rows of codes as floats.
//
// A block holds sixteen rows with their columns in pairs, [pair][row][2], so that one multiply-add of 16-bit integers
// gives every row the sum of a pair's two products in a 32-bit lane of its own: no sum across lanes is ever needed, and
// results of sixteen rows leave as one vector. Written once for AVX-512, AVX2 and plain C++, as simd.hpp is.
#pragma once

#include "lowbit_spec.hpp"
#include "simd.hpp"

namespace LAMP_ISA {

constexpr int kRows = lamp::kPackRows;      // rows of a block
constexpr int kGroup = lamp::kPackGroup;    // columns that share a scale
constexpr int kRowVectors = kRows / vf::width;  // float vectors that hold a number for every row of a block

inline float from_bf16(std::uint16_t x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x) << 16); }

inline float from_f16(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Exponents move from bias 15 to bias 127 by an exact product, which takes subnormal numbers along.
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f) | sign);
}

// One number for each of the sixteen rows.
struct vrows {
  vf v[kRowVectors];
};
inline vrows rows_zero() {
  vrows r;
  for (auto& x : r.v) x = zero();
  return r;
}
inline vrows rows_load(const float* p) {
  vrows r;
  for (int i = 0; i < kRowVectors; ++i) r.v[i] = load(p + i * vf::width);
  return r;
}
inline void rows_store(float* p, const vrows& x) {
  for (int i = 0; i < kRowVectors; ++i) store(p + i * vf::width, x.v[i]);
}

#if defined(__AVX512F__)

struct vpairs {
  __m512i v;
};
struct vsums {
  __m512i v;
};
inline vsums sums_zero() { return {_mm512_setzero_si512()}; }
template <int Bits>
inline vpairs load_pairs(const std::uint8_t* p) {
  if constexpr (Bits == 4) {
    const __m128i n = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(n, low), odd = _mm_and_si128(_mm_srli_epi16(n, 4), low);
    const __m256i both = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    return {_mm512_cvtepi8_epi16(_mm256_sub_epi8(both, _mm256_set1_epi8(8)))};
  } else {
    const __m512i high = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    if constexpr (Bits == 8) return {high};
    const __m128i n = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 32)), low = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(n, low), odd = _mm_and_si128(_mm_srli_epi16(n, 4), low);
    const __m256i both = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    return {_mm512_or_si512(_mm512_slli_epi16(high, 4), _mm512_cvtepu8_epi16(both))};
  }
}
inline vsums multiply_add(vpairs a, std::int32_t pair, vsums c) {
  return {_mm512_add_epi32(c.v, _mm512_madd_epi16(a.v, _mm512_set1_epi32(pair)))};
}
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

#elif defined(__AVX2__)

struct vpairs {
  __m256i v[2];
};
struct vsums {
  __m256i v[2];
};
inline vsums sums_zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
template <int Bits>
inline vpairs load_pairs(const std::uint8_t* p) {
  const auto nibbles = [](const std::uint8_t* at, __m128i* both) {
    const __m128i n = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)), low = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(n, low), odd = _mm_and_si128(_mm_srli_epi16(n, 4), low);
    both[0] = _mm_unpacklo_epi8(even, odd), both[1] = _mm_unpackhi_epi8(even, odd);
  };
  __m128i both[2];
  if constexpr (Bits == 4) {
    nibbles(p, both);
    const __m128i eight = _mm_set1_epi8(8);
    return {{_mm256_cvtepi8_epi16(_mm_sub_epi8(both[0], eight)), _mm256_cvtepi8_epi16(_mm_sub_epi8(both[1], eight))}};
  } else {
    const __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i second = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)));
    if constexpr (Bits == 8) return {{first, second}};
    nibbles(p + 32, both);
    return {{_mm256_or_si256(_mm256_slli_epi16(first, 4), _mm256_cvtepu8_epi16(both[0])),
             _mm256_or_si256(_mm256_slli_epi16(second, 4), _mm256_cvtepu8_epi16(both[1]))}};
  }
}
inline vsums multiply_add(vpairs a, std::int32_t pair, vsums c) {
  const __m256i x = _mm256_set1_epi32(pair);
  return {{_mm256_add_epi32(c.v[0], _mm256_madd_epi16(a.v[0], x)),
           _mm256_add_epi32(c.v[1], _mm256_madd_epi16(a.v[1], x))}};
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

#else

struct vpairs {
  std::int16_t v[2 * kRows];
};
struct vsums {
  std::int32_t v[kRows];
};
inline vsums sums_zero() { return {}; }
template <int Bits>
inline vpairs load_pairs(const std::uint8_t* p) {
  vpairs r;
  for (int i = 0; i < kRows; ++i)
    for (int k = 0; k < 2; ++k) {
      if constexpr (Bits == 4) {
        r.v[2 * i + k] = static_cast<std::int16_t>((k ? p[i] >> 4 : p[i] & 15) - 8);
      } else {
        const int high = static_cast<std::int8_t>(p[2 * i + k]);
        const int low = Bits == 8 ? 0 : k ? p[32 + i] >> 4 : p[32 + i] & 15;
        r.v[2 * i + k] = static_cast<std::int16_t>(Bits == 8 ? high : high * 16 + low);
      }
    }
  return r;
}
inline vsums multiply_add(const vpairs& a, std::int32_t pair, vsums c) {
  const std::int32_t first = static_cast<std::int16_t>(pair & 0xffff), second = pair >> 16;
  for (int i = 0; i < kRows; ++i) c.v[i] += a.v[2 * i] * first + a.v[2 * i + 1] * second;
  return c;
}
inline vrows to_rows(const vsums& x) {
  vrows r;
  for (int i = 0; i < kRowVectors; ++i)
    r.v[i] = lanes([&](int lane) { return static_cast<float>(x.v[i * vf::width + lane]); });
  return r;
}
inline vf widen_bf16(const std::uint16_t* p) {
  return lanes([&](int i) { return from_bf16(p[i]); });
}
inline vrows load_scales(const std::uint16_t* p) {
  vrows r;
  for (int i = 0; i < kRowVectors; ++i) r.v[i] = widen_bf16(p + i * vf::width);
  return r;
}
inline void store_shorts(std::int16_t* p, const vrows& x) {
  for (int i = 0; i < kRows; ++i) {
    const float n = std::nearbyint(x.v[i / vf::width].v[i % vf::width]);
    p[i] = static_cast<std::int16_t>(std::fabs(n) <= 32767.0f ? n : 0.0f);
  }
}
inline vf widen(const std::uint16_t* p) {
  return lanes([&](int i) { return from_f16(p[i]); });
}

#endif

// Loops over integer sums are functions of their own where there are sixteen registers, and each sum is pinned to its
// registers: else GCC spills some to the stack, and every addition waits for the store of the one before. It makes a
// factor of 1.6 for three and four vectors.
#if defined(__AVX2__) && !defined(__AVX512F__)
#define LAMP_OWN_FUNCTION [[gnu::noinline]]
inline void pin(vsums& x) { asm volatile("" : "+x"(x.v[0]), "+x"(x.v[1])); }
#else
#define LAMP_OWN_FUNCTION
inline void pin(vsums&) {}
#endif

// Sum of the lanes, halves first: a short chain, where `sum` adds them one by one.
inline float sum_halves(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x.v);
#elif defined(__AVX2__)
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
#else
  for (int half = vf::width / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
  return x.v[0];
#endif
}

// The largest lane, none of them NaN.
inline float largest_halves(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x.v);
#elif defined(__AVX2__)
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
#else
  return largest(x);
#endif
}

inline vf widen(const float* p) { return load(p); }
inline float widen_one(const float* p) { return *p; }
inline float widen_one(const std::uint16_t* p) { return from_f16(*p); }

}  // namespace LAMP_ISA
