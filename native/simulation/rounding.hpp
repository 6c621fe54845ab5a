// Rounding to a grid, nearest with ties to even: one exact scalar definition, and the vector forms the kernels use.
//
// Vector forms. Let e = 2^exponent(x) (the exponent bits of x alone) and t = e 2^(23 - mu). Then x + t lies in a binade
// whose float32 spacing is exactly the spacing of PS(mu) at x, so the hardware's own rounding of x + t, nearest even,
// rounds x to mu bits, and (x + t) - t is exact. Both steps are FMAs, since t is a product. docs/performance.md has the
// proof and its conditions.
#pragma once

#include "simd/vector.hpp"
#include "simulation/spec.hpp"

namespace LAMP_ISA {

using lamp::Accumulation;
using lamp::Grid;
using lamp::Overflow;

inline float largest_value(const Grid& g) {
  return static_cast<float>(
      std::ldexp(std::ldexp(2.0, g.mantissa_bits) - 1.0 - g.top_codes_lost, g.max_exponent - g.mantissa_bits));
}

// What a result beyond the largest finite number becomes, up to its sign.
inline float overflow_value(const Grid& g) {
  switch (g.overflow) {
    case Overflow::nan: return std::numeric_limits<float>::quiet_NaN();
    case Overflow::saturate: return largest_value(g);
    default: return std::numeric_limits<float>::infinity();
  }
}

// The definition: exact for every grid and every float, in double and integer arithmetic.
inline float round_scalar(float x, const Grid& g) {
  if (std::isnan(x)) return x;
  const double largest = largest_value(g);
  double magnitude = std::fabs(static_cast<double>(x));
  if (std::isfinite(x)) {
    int exponent;
    std::frexp(x, &exponent);  // |x| = f 2^exponent, f in [1/2, 1)
    exponent = x == 0.0f || exponent - 1 < g.min_exponent ? g.min_exponent : exponent - 1;
    const int quantum = exponent - g.mantissa_bits;
    // |x| / 2^quantum <= 2^24: an exact double, so that nearbyint rounds once
    magnitude = std::ldexp(std::nearbyint(std::ldexp(magnitude, -quantum)), quantum);
    if (!g.subnormals && magnitude < std::ldexp(1.0, g.min_exponent)) magnitude = 0.0;
  }
  const float r = magnitude > largest ? overflow_value(g) : static_cast<float>(magnitude);
  if (!g.is_signed && std::signbit(x)) return 0.0f;
  if (!g.negative_zero && r == 0.0f) return 0.0f;
  return std::copysign(r, x);
}

// Each vector form names how many rows of accumulators suit its latency and registers (measured).
#if defined(__AVX512F__)
constexpr int kWideRows = 6, kNarrowRows = 3, kSquaresRows = 3;
#elif defined(__AVX2__)
constexpr int kWideRows = 3, kNarrowRows = 2, kSquaresRows = 3;
#else
constexpr int kWideRows = 2, kNarrowRows = 2, kSquaresRows = 1;
#endif
constexpr int kMostRows = 6;

// float32 itself: nothing to do.
struct RoundNone {
  static constexpr int rows = kWideRows;
  explicit RoundNone(const Grid&) {}
  vf operator()(vf x) const { return x; }
};

// PS(mu), mu <= 22, for operands that wide_is_exact() has passed: no overflow, no subnormal, no NaN can occur.
struct RoundWide {
  static constexpr int rows = kWideRows;
  vf exponent, factor;
  explicit RoundWide(const Grid& g)
      : exponent(from_bits(0xff800000u)), factor(set1(std::ldexp(1.0f, 23 - g.mantissa_bits))) {}
  vf operator()(vf x) const {
    const vf e = bit_and(x, exponent);
    return fnma(e, factor, fma(e, factor, x));
  }
};

inline bool is_narrow(const Grid& g) {
  return g.mantissa_bits <= 21 && g.max_exponent <= 99 && g.min_exponent >= -100 && g.subnormals && g.is_signed &&
         g.negative_zero;
}

// Formats with a small exponent range (largest exponent <= 99, smallest >= -100, mu <= 21), every float as operand.
// Clamp keeps t finite for operands beyond 2^100, whatever they become is replaced by the overflow value; a format whose
// overflow is NaN needs no clamp, since an infinite t gives NaN by itself.
template <bool Clamp>
struct RoundNarrow {
  static constexpr int rows = kNarrowRows;
  vf exponent, smallest, largest_exponent, factor, largest, beyond;
  explicit RoundNarrow(const Grid& g)
      : exponent(from_bits(0x7f800000u)),
        smallest(set1(std::ldexp(1.0f, g.min_exponent))),
        largest_exponent(set1(std::ldexp(1.0f, 100))),
        factor(set1(std::ldexp(1.0f, 23 - g.mantissa_bits))),
        largest(set1(largest_value(g))),
        beyond(set1(overflow_value(g))) {}
  vf operator()(vf x) const {
    const vf magnitude = abs(x);
    vf e = max(smallest, bit_and(x, exponent));
    if constexpr (Clamp) e = min(largest_exponent, e);
    const vf r = fnma(e, factor, fma(e, factor, magnitude));
    return bit_or(select(gt(r, largest), beyond, r), sign(x));
  }
};

// Any grid, any operand: the definition, lane by lane.
struct RoundExact {
  static constexpr int rows = 1;
  const Grid grid;
  explicit RoundExact(const Grid& g) : grid(g) {}
  vf operator()(vf x) const {
    alignas(64) float lane[vf::width];
    store(lane, x);
    for (float& value : lane) value = round_scalar(value, grid);
    return load(lane);
  }
};

}  // namespace LAMP_ISA
