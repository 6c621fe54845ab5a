// The drivers of the per-step products and of the recomputation of masked entries: packing, tiling, threads.
#pragma once

#include "memory.hpp"
#include "simulation/unit_sums.hpp"

namespace LAMP_ISA {

constexpr std::ptrdiff_t kTileRows = 48;  // rows that share a packed block while it is in the first-level cache
// Numbers of b that a thread packs for itself where all of b, packed at once, would be too large.
constexpr std::ptrdiff_t kPanel = std::ptrdiff_t{1} << 20;

inline std::vector<std::ptrdiff_t> multiples(std::ptrdiff_t count, std::ptrdiff_t stride) {
  std::vector<std::ptrdiff_t> r(static_cast<std::size_t>(count));
  for (std::ptrdiff_t i = 0; i < count; ++i) r[static_cast<std::size_t>(i)] = i * stride;
  return r;
}

// The parts of one call: rows against a packed block, and what is done to finished sums.
struct ProductTiles {
  const lamp::Products& p;
  const Micro micro;

  std::ptrdiff_t matrices() const { return p.G / p.group; }
  std::ptrdiff_t blocks() const { return (p.N + kColumns - 1) / kColumns; }
  std::ptrdiff_t row_tiles() const { return (p.M + kTileRows - 1) / kTileRows; }
  std::ptrdiff_t visible(std::ptrdiff_t i) const {
    return p.causal ? std::clamp<std::ptrdiff_t>(i + p.offset + 1, 0, p.N) : p.N;
  }
  const float* row(std::ptrdiff_t g, std::ptrdiff_t i) const { return p.a + g * p.a_batch + i * p.a_row; }

  // Sums of rows [first, last) with the columns of one block, packed from k = 0 to the end.
  void block(std::ptrdiff_t g, std::ptrdiff_t first, std::ptrdiff_t last, std::ptrdiff_t column,
             const float* packed) const {
    alignas(64) float edge[kMostRows][kColumns], edge_squares[kMostRows][kColumns];
    const float* a[kMostRows];
    float *out[kMostRows], *squares[kMostRows];
    const bool whole = column + kColumns <= p.N;  // else the block's padding must not reach the result
    const std::ptrdiff_t columns = std::min(kColumns, p.N - column);
    for (std::ptrdiff_t i = first; i < last; i += micro.rows) {
      const int rows = static_cast<int>(std::min<std::ptrdiff_t>(micro.rows, last - i));
      if (visible(i + rows - 1) <= column) continue;
      for (int r = 0; r < rows; ++r) {
        const std::ptrdiff_t at = (g * p.M + i + r) * p.N + column;
        a[r] = row(g, i + r);
        out[r] = whole ? p.out + at : edge[r];
        if (p.squares) squares[r] = whole ? p.squares + at : edge_squares[r];
      }
      micro.run(p.accumulation, {a, p.a_k, packed, p.K, out, p.squares ? squares : nullptr}, rows);
      for (int r = 0; r < rows && !whole; ++r) {
        const std::ptrdiff_t at = (g * p.M + i + r) * p.N + column;
        std::copy_n(edge[r], columns, p.out + at);
        if (p.squares) std::copy_n(edge_squares[r], columns, p.squares + at);
      }
    }
  }

  // Columns [from, to) of rows [first, last): scaled where they are seen, 0 elsewhere.
  void finish(std::ptrdiff_t g, std::ptrdiff_t first, std::ptrdiff_t last, std::ptrdiff_t from,
              std::ptrdiff_t to) const {
    for (std::ptrdiff_t i = first; i < last; ++i) {
      const std::ptrdiff_t at = (g * p.M + i) * p.N, seen = std::clamp(visible(i), from, to);
      if (p.scaled) scale_and_round(p.out + at + from, seen - from, p.scaling, p.accumulation.result());
      std::fill(p.out + at + seen, p.out + at + to, 0.0f);
      if (p.squares) std::fill(p.squares + at + seen, p.squares + at + to, 0.0f);
    }
  }

  // A tile of rows with one block of columns whose sums are too long to be packed at once: piece by piece.
  void deep(std::ptrdiff_t g, std::ptrdiff_t first, std::ptrdiff_t last, std::ptrdiff_t column, float* panel) const {
    alignas(64) float sums[kTileRows][kColumns], carry[kTileRows][kColumns], squares[kTileRows][kColumns];
    const float* a[kTileRows];
    float *to_sums[kTileRows], *to_carry[kTileRows], *to_squares[kTileRows];
    const int rows = static_cast<int>(last - first);
    const std::ptrdiff_t columns = std::min(kColumns, p.N - column), depth = kPanel / kColumns;
    const float* b = p.b + g / p.group * p.b_batch + column * p.b_column;
    for (int r = 0; r < rows; ++r) to_sums[r] = sums[r], to_carry[r] = carry[r], to_squares[r] = squares[r];
    for (std::ptrdiff_t k = 0; k < p.K; k += depth) {
      lamp::check_interruption();
      const std::ptrdiff_t some = std::min(depth, p.K - k);
      pack_block(b + k * p.b_k, p.b_k, p.b_column, some, columns, panel);
      for (int r = 0; r < rows; ++r) a[r] = row(g, first + r) + k * p.a_k;
      micro.run(p.accumulation,
                {a, p.a_k, panel, some, to_sums, p.squares ? to_squares : nullptr, k, k + some == p.K, to_carry}, rows);
    }
    for (int r = 0; r < rows; ++r) {
      const std::ptrdiff_t at = (g * p.M + first + r) * p.N + column;
      std::copy_n(sums[r], columns, p.out + at);
      if (p.squares) std::copy_n(squares[r], columns, p.squares + at);
    }
  }
};

// The magnitudes of all of b.
inline Magnitudes magnitudes_of_b(const lamp::Products& p) {
  const bool along_k = p.b_k <= p.b_column;
  const std::ptrdiff_t outer = along_k ? p.N : p.K, inner = along_k ? p.K : p.N;
  const std::ptrdiff_t step = along_k ? p.b_column : p.b_k, stride = along_k ? p.b_k : p.b_column;
  const std::ptrdiff_t parts = std::min<std::ptrdiff_t>(outer, 64), matrices = p.G / p.group;
  std::vector<Magnitudes> found(static_cast<std::size_t>(matrices * parts));
  lamp::parallel(p.threads, matrices * parts, [&](std::ptrdiff_t item) {
    const float* b = p.b + item / parts * p.b_batch;
    const std::ptrdiff_t part = item % parts;
    for (std::ptrdiff_t i = outer * part / parts; i < outer * (part + 1) / parts; ++i)
      found[static_cast<std::size_t>(item)].add(b + i * step, inner, stride);
  });
  Magnitudes all;
  for (const Magnitudes& one : found) all.add(one);
  return all;
}

// All of b packed at once, for all rows.
inline void packed_products(const lamp::Products& p, const Magnitudes& of_a) {
  const LentPacked<> lent;
  Packed& packed = *lent;
  const auto offsets = multiples(p.G / p.group, p.b_batch);
  packed.pack(p.b, p.G / p.group, offsets.data(), p.b_k, p.b_column, p.K, p.N, p.threads);
  const ProductTiles tiles{p, pick_sums(p.accumulation, p.squares != nullptr, of_a, packed.all(), p.K)};
  const std::ptrdiff_t count = tiles.row_tiles();
  lamp::parallel(p.threads, p.G * count, [&](std::ptrdiff_t item) {
    const std::ptrdiff_t g = item / count, first = item % count * kTileRows, last = std::min(first + kTileRows, p.M);
    for (std::ptrdiff_t column = 0; column < tiles.visible(last - 1); column += kColumns)
      tiles.block(g, first, last, column, packed.block(g / p.group, column / kColumns));
    tiles.finish(g, first, last, 0, p.N);
  });
}

// Each thread packs what it needs itself, `kPanel` numbers at most: a block of columns for all rows or, where that is too
// deep, a piece of it for a tile of rows.
inline void streamed_products(const lamp::Products& p, const Magnitudes& of_a) {
  const ProductTiles tiles{p, pick_sums(p.accumulation, p.squares != nullptr, of_a, magnitudes_of_b(p), p.K)};
  const bool deep = p.accumulation.fuse.length == 0 && p.K * kColumns > kPanel;  // units take their sums whole
  const std::ptrdiff_t blocks = tiles.blocks(), parts = deep ? p.group * tiles.row_tiles() : 1;
  lamp::parallel(p.threads, tiles.matrices() * blocks * parts, [&](std::ptrdiff_t item) {
    thread_local std::vector<float> panel;
    panel.resize(static_cast<std::size_t>(deep ? kPanel : p.K * kColumns));
    const std::ptrdiff_t matrix = item / parts / blocks, column = item / parts % blocks * kColumns;
    const std::ptrdiff_t to = std::min(column + kColumns, p.N), part = item % parts;
    if (deep) {
      const std::ptrdiff_t g = matrix * p.group + part / tiles.row_tiles();
      const std::ptrdiff_t first = part % tiles.row_tiles() * kTileRows, last = std::min(first + kTileRows, p.M);
      if (column < tiles.visible(last - 1)) tiles.deep(g, first, last, column, panel.data());
      tiles.finish(g, first, last, column, to);
      return;
    }
    pack_block(p.b + matrix * p.b_batch + column * p.b_column, p.b_k, p.b_column, p.K, to - column, panel.data());
    for (std::ptrdiff_t g = matrix * p.group; g < (matrix + 1) * p.group; ++g)
      for (std::ptrdiff_t first = 0; first < p.M; first += kTileRows) {
        lamp::check_interruption();
        const std::ptrdiff_t last = std::min(first + kTileRows, p.M);
        tiles.block(g, first, last, column, panel.data());
        tiles.finish(g, first, last, column, to);
      }
  });
}

void products(const lamp::Products& p) {
  if (p.G == 0 || p.M == 0 || p.N == 0) return;
  const auto bytes = static_cast<std::size_t>(p.G * p.M * p.N) * sizeof(float);
  lamp::prefer_large_pages(p.out, bytes);
  if (p.squares) lamp::prefer_large_pages(p.squares, bytes);
  Magnitudes seen;
  for (std::ptrdiff_t g = 0; g < p.G; ++g)
    for (std::ptrdiff_t i = 0; i < p.M; ++i) seen.add(p.a + g * p.a_batch + i * p.a_row, p.K, p.a_k);
  const std::ptrdiff_t blocks = p.G / p.group * ((p.N + kColumns - 1) / kColumns);
  // A narrow matrix would grow to many times its size: its columns are padded to whole blocks.
  if (static_cast<std::size_t>(blocks * p.K * kColumns) * sizeof(float) <= lamp::kKeptBytes)
    packed_products(p, seen);
  else
    streamed_products(p, seen);
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
