// Quantisation: rows of float32 into blocks or lines of codes, and vectors into 16-bit integers.
#pragma once

#include <algorithm>
#include <vector>

#include "lowbit/integers.hpp"

namespace LAMP_ISA {

inline std::uint32_t float_bits(float x) { return std::bit_cast<std::uint32_t>(x); }

// The smallest bfloat16 at or above x >= 0, so that no code exceeds the largest; NaN for what is not finite, which
// makes every product with the group NaN: the kernels take that as "recompute".
inline std::uint16_t scale_above(float x) {
  if (!(x <= std::numeric_limits<float>::max())) return 0x7fc0;
  const std::uint32_t bits = float_bits(x) + 0xffffu;
  return static_cast<std::uint16_t>(bits >> 16) >= 0x7f80u ? 0x7fc0 : static_cast<std::uint16_t>(bits >> 16);
}

// max |x| over a group, infinite if any element is no finite number.
inline float group_magnitude(const float* x, std::ptrdiff_t count) {
  float m = 0.0f;
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    const float a = std::fabs(x[i]);
    if (!(a <= std::numeric_limits<float>::max())) return std::numeric_limits<float>::infinity();
    m = std::max(m, a);
  }
  return m;
}

// Quantises one group (count <= kGroup columns, zeros behind them); returns the scale and adds the squared residuals.
inline std::uint16_t quantise_group(const float* x, std::ptrdiff_t count, int largest, int* codes, double& squares) {
  const std::uint16_t scale = scale_above(group_magnitude(x, count) / static_cast<float>(largest));
  const float s = from_bf16(scale);
  std::fill_n(codes, kGroup, 0);
  if (!(s == s) || s == 0.0f) {
    for (std::ptrdiff_t i = 0; i < count; ++i) squares += static_cast<double>(x[i]) * x[i];
    return scale;
  }
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    const float c = std::nearbyint(x[i] / s);
    codes[i] = static_cast<int>(std::min(std::max(c, static_cast<float>(-largest)), static_cast<float>(largest)));
    const double d = static_cast<double>(x[i]) - static_cast<double>(s) * codes[i];
    squares += d * d;
  }
  return scale;
}

// Above the norm, whatever the rounding; among subnormal numbers the margin alone would be lost.
inline float residual_norm(double squares) {
  const double norm = std::sqrt(squares) * (1.0 + 1e-6);
  const float nearest = static_cast<float>(norm);
  return nearest < norm ? std::nextafter(nearest, std::numeric_limits<float>::infinity()) : nearest;
}

// Row `row` of a block copy <- x[0, columns).
template <class Format>
inline void pack_block_row(const lamp::Blocks& b, std::ptrdiff_t row, const float* x, std::ptrdiff_t columns) {
  const std::ptrdiff_t block = row / kRows, lane = row % kRows;
  std::uint8_t* codes = b.codes + block * b.block_codes();
  std::uint16_t* scales = b.scales + block * b.block_scales();
  double squares = 0.0;
  int c[kGroup];
  for (std::ptrdiff_t g = 0; g < b.groups; ++g) {
    const std::ptrdiff_t count = std::min<std::ptrdiff_t>(kGroup, columns - g * kGroup);
    scales[g * kRows + lane] = quantise_group(x + g * kGroup, count, Format::largest, c, squares);
    for (int pair = 0; pair < kGroup / 2; ++pair)
      Format::put_pair(codes + (g * (kGroup / 2) + pair) * Format::pair_bytes, lane, c[2 * pair], c[2 * pair + 1]);
  }
  b.errors[row] = residual_norm(squares);
}

inline void pack_block_row(const lamp::Blocks& b, std::ptrdiff_t row, const float* x, std::ptrdiff_t columns) {
  lamp::BlockFormats::with(b.bits, [&]<class Format>() { pack_block_row<Format>(b, row, x, columns); });
}

// Row `row` of a copy in pairs of rows <- x[0, columns).
template <class Format>
inline void pack_pair_row(const lamp::RowPairs& p, std::ptrdiff_t row, const float* x, std::ptrdiff_t columns) {
  std::uint8_t* codes = p.codes + row / 2 * p.pair_codes();
  std::uint16_t* scales = p.scales + row / kRows * p.block_scales() + row % kRows;
  const std::ptrdiff_t second = row % 2;
  double squares = 0.0;
  int c[kGroup];
  for (std::ptrdiff_t g = 0; g < p.groups; ++g) {
    const std::ptrdiff_t count = std::min<std::ptrdiff_t>(kGroup, columns - g * kGroup);
    scales[g * kRows] = quantise_group(x + g * kGroup, count, Format::largest, c, squares);
    for (int half = 0; half < kGroup / kRows; ++half, codes += Format::pair_bytes)
      for (int i = 0; i < kRows; ++i) Format::put(codes, i, second, c[half * kRows + i]);
  }
}

inline void pack_pair_row(const lamp::RowPairs& p, std::ptrdiff_t row, const float* x, std::ptrdiff_t columns) {
  lamp::RowPairFormats::with(p.bits, [&]<class Format>() { pack_pair_row<Format>(p, row, x, columns); });
}

constexpr float kLargestShort = lamp::kLargestShort;

// m / kLargestShort, rounded up: among subnormal numbers rounding down would leave much beyond the last code.
inline float short_scale(float m) {
  const float s = m / kLargestShort;
  const bool below = static_cast<double>(s) * kLargestShort < m;
  return below ? std::nextafter(s, std::numeric_limits<float>::infinity()) : s;
}

// max |x| of a whole group, infinite if any element is no finite number.
inline float whole_group_magnitude(const float* x) {
  constexpr unsigned kAll = (1u << vf::width) - 1;
  unsigned finite = kAll;
  vf most = zero();
  for (int i = 0; i < kGroup; i += vf::width) {
    const vf a = abs(load(x + i));
    finite &= bits(le(a, set1(std::numeric_limits<float>::max())));
    most = max(a, most);
  }
  return finite == kAll ? largest_halves(most) : std::numeric_limits<float>::infinity();
}

// 2-norm of a vector, and of what its integers leave out, an upper bound.
struct ShortNorms {
  float norm = 0.0f, residual = 0.0f;
};

// Vectors as 16-bit integers with a float32 scale for each group: x ~ scale * codes, |error| <= scale (1/2 + 2^-10):
// the quotient x / scale is itself rounded.
struct Shorts {
  std::vector<std::int16_t> codes;
  std::vector<float> scales;
  std::ptrdiff_t groups = 0;

  const std::int16_t* at(std::ptrdiff_t vector) const { return codes.data() + vector * groups * kGroup; }
  const float* scale(std::ptrdiff_t vector) const { return scales.data() + vector * groups; }

  void reserve(std::ptrdiff_t vectors, std::ptrdiff_t columns) {
    groups = (columns + kGroup - 1) / kGroup;
    codes.resize(static_cast<std::size_t>(vectors * groups * kGroup));
    scales.resize(static_cast<std::size_t>(vectors * groups));
  }
  void set(std::ptrdiff_t vector, const float* x, std::ptrdiff_t columns) {
    for (std::ptrdiff_t g = 0; g < groups; ++g) {
      alignas(64) float padded[kGroup] = {};
      const float* from = x + g * kGroup;
      if (columns - g * kGroup < kGroup) {
        std::copy_n(from, columns - g * kGroup, padded);
        from = padded;
      }
      std::int16_t* c = codes.data() + (vector * groups + g) * kGroup;
      float s = short_scale(whole_group_magnitude(from));
      const bool plain = s > 0.0f && s <= std::numeric_limits<float>::max();
      if (!plain) {
        std::fill_n(c, kGroup, std::int16_t{0});
        if (s != 0.0f) s = std::numeric_limits<float>::quiet_NaN();
      }
      scales[static_cast<std::size_t>(vector * groups + g)] = s;
      for (int i = 0; plain && i < kGroup; i += kRows) {
        vrows q = rows_load(from + i);
        for (auto& v : q.v) v = max(set1(-kLargestShort), min(set1(kLargestShort), v / set1(s)));
        store_shorts(c + i, q);
      }
    }
  }
  // Norms of a vector that was `set`, in eight running sums of float64.
  ShortNorms norms(std::ptrdiff_t vector, const float* x, std::ptrdiff_t columns) const {
    constexpr std::ptrdiff_t kSums = 8;
    double squares[kSums] = {}, left[kSums] = {};
    const std::int16_t* c = at(vector);
    for (std::ptrdiff_t g = 0; g < groups; ++g) {
      // A group that isn't finite leaves out nothing: its products are NaN.
      const double s = scale(vector)[g], told = s == s ? 1.0 : 0.0, known = s == s ? s : 0.0;
      const std::ptrdiff_t count = std::min<std::ptrdiff_t>(kGroup, columns - g * kGroup);
      const float* from = x + g * kGroup;
      const std::int16_t* own = c + g * kGroup;
      const auto one = [&](std::ptrdiff_t i, std::ptrdiff_t lane) {
        const double v = from[i], d = v - known * own[i];
        squares[lane] += v * v;
        left[lane] += told != 0.0 ? d * d : 0.0;
      };
      std::ptrdiff_t i = 0;
      for (; i + kSums <= count; i += kSums)
        for (std::ptrdiff_t lane = 0; lane < kSums; ++lane) one(i + lane, lane);
      for (; i < count; ++i) one(i, i % kSums);
    }
    double all = 0.0, rest = 0.0;
    for (std::ptrdiff_t lane = 0; lane < kSums; ++lane) all += squares[lane], rest += left[lane];
    return {static_cast<float>(std::sqrt(all)), residual_norm(rest)};
  }
};

}  // namespace LAMP_ISA
