// The drivers of the per-step products and of the recomputation of masked entries: packing, tiling, threads.
#pragma once

#include "memory.hpp"
#include "simulation/unit_sums.hpp"

namespace LAMP_ISA {

constexpr std::ptrdiff_t kTileRows = 48;  // rows that share a packed block while it is in the first-level cache

inline std::vector<std::ptrdiff_t> multiples(std::ptrdiff_t count, std::ptrdiff_t stride) {
  std::vector<std::ptrdiff_t> r(static_cast<std::size_t>(count));
  for (std::ptrdiff_t i = 0; i < count; ++i) r[static_cast<std::size_t>(i)] = i * stride;
  return r;
}

void products(const lamp::Products& p) {
  if (p.G == 0 || p.M == 0 || p.N == 0) return;
  const auto bytes = static_cast<std::size_t>(p.G * p.M * p.N) * sizeof(float);
  lamp::prefer_large_pages(p.out, bytes);
  if (p.squares) lamp::prefer_large_pages(p.squares, bytes);
  Packed& packed = workspace_packed();
  const auto offsets = multiples(p.G / p.group, p.b_batch);
  packed.pack(p.b, p.G / p.group, offsets.data(), p.b_k, p.b_column, p.K, p.N, p.threads);
  Magnitudes seen;
  for (std::ptrdiff_t g = 0; g < p.G; ++g)
    for (std::ptrdiff_t i = 0; i < p.M; ++i) seen.add(p.a + g * p.a_batch + i * p.a_row, p.K, p.a_k);
  const Micro micro =
      pick_sums(p.accumulation, p.squares != nullptr, seen, packed.all(), p.K);

  const std::ptrdiff_t tiles = (p.M + kTileRows - 1) / kTileRows;
  lamp::parallel(p.threads, p.G * tiles, [&](std::ptrdiff_t item) {
    const std::ptrdiff_t g = item / tiles, first = item % tiles * kTileRows;
    const std::ptrdiff_t last = std::min(first + kTileRows, p.M);
    const auto visible = [&](std::ptrdiff_t i) {
      return p.causal ? std::clamp<std::ptrdiff_t>(i + p.offset + 1, 0, p.N) : p.N;
    };
    alignas(64) float edge[kMostRows][kColumns], edge_squares[kMostRows][kColumns];
    const float* a[kMostRows];
    float *out[kMostRows], *squares[kMostRows];
    for (std::ptrdiff_t column = 0; column < visible(last - 1); column += kColumns) {
      const bool whole = column + kColumns <= p.N;  // else the block's padding must not reach the result
      const std::ptrdiff_t columns = std::min(kColumns, p.N - column);
      for (std::ptrdiff_t i = first; i < last; i += micro.rows) {
        const int rows = static_cast<int>(std::min<std::ptrdiff_t>(micro.rows, last - i));
        if (visible(i + rows - 1) <= column) continue;
        for (int r = 0; r < rows; ++r) {
          const std::ptrdiff_t at = (g * p.M + i + r) * p.N + column;
          a[r] = p.a + g * p.a_batch + (i + r) * p.a_row;
          out[r] = whole ? p.out + at : edge[r];
          if (p.squares) squares[r] = whole ? p.squares + at : edge_squares[r];
        }
        micro.run(p.accumulation,
                  {a, p.a_k, packed.block(g / p.group, column / kColumns), p.K, out, p.squares ? squares : nullptr},
                  rows);
        for (int r = 0; r < rows && !whole; ++r) {
          const std::ptrdiff_t at = (g * p.M + i + r) * p.N + column;
          std::copy_n(edge[r], columns, p.out + at);
          if (p.squares) std::copy_n(edge_squares[r], columns, p.squares + at);
        }
      }
    }
    for (std::ptrdiff_t i = first; i < last; ++i) {
      float* row = p.out + (g * p.M + i) * p.N;
      const std::ptrdiff_t n = visible(i);
      if (p.scaled) scale_and_round(row, n, p.scaling, p.accumulation.result());
      std::fill(row + n, row + p.N, 0.0f);
      if (p.squares) std::fill(p.squares + (row - p.out) + n, p.squares + (row - p.out) + p.N, 0.0f);
    }
  });
}

// out[c] = a . b[:, columns[c]] by float32 FMAs in the order k = 0, 1, ...; eight independent sums at a time.
inline void dots(const float* a, std::ptrdiff_t a_k, const float* b, std::ptrdiff_t b_k, std::ptrdiff_t b_column,
                 std::ptrdiff_t K, const std::ptrdiff_t* columns, std::ptrdiff_t count, float* out) {
  constexpr std::ptrdiff_t kTogether = 8;
  for (std::ptrdiff_t c = 0; c < count; c += kTogether) {
    const std::ptrdiff_t some = std::min(kTogether, count - c);
    const float* column[kTogether];
    float acc[kTogether] = {};
    for (std::ptrdiff_t t = 0; t < kTogether; ++t) column[t] = b + columns[c + std::min(t, some - 1)] * b_column;
    for (std::ptrdiff_t k = 0; k < K; ++k)
      for (std::ptrdiff_t t = 0; t < kTogether; ++t) acc[t] = std::fma(a[k * a_k], column[t][k * b_k], acc[t]);
    std::copy_n(acc, some, out + c);
  }
}

void recompute(const lamp::Recompute& p) {
  lamp::parallel(p.threads, p.G * p.M, [&](std::ptrdiff_t item) {
    const std::ptrdiff_t g = item / p.M, i = item % p.M;
    const std::uint8_t* mask = p.mask + g * p.mask_batch + i * p.mask_row;
    thread_local std::vector<std::ptrdiff_t> columns;
    thread_local std::vector<float> values;
    columns.clear();
    for (std::ptrdiff_t j = 0; j < p.N; ++j)
      if (mask[j]) columns.push_back(j);
    values.resize(columns.size());
    const auto count = static_cast<std::ptrdiff_t>(columns.size());
    dots(p.a + g * p.a_batch + i * p.a_row, p.a_k, p.b + g / p.group * p.b_batch, p.b_k, p.b_column, p.K,
         columns.data(), count, values.data());
    float* row = p.scores + (g * p.M + i) * p.N;
    for (std::ptrdiff_t c = 0; c < count; ++c)
      row[columns[static_cast<std::size_t>(c)]] =
          p.scaled ? values[static_cast<std::size_t>(c)] * p.scaling : values[static_cast<std::size_t>(c)];
  });
}

}  // namespace LAMP_ISA
