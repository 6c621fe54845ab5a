// Weighted sums of rows, as the values of an attention are summed: by FMAs in the order of the keys.
#pragma once

#include <cstddef>

#include "simd/vector.hpp"

namespace LAMP_ISA {

// out[r] = sum over keys [first, last) of probability[r][key] * v[key], by FMAs in the order of the keys.
template <int Rows, int Vectors>
inline void values_micro(const float* const* probability, const float* v, std::ptrdiff_t v_row, std::ptrdiff_t first,
                         std::ptrdiff_t last, float* const* out, std::ptrdiff_t column) {
  vf acc[Rows][Vectors];
  for (auto& row : acc)
    for (auto& x : row) x = zero();
  for (std::ptrdiff_t j = first; j < last; ++j) {
    vf value[Vectors];
    for (int c = 0; c < Vectors; ++c) value[c] = load(v + j * v_row + column + c * vf::width);
    for (int r = 0; r < Rows; ++r) {
      const vf z = set1(probability[r][j]);
      for (int c = 0; c < Vectors; ++c) acc[r][c] = fma(z, value[c], acc[r][c]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Vectors; ++c) store(out[r] + column + c * vf::width, acc[r][c]);
}

template <int Rows>
inline void values_rows(const float* const* probability, const float* v, std::ptrdiff_t v_row, std::ptrdiff_t first,
                        std::ptrdiff_t last, float* const* out, std::ptrdiff_t Dv) {
  std::ptrdiff_t column = 0;
  for (; column + 2 * vf::width <= Dv; column += 2 * vf::width)
    values_micro<Rows, 2>(probability, v, v_row, first, last, out, column);
  for (; column + vf::width <= Dv; column += vf::width)
    values_micro<Rows, 1>(probability, v, v_row, first, last, out, column);
  for (; column < Dv; ++column)
    for (int r = 0; r < Rows; ++r) {
      float acc = 0.0f;
      for (std::ptrdiff_t j = first; j < last; ++j) acc = std::fma(probability[r][j], v[j * v_row + column], acc);
      out[r][column] = acc;
    }
}

}  // namespace LAMP_ISA
