// Sums of matrix units: L products and the accumulator aligned to the largest exponent, truncated, summed, rounded once.
//
// torchlamp.kernels.specification.Fuse is the definition, torchlamp.kernels.reference_units its readable form. Here it
// has two forms. `unit_exact` is float64, column by column, for every operand. `unit_fast` is for operands that are far
// from overflow and underflow (`unit_is_fast`): exponents are powers of two in float32, and aligned terms 32-bit integers
// where products are float32 numbers. Columns lie across the lanes, so that no result depends on the tiling.
#pragma once

#include "simulation/product_tiles.hpp"

namespace LAMP_ISA {

using lamp::Fuse;

constexpr std::uint32_t kUnitFloor = (127u - 95u) << 23;  // 2^-95: below every exponent that unit_fast meets
constexpr float kQuietNan = std::bit_cast<float>(0x7fffffffu);  // the NaN that units return

// 2^floor(log2 |x|) of a nonzero finite number, 0 of zero, infinity of what isn't finite.
inline double exponent_of(double x) {
  return std::bit_cast<double>(std::bit_cast<std::uint64_t>(x) & 0x7ff0000000000000ull);
}

// The sum of a unit on the grid, once rounded; +0 for -0, infinity beyond the largest number.
inline float unit_round(double x, const Grid& g, bool nearest) {
  const double e = std::max(exponent_of(x), std::ldexp(1.0, g.min_exponent));
  const double spacing = e * std::ldexp(1.0, -g.mantissa_bits);
  const double r = (nearest ? std::nearbyint(x / spacing) : std::trunc(x / spacing)) * spacing;
  if (std::fabs(r) > largest_value(g)) return std::copysign(std::numeric_limits<float>::infinity(), static_cast<float>(x));
  return static_cast<float>(r) + 0.0f;
}

// One group of products k = first ... last - 1 for one row and the columns of a block.
inline void unit_group(const Grid& g, const Fuse& f, const float* a, std::ptrdiff_t a_k, const float* b,
                       std::ptrdiff_t first, std::ptrdiff_t last, float* acc) {
  const double floor_a = std::ldexp(1.0, f.floor_a), floor_b = std::ldexp(1.0, f.floor_b);
  const double floor_acc = std::ldexp(1.0, g.min_exponent), zero_term = std::ldexp(1.0, f.zero_exponent);
  double most[kColumns], plain[kColumns], sum[kColumns], unit[kColumns];
  for (std::ptrdiff_t j = 0; j < kColumns; ++j) {
    const double c = acc[j];
    plain[j] = c;
    most[j] = c == 0.0 ? zero_term : std::max(zero_term, std::max(floor_acc, exponent_of(c)));
  }
  for (std::ptrdiff_t k = first; k < last; ++k) {
    const double x = a[k * a_k], ea = x == 0.0 ? 0.0 : std::max(floor_a, exponent_of(x));
    const float* row = b + k * kColumns;
    for (std::ptrdiff_t j = 0; j < kColumns; ++j) {
      const double y = row[j], eb = y == 0.0 ? 0.0 : std::max(floor_b, exponent_of(y));
      const double e = ea * eb;  // NaN (0 times infinity) leaves the largest as it is: the result is NaN
      most[j] = e > most[j] ? e : most[j];
      plain[j] += x * y;
    }
  }
  const double scale = std::ldexp(1.0, f.bits);
  for (std::ptrdiff_t j = 0; j < kColumns; ++j) {
    unit[j] = scale / most[j];
    sum[j] = std::trunc(acc[j] * unit[j]);
  }
  for (std::ptrdiff_t k = first; k < last; ++k) {
    const double x = a[k * a_k];
    const float* row = b + k * kColumns;
    for (std::ptrdiff_t j = 0; j < kColumns; ++j) sum[j] += std::trunc(x * row[j] * unit[j]);
  }
  for (std::ptrdiff_t j = 0; j < kColumns; ++j) {
    if (std::isnan(plain[j]))
      acc[j] = kQuietNan;
    else if (std::isinf(plain[j]))
      acc[j] = static_cast<float>(plain[j]);
    else
      acc[j] = unit_round(sum[j] * (most[j] / scale), g, f.nearest);
  }
}

template <bool Squares>
void unit_exact(const Accumulation& how, const Block& block) {
  alignas(64) float acc[kColumns], total[kColumns] = {}, squares[kColumns] = {};
  const std::ptrdiff_t run = how.promote > 0 ? how.promote : std::max<std::ptrdiff_t>(block.K, 1);
  std::fill_n(acc, kColumns, 0.0f);
  for (std::ptrdiff_t start = 0; start < block.K; start += run) {
    const std::ptrdiff_t end = std::min(start + run, block.K);
    std::fill_n(acc, kColumns, 0.0f);
    for (std::ptrdiff_t k = start; k < end; k += how.fuse.length) {
      unit_group(how.grid, how.fuse, block.a[0], block.a_k, block.b, k,
                 std::min<std::ptrdiff_t>(k + how.fuse.length, end), acc);
      if constexpr (Squares)
        for (std::ptrdiff_t j = 0; j < kColumns; ++j) squares[j] = std::fma(acc[j], acc[j], squares[j]);
    }
    for (std::ptrdiff_t j = 0; j < kColumns; ++j) total[j] += acc[j];
  }
  std::copy_n(how.promote > 0 ? total : acc, kColumns, block.out[0]);
  if constexpr (Squares) std::copy_n(squares, kColumns, block.squares[0]);
}

#if defined(__AVX512F__)
constexpr int kUnitRows = 3;
#elif defined(__AVX2__)
constexpr int kUnitRows = 2;
#else
constexpr int kUnitRows = 1;
#endif

// How aligned terms are summed: as integers whose sum is below 2^24, as integers whose sum is below 2^31 by runs of
// `together` products, or, where products have more than 24 bits, as float64 numbers.
enum class Terms { small, integers, doubles };

template <Terms T, bool Floored, bool Squares, int Rows>
void unit_fast(const Accumulation& how, const Block& block) {
  constexpr bool Small = T == Terms::small;
  const Fuse& f = how.fuse;
  const int together = std::min(f.length, 1 << std::min(29 - f.bits, 20));
  const vf exponent = from_bits(0x7f800000u), least = from_bits(kUnitFloor), back = set1(std::ldexp(1.0f, -f.bits));
  const vf floor_a = set1(std::ldexp(1.0f, f.floor_a)), floor_b = set1(std::ldexp(1.0f, f.floor_b));
  const vf kept = from_bits(~0u << (23 - how.grid.mantissa_bits));
  vf acc[Rows][kVectors], total[Rows][kVectors], squares[Rows][kVectors];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < kVectors; ++j) acc[i][j] = total[i][j] = squares[i][j] = zero();
  // The exponent of an operand as a power of two; 0 for 0.
  const auto power = [&](vf x, vf floor) {
    const vf e = bit_and(x, exponent);
    if constexpr (Floored) return select(gt(e, zero()), max(floor, e), zero());
    return e;
  };
  const std::ptrdiff_t run = how.promote > 0 ? how.promote : std::max<std::ptrdiff_t>(block.K, 1);
  for (std::ptrdiff_t start = 0; start < block.K; start += run) {
    const std::ptrdiff_t end = std::min(start + run, block.K);
    if (how.promote > 0)
      for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < kVectors; ++j) acc[i][j] = zero();
    for (std::ptrdiff_t first = start; first < end; first += f.length) {
      const std::ptrdiff_t last = std::min<std::ptrdiff_t>(first + f.length, end);
      vf most[Rows][kVectors];
      for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < kVectors; ++j) most[i][j] = max(least, bit_and(acc[i][j], exponent));
      for (std::ptrdiff_t k = first; k < last; ++k) {
        const float* b = block.b + k * kColumns;
        vf eb[kVectors];
        for (int j = 0; j < kVectors; ++j) eb[j] = power(load(b + j * vf::width), floor_b);
        for (int i = 0; i < Rows; ++i) {
          const vf ea = power(set1(block.a[i][k * block.a_k]), floor_a);
          for (int j = 0; j < kVectors; ++j) most[i][j] = max(most[i][j], ea * eb[j]);
        }
      }
      vf unit[Rows][kVectors];
      vi sum[Rows][kVectors];
      vhalves wide[Rows][kVectors];
      for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < kVectors; ++j) {
          unit[i][j] = power_quotient(most[i][j], f.bits);
          sum[i][j] = integers_zero();
          if constexpr (Small)
            sum[i][j] = truncate(acc[i][j] * unit[i][j]);
          else
            wide[i][j] = halves(truncate(acc[i][j] * unit[i][j]));
        }
      if constexpr (T == Terms::doubles) {
        vhalves scale[Rows][kVectors];
        for (int i = 0; i < Rows; ++i)
          for (int j = 0; j < kVectors; ++j) scale[i][j] = halves(unit[i][j]);
        for (std::ptrdiff_t k = first; k < last; ++k) {
          const float* b = block.b + k * kColumns;
          for (int j = 0; j < kVectors; ++j) {
            const vhalves y = halves(load(b + j * vf::width));
            for (int i = 0; i < Rows; ++i) {
              const vhalves x = halves(set1(block.a[i][k * block.a_k]));
              wide[i][j] = add(wide[i][j], truncate(multiply(multiply(x, y), scale[i][j])));
            }
          }
        }
      }
      for (std::ptrdiff_t k = T == Terms::doubles ? last : first; k < last;) {
        const std::ptrdiff_t stop = Small ? last : std::min<std::ptrdiff_t>(k + together, last);
        for (; k < stop; ++k) {
          const float* b = block.b + k * kColumns;
          for (int i = 0; i < Rows; ++i) {
            const vf a = set1(block.a[i][k * block.a_k]);
            for (int j = 0; j < kVectors; ++j)
              sum[i][j] = add(sum[i][j], truncate(a * load(b + j * vf::width) * unit[i][j]));
          }
        }
        if constexpr (!Small)
          for (int i = 0; i < Rows; ++i)
            for (int j = 0; j < kVectors; ++j) {
              wide[i][j] = add(wide[i][j], halves(sum[i][j]));
              sum[i][j] = integers_zero();
            }
      }
      for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < kVectors; ++j) {
          const vf aligned = Small ? bit_and(to_float(sum[i][j]), kept) : toward_zero(wide[i][j], how.grid.mantissa_bits);
          acc[i][j] = aligned * (most[i][j] * back);
          if constexpr (Squares) squares[i][j] = fma(acc[i][j], acc[i][j], squares[i][j]);
        }
    }
    if (how.promote > 0)
      for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < kVectors; ++j) total[i][j] = total[i][j] + acc[i][j];
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < kVectors; ++j) {
      store(block.out[i] + j * vf::width, how.promote > 0 ? total[i][j] : acc[i][j]);
      if constexpr (Squares) store(block.squares[i] + j * vf::width, squares[i][j]);
    }
}

// Whether unit_fast is exact: no subnormal operands, and exponents that stay in range.
// A nonzero accumulator is a multiple of 2^-25 times the smallest product or exponent, so it never falls below 2^-85.
inline bool unit_is_fast(const Accumulation& how, const Magnitudes& a, const Magnitudes& b, std::ptrdiff_t K) {
  const Fuse& f = how.fuse;
  if (!how.grid.has_float32_range() || f.nearest || f.bits > 25 || !a.finite() || !b.finite()) return false;
  if (a.all_zero() || b.all_zero()) return true;
  constexpr float normal = std::numeric_limits<float>::min();
  return a.smallest() >= normal && b.smallest() >= normal &&
         static_cast<double>(a.smallest()) * b.smallest() >= std::ldexp(1.0, -60) &&
         static_cast<double>(a.largest()) * b.largest() * 2.0 * static_cast<double>(K) <= std::ldexp(1.0, 90);
}

inline Micro pick_unit(const Accumulation& how, bool squares, const Magnitudes& a, const Magnitudes& b,
                       std::ptrdiff_t K) {
  if (!unit_is_fast(how, a, b, K))
    return squares ? Micro{unit_exact<true>, unit_exact<true>, 1} : Micro{unit_exact<false>, unit_exact<false>, 1};
  const Fuse& f = how.fuse;
  const auto below = [](const Magnitudes& m, int floor) { return m.smallest() < std::ldexp(1.0f, floor); };
  const bool floored = (!a.all_zero() && below(a, f.floor_a)) || (!b.all_zero() && below(b, f.floor_b));
  const bool small = static_cast<double>(f.length + 1) * std::ldexp(1.0, f.bits + 2) <= std::ldexp(1.0, 24);
  const bool narrow = a.significant_bits() + b.significant_bits() <= 24;
  const auto pick = [&]<Terms T, bool Floored>() {
    constexpr int rows = T == Terms::doubles ? std::max(1, kUnitRows - 1) : kUnitRows;
    if (squares) return Micro{unit_fast<T, Floored, true, 1>, unit_fast<T, Floored, true, 1>, 1};
    return Micro{unit_fast<T, Floored, false, rows>, unit_fast<T, Floored, false, 1>, rows};
  };
  const auto terms = [&]<bool Floored>() {
    if (!narrow) return pick.template operator()<Terms::doubles, Floored>();
    if (small) return pick.template operator()<Terms::small, Floored>();
    return pick.template operator()<Terms::integers, Floored>();
  };
  return floored ? terms.template operator()<true>() : terms.template operator()<false>();
}

// The micro-kernel for sums of such operands.
inline Micro pick_sums(const Accumulation& how, bool squares, const Magnitudes& a, const Magnitudes& b,
                       std::ptrdiff_t K) {
  if (how.fuse.length > 0) return pick_unit(how, squares, a, b, K);
  return pick_micro(how, squares, wide_is_exact(a, b, K));
}

}  // namespace LAMP_ISA
