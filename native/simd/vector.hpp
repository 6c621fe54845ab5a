// One vector of floats, in three spellings: AVX-512, AVX2 with FMA, and plain C++ that any compiler vectorises.
//
// The kernels are written once against this page and compiled once per spelling, each in the namespace LAMP_ISA.
// Everything here rounds as IEEE float32 does: fma() is a true fused multiply-add in all three. max and min return the
// second operand where one is NaN, in all three: the value that must keep its NaN goes there. The integer vectors are
// those of the low-bit kernels (lowbit/integers.hpp).
//
// Results have the same bits in all three. So an array is never summed in as many lanes as a vector happens to have, but
// in sixteen (`vrows`: one vector of sixteen or two of eight), number j in lane j mod 16, and these are added by
// `sum_rows`; and exponentials are those of this page, never the C library's, which has its own for each machine.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "simd/compiler.hpp"

#if defined(__AVX512F__)
#include "simd/avx512.hpp"
#elif defined(__AVX2__)
#include "simd/avx2.hpp"
#else
#include "simd/portable.hpp"
#endif

namespace LAMP_ISA {

inline vf from_bits(std::uint32_t x) { return set1(std::bit_cast<float>(x)); }
inline vf zero() { return set1(0.0f); }
inline vf abs(vf x) { return bit_and(x, from_bits(0x7fffffffu)); }
inline vf sign(vf x) { return bit_and(x, from_bits(0x80000000u)); }

// The largest lane; what comparisons with NaN give where there is one.
inline float largest(vf x) {
  alignas(64) float lane[vf::width];
  store(lane, x);
  float r = lane[0];
  for (int i = 1; i < vf::width; ++i) r = r > lane[i] ? r : lane[i];
  return r;
}
inline float first_lane(vf x) {
  alignas(64) float lane[vf::width];
  store(lane, x);
  return lane[0];
}

constexpr int kSumLanes = 16, kRowVectors = kSumLanes / vf::width;
static_assert(sizeof(vrows) == kSumLanes * sizeof(float));

inline vrows rows_zero() {
  vrows r;
  for (auto& x : r.v) x = zero();
  return r;
}
inline vrows rows_add(const vrows& a, const vrows& b) {
  vrows r;
  for (int i = 0; i < kRowVectors; ++i) r.v[i] = a.v[i] + b.v[i];
  return r;
}
// The sum of sixteen lanes: lane i and lane i + 8, then i + 4, i + 2, i + 1.
inline float sum_rows(const vrows& x) {
  if constexpr (kRowVectors == 1)
    return sum_halves(x.v[0]);
  else
    return sum_halves(x.v[0] + x.v[1]);
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

// The same for one number.
inline float exp_one(float x) { return first_lane(exp(set1(x))); }

// sinh(x) for 0 <= x <= 87 to about two units in the last place: its series near zero, exponentials beyond 1; NaN stays.
inline vf sinh_positive(vf x) {
  const vf s = x * x;
  vf p = fma(set1(2.75573192e-6f), s, set1(1.98412698e-4f));
  p = fma(p, s, set1(8.33333333e-3f));
  p = fma(p, s, set1(1.66666667e-1f));
  const vf near_zero = fma(p * s, x, x);
  if (!bits(gt(x, set1(1.0f)))) return near_zero;
  const vf e = exp(x);
  return select(gt(x, set1(1.0f)), (e - set1(1.0f) / e) * set1(0.5f), near_zero);
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

