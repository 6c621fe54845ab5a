// The three inner loops of every low-bit kernel: sixteen low-bit rows times vectors, one full-precision row times a
// vector, and a weighted sum of low-bit or full-precision rows.
#pragma once

#include "lowbit_pack.hpp"

namespace LAMP_ISA {

// out[v][row] = sum over columns of row * vector v, for the sixteen rows of a block and Vectors vectors.
template <int Bits, int Vectors>
inline void block_dot(const std::uint8_t* codes, const std::uint16_t* scales, std::ptrdiff_t groups,
                      const std::int16_t* const* x, const float* const* x_scale, vrows* out) {
  constexpr std::ptrdiff_t kBytes = lamp::pair_bytes(Bits);
  for (int v = 0; v < Vectors; ++v) out[v] = rows_zero();
  for (std::ptrdiff_t g = 0; g < groups; ++g) {
    vsums sums[Vectors];
    for (auto& s : sums) s = sums_zero();
    for (int pair = 0; pair < kGroup / 2; ++pair, codes += kBytes) {
      const vpairs rows = load_pairs<Bits>(codes);
      for (int v = 0; v < Vectors; ++v) {
        std::int32_t both;
        std::memcpy(&both, x[v] + g * kGroup + 2 * pair, sizeof both);
        sums[v] = multiply_add(rows, both, sums[v]);
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
template <int Bits>
inline void block_dots(const lamp::Blocks& b, std::ptrdiff_t block, const Shorts& x, std::ptrdiff_t first,
                       std::ptrdiff_t vectors, float* out) {
  const std::uint8_t* codes = b.codes + block * b.block_codes();
  const std::uint16_t* scales = b.scales + block * b.block_scales();
  const auto run = [&]<int Vectors>(std::ptrdiff_t v) {
    const std::int16_t* at[Vectors];
    const float* scale[Vectors];
    vrows sums[Vectors];
    for (int i = 0; i < Vectors; ++i) at[i] = x.at(first + v + i), scale[i] = x.scale(first + v + i);
    block_dot<Bits, Vectors>(codes, scales, b.groups, at, scale, sums);
    for (int i = 0; i < Vectors; ++i) rows_store(out + (v + i) * kRows, sums[i]);
  };
  std::ptrdiff_t v = 0;
  for (; v + 4 <= vectors; v += 4) run.template operator()<4>(v);
  if (vectors - v == 3) run.template operator()<3>(v);
  if (vectors - v == 2) run.template operator()<2>(v);
  if (vectors - v == 1) run.template operator()<1>(v);
}

inline void block_dots(const lamp::Blocks& b, std::ptrdiff_t block, const Shorts& x, std::ptrdiff_t first,
                       std::ptrdiff_t vectors, float* out) {
  if (b.bits == 4) return block_dots<4>(b, block, x, first, vectors, out);
  if (b.bits == 8) return block_dots<8>(b, block, x, first, vectors, out);
  block_dots<12>(b, block, x, first, vectors, out);
}

// A full-precision row times a float32 vector, in float32 with four running sums.
template <class T>
inline float full_dot(const T* row, const float* x, std::ptrdiff_t columns) {
  vf sum[4] = {zero(), zero(), zero(), zero()};
  std::ptrdiff_t k = 0;
  for (; k + 4 * vf::width <= columns; k += 4 * vf::width)
    for (int i = 0; i < 4; ++i) sum[i] = fma(widen(row + k + i * vf::width), load(x + k + i * vf::width), sum[i]);
  for (; k + vf::width <= columns; k += vf::width) sum[0] = fma(widen(row + k), load(x + k), sum[0]);
  float tail = 0.0f;
  for (; k < columns; ++k) tail = std::fma(widen_one(row + k), x[k], tail);
  return sum_halves((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail;
}

// The same for a row of 16-bit integers with a scale for each group.
inline float full_dot(const std::int16_t* row, const std::uint16_t* scales, const float* x, std::ptrdiff_t columns) {
  vf total = zero();
  float tail = 0.0f;
  for (std::ptrdiff_t g = 0; g * kGroup < columns; ++g, row += kGroup, x += kGroup) {
    const float scale = from_bf16(scales[g]);
    const std::ptrdiff_t count = std::min<std::ptrdiff_t>(kGroup, columns - g * kGroup);
    vf part = zero();
    std::ptrdiff_t k = 0;
    for (; k + vf::width <= count; k += vf::width) part = fma(widen_i16(row + k), load(x + k), part);
    total = fma(part, set1(scale), total);
    float rest = 0.0f;
    for (; k < count; ++k) rest = std::fma(static_cast<float>(row[k]), x[k], rest);
    tail = std::fma(rest, scale, tail);
  }
  return sum_halves(total) + tail;
}

inline float full_dot(const lamp::Full& full, std::ptrdiff_t row, const float* x, std::ptrdiff_t columns) {
  if (full.scales)
    return full_dot(static_cast<const std::int16_t*>(full.data) + row * full.row,
                    full.scales + row * ((columns + kGroup - 1) / kGroup), x, columns);
  if (full.half) return full_dot(static_cast<const std::uint16_t*>(full.data) + row * full.row, x, columns);
  return full_dot(static_cast<const float*>(full.data) + row * full.row, x, columns);
}

// A row with its weights, one for each of the vectors that are summed together.
constexpr int kStrip = 32;  // rows taken together: their codes stay in the first-level cache
struct Strip {
  std::ptrdiff_t rows[kStrip];
  float weights[4][kStrip];
  int count = 0;
};

// out[v][group] += sum over the strip of weight[v] * row: one group of columns, all rows, then the next.
template <int Bits, int Vectors>
inline void add_lines(const lamp::Lines& l, const Strip& strip, float* const* out) {
  constexpr int kParts = kGroup / vf::width;
  for (std::ptrdiff_t g = 0; g < l.groups; ++g) {
    vf sum[Vectors][kParts];
    for (int v = 0; v < Vectors; ++v)
      for (int i = 0; i < kParts; ++i) sum[v][i] = load(out[v] + g * kGroup + i * vf::width);
    for (int r = 0; r < strip.count; ++r) {
      const std::ptrdiff_t at = strip.rows[r] * l.groups + g;
      vf part[kParts];
      widen_group<Bits>(l.codes + at * lamp::group_bytes(Bits), part);
      const float scale = from_bf16(l.scales[at]);
      for (int v = 0; v < Vectors; ++v) {
        const vf w = set1(strip.weights[v][r] * scale);
        for (int i = 0; i < kParts; ++i) sum[v][i] = fma(w, part[i], sum[v][i]);
      }
    }
    for (int v = 0; v < Vectors; ++v)
      for (int i = 0; i < kParts; ++i) store(out[v] + g * kGroup + i * vf::width, sum[v][i]);
  }
}

template <int Vectors>
inline void add_lines(const lamp::Lines& l, const Strip& strip, float* const* out) {
  if (l.bits == 4) return add_lines<4, Vectors>(l, strip, out);
  add_lines<8, Vectors>(l, strip, out);
}

// out += weight * a full-precision row.
template <class T>
inline void add_full(const T* row, float weight, std::ptrdiff_t columns, float* out) {
  const vf w = set1(weight);
  std::ptrdiff_t k = 0;
  for (; k + vf::width <= columns; k += vf::width) store(out + k, fma(w, widen(row + k), load(out + k)));
  for (; k < columns; ++k) out[k] = std::fma(weight, widen_one(row + k), out[k]);
}

inline void add_full(const std::int16_t* row, const std::uint16_t* scales, float weight, std::ptrdiff_t columns,
                     float* out) {
  for (std::ptrdiff_t g = 0; g * kGroup < columns; ++g, row += kGroup, out += kGroup) {
    const float own = weight * from_bf16(scales[g]);
    const std::ptrdiff_t count = std::min<std::ptrdiff_t>(kGroup, columns - g * kGroup);
    std::ptrdiff_t k = 0;
    for (; k + vf::width <= count; k += vf::width)
      store(out + k, fma(set1(own), widen_i16(row + k), load(out + k)));
    for (; k < count; ++k) out[k] = std::fma(own, static_cast<float>(row[k]), out[k]);
  }
}

inline void add_full(const lamp::Full& full, std::ptrdiff_t row, float weight, std::ptrdiff_t columns, float* out) {
  if (full.scales)
    return add_full(static_cast<const std::int16_t*>(full.data) + row * full.row,
                    full.scales + row * ((columns + kGroup - 1) / kGroup), weight, columns, out);
  if (full.half) return add_full(static_cast<const std::uint16_t*>(full.data) + row * full.row, weight, columns, out);
  add_full(static_cast<const float*>(full.data) + row * full.row, weight, columns, out);
}

}  // namespace LAMP_ISA
