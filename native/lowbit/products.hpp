// The three inner loops of every low-bit kernel: sixteen low-bit rows times vectors, one full-precision row times a
// vector, and a weighted sum of low-bit or full-precision rows.
#pragma once

#include "lowbit/pack.hpp"

namespace LAMP_ISA {

// Bytes ahead of their use at which codes are asked for: processors look ahead by themselves, but not beyond a page.
constexpr std::ptrdiff_t kAhead = 2048;

// f.operator()<n>() for 1 <= n <= Most.
template <int Most, class F>
inline void with_count(std::ptrdiff_t n, F&& f) {
  if constexpr (Most > 0) {
    if (n == Most)
      f.template operator()<Most>();
    else
      with_count<Most - 1>(n, f);
  }
}

// Vectors whose sums registers hold at a time.
constexpr int kAtOnce = vf::width == kRows ? 8 : 4;

// out[v][row] = sum over columns of row * vector v, for the sixteen rows of a block and Vectors vectors.
template <class Format, int Vectors>
LAMP_OWN_FUNCTION inline void block_dot(const std::uint8_t* codes, const std::uint16_t* scales, std::ptrdiff_t groups,
                      const std::int16_t* const* x, const float* const* x_scale, vrows* out) {
  constexpr std::ptrdiff_t kBytes = Format::pair_bytes, kPairsOfLine = 64 / kBytes;
  for (int v = 0; v < Vectors; ++v) out[v] = rows_zero();
  for (std::ptrdiff_t g = 0; g < groups; ++g) {
    vsums sums[Vectors];
    for (auto& s : sums) s = sums_zero();
    for (int pair = 0; pair < kGroup / 2; ++pair, codes += kBytes) {
      if (pair % kPairsOfLine == 0) prefetch(codes + kAhead);
      const vpairs rows = Format::template load<Integers>(codes);
      for (int v = 0; v < Vectors; ++v) {
        std::int32_t both;
        std::memcpy(&both, x[v] + g * kGroup + 2 * pair, sizeof both);
        sums[v] = multiply_add(rows, both, sums[v]);
        pin(sums[v]);
      }
    }
    const vrows scale = load_scales(scales + g * kRows);
    for (int v = 0; v < Vectors; ++v) {
      const vrows sum = to_rows(sums[v]);
      const vf own = set1(x_scale[v][g]);
      for (int i = 0; i < kRowVectors; ++i) out[v].v[i] = fma(sum.v[i], scale.v[i] * own, out[v].v[i]);
    }
  }
}

// The same for any number of vectors that were quantised together, `out` being rows of kRows floats each.
template <class Format>
inline void block_dots(const lamp::Blocks& b, std::ptrdiff_t block, const Shorts& x, std::ptrdiff_t first,
                       std::ptrdiff_t vectors, float* out) {
  const std::uint8_t* codes = b.codes + block * b.block_codes();
  const std::uint16_t* scales = b.scales + block * b.block_scales();
  for (std::ptrdiff_t v = 0; v < vectors; v += kAtOnce)
    with_count<kAtOnce>(std::min<std::ptrdiff_t>(kAtOnce, vectors - v), [&]<int Vectors>() {
      const std::int16_t* at[Vectors];
      const float* scale[Vectors];
      vrows sums[Vectors];
      for (int i = 0; i < Vectors; ++i) at[i] = x.at(first + v + i), scale[i] = x.scale(first + v + i);
      block_dot<Format, Vectors>(codes, scales, b.groups, at, scale, sums);
      for (int i = 0; i < Vectors; ++i) rows_store(out + (v + i) * kRows, sums[i]);
    });
}

inline void block_dots(const lamp::Blocks& b, std::ptrdiff_t block, const Shorts& x, std::ptrdiff_t first,
                       std::ptrdiff_t vectors, float* out) {
  lamp::BlockFormats::with(b.bits, [&]<class Format>() { block_dots<Format>(b, block, x, first, vectors, out); });
}

// A full-precision row times a float32 vector, in float32 with four running sums of sixteen lanes.
template <class T>
inline float full_dot(const T* row, const float* x, std::ptrdiff_t columns) {
  vrows sum[4] = {rows_zero(), rows_zero(), rows_zero(), rows_zero()};
  std::ptrdiff_t k = 0;
  const auto step = [&](vrows& s, std::ptrdiff_t at) {
    for (int j = 0; j < kRowVectors; ++j, at += vf::width) s.v[j] = fma(widen(row + at), load(x + at), s.v[j]);
  };
  for (; k + 4 * kRows <= columns; k += 4 * kRows)
    for (int i = 0; i < 4; ++i) step(sum[i], k + i * kRows);
  for (; k + kRows <= columns; k += kRows) step(sum[0], k);
  float tail = 0.0f;
  for (; k < columns; ++k) tail = std::fma(widen_one(row + k), x[k], tail);
  return sum_rows(rows_add(rows_add(sum[0], sum[1]), rows_add(sum[2], sum[3]))) + tail;
}

inline float full_dot(const lamp::Full& full, std::ptrdiff_t row, const float* x, std::ptrdiff_t columns) {
  return full.with_row(row, [&](const auto* numbers) { return full_dot(numbers, x, columns); });
}

// Rows that are summed together, weights beside them; those with weight 0 in all vectors aren't read.
constexpr int kWindow = 128;  // at most: sums of so many products fit 32 bits
struct Window {
  std::ptrdiff_t first = 0;     // row, a multiple of kRows
  int rows = 0;                 // likewise
  int pairs[kWindow / 2] = {};  // those to read
  int count = 0;                // of pairs
};

// Pairs of a window at most: its codes and those of the next, asked for meanwhile, fit the first-level cache.
inline int window_pairs(const lamp::RowPairs& p) {
  return static_cast<int>(std::clamp<std::ptrdiff_t>(8192 / p.pair_codes(), kRows / 2, kWindow / 2));
}

// Weights (>= 0) times the rows' scales as 16-bit integers: the sum over a window then is one of integers. `own` is what
// the integer 1 stands for, `largest` each vector's largest weight.
template <int Vectors>
inline void weight_shorts(const float* weights, std::ptrdiff_t stride, const float* largest, const float* scales,
                          int rows, std::int16_t (*shorts)[kWindow], float* own) {
  vf most = zero(), inverse[Vectors];
  for (int i = 0; i < rows; i += vf::width) most = max(load(scales + i), most);
  const float scale = largest_halves(most);
  for (int v = 0; v < Vectors; ++v) {
    // Below the limit the integers get fewer bits, so that the inverse stays finite.
    const float product = std::max(largest[v] * scale, 0x1p-110f);
    own[v] = product * (1.0f / kLargestShort);
    inverse[v] = set1(kLargestShort / product);
  }
  for (int i = 0; i < rows; i += kRows) {
    const vrows scale_of = rows_load(scales + i);
    for (int v = 0; v < Vectors; ++v) {
      vrows x = rows_load(weights + v * stride + i);
      for (int k = 0; k < kRowVectors; ++k) x.v[k] = x.v[k] * scale_of.v[k] * inverse[v];
      store_shorts(shorts[v] + i, x);
    }
  }
}

// Sixteen columns, or twice as many, of add_pairs, and one line of the next window asked for with each pair of this: a
// burst of requests would wait for free buffers. A function of its own, for the reason that simd/avx2.hpp gives.
template <class Format, int Vectors, int Together>
LAMP_NOINLINE inline void add_columns(const std::uint8_t* codes, std::ptrdiff_t pair_codes, const Window& window,
                        const std::int16_t (*shorts)[kWindow], const float* own, float* const* out,
                        std::ptrdiff_t column, const std::uint8_t* ahead, const Window& next) {
  vsums sums[Vectors * Together];
  for (auto& s : sums) s = sums_zero();
  for (int r = 0; r < window.count; ++r) {
    const int pair = window.pairs[r];
    prefetch(ahead + next.pairs[r] * pair_codes);
    vpairs columns[Together];
    for (int i = 0; i < Together; ++i)
      columns[i] = Format::template load<Integers>(codes + pair * pair_codes + i * Format::pair_bytes);
    for (int v = 0; v < Vectors; ++v) {
      std::int32_t both;
      std::memcpy(&both, shorts[v] + 2 * pair, sizeof both);
      for (int i = 0; i < Together; ++i) {
        vsums& s = sums[v * Together + i];
        s = multiply_add(columns[i], both, s);
      }
    }
  }
  for (int v = 0; v < Vectors; ++v)
    for (int i = 0; i < Together; ++i) {
      const vrows sum = to_rows(sums[v * Together + i]);
      float* to = out[v] + column + i * kRows;
      for (int k = 0; k < kRowVectors; ++k, to += vf::width) store(to, fma(sum.v[k], set1(own[v]), load(to)));
    }
}

// out[v][column] += sum over the window of weight * row: one group of columns, all rows, then the next. Weights
// [vector][row of the window], `stride` from a vector to the next.
template <class Format, int Vectors>
inline void add_pairs(const lamp::RowPairs& p, const Window& window, const Window& next, const float* weights,
                      std::ptrdiff_t stride, float* const* out) {
  static_assert(static_cast<std::int64_t>(Format::largest) * lamp::kLargestShort * kWindow < std::int64_t{1} << 31);
  // Sixteen columns at a time, twice in one go where the registers hold the sums.
  constexpr int kTogether = vf::width == kRows ? 2 : 1;
  const std::ptrdiff_t pair_codes = p.pair_codes();
  const std::uint8_t* own_codes = p.codes + window.first / 2 * pair_codes;
  const std::uint8_t* next_codes = p.codes + next.first / 2 * pair_codes;
  float largest[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    vf most = zero();
    for (int i = 0; i < window.rows; i += vf::width) most = max(load(weights + v * stride + i), most);
    largest[v] = largest_halves(most);
  }
  for (std::ptrdiff_t i = 0; i < next.rows / kRows * p.block_scales(); i += 64 / sizeof(std::uint16_t))
    prefetch(p.scales + next.first / kRows * p.block_scales() + i);
  for (std::ptrdiff_t g = 0; g < p.groups; ++g) {
    alignas(64) float scales[kWindow];
    alignas(64) std::int16_t shorts[Vectors][kWindow];
    float own[Vectors];
    for (int i = 0; i < window.rows; i += kRows)
      rows_store(scales + i, load_scales(p.scales + (window.first + i) / kRows * p.block_scales() + g * kRows));
    weight_shorts<Vectors>(weights, stride, largest, scales, window.rows, shorts, own);
    const std::uint8_t* codes = own_codes + g * p.group_codes();
    const std::uint8_t* ahead = next_codes + g * p.group_codes();
    for (int r = window.count; r < next.count; ++r) prefetch(ahead + next.pairs[r] * pair_codes);
    for (int half = 0; half < kGroup / kRows; half += kTogether)
      add_columns<Format, Vectors, kTogether>(codes + half * Format::pair_bytes, pair_codes, window, shorts, own, out,
                                            g * kGroup + half * kRows, ahead, next);
  }
}

// The same for any number of vectors.
template <class Format>
inline void add_pairs(const lamp::RowPairs& p, const Window& window, const Window& next, const float* weights,
                      std::ptrdiff_t stride, float* const* out, std::ptrdiff_t vectors) {
  std::ptrdiff_t v = 0;
  for (; v + 4 <= vectors; v += 4) add_pairs<Format, 4>(p, window, next, weights + v * stride, stride, out + v);
  if (vectors - v == 3) add_pairs<Format, 3>(p, window, next, weights + v * stride, stride, out + v);
  if (vectors - v == 2) add_pairs<Format, 2>(p, window, next, weights + v * stride, stride, out + v);
  if (vectors - v == 1) add_pairs<Format, 1>(p, window, next, weights + v * stride, stride, out + v);
}

inline void add_pairs(const lamp::RowPairs& p, const Window& window, const Window& next, const float* weights,
                      std::ptrdiff_t stride, float* const* out, std::ptrdiff_t vectors) {
  lamp::RowPairFormats::with(p.bits, [&]<class Format>() {
    add_pairs<Format>(p, window, next, weights, stride, out, vectors);
  });
}

// out += weight * a full-precision row.
template <class T>
inline void add_full(const T* row, float weight, std::ptrdiff_t columns, float* out) {
  const vf w = set1(weight);
  std::ptrdiff_t k = 0;
  for (; k + vf::width <= columns; k += vf::width) store(out + k, fma(w, widen(row + k), load(out + k)));
  for (; k < columns; ++k) out[k] = std::fma(weight, widen_one(row + k), out[k]);
}

inline void add_full(const lamp::Full& full, std::ptrdiff_t row, float weight, std::ptrdiff_t columns, float* out) {
  full.with_row(row, [&](const auto* numbers) { add_full(numbers, weight, columns, out); });
}

}  // namespace LAMP_ISA
