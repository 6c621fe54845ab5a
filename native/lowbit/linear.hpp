// Packing of whole matrices, and a low-bit matrix times a few vectors.
#pragma once

#include "lowbit/tiles.hpp"

namespace LAMP_ISA {

inline void pack_blocks(const lamp::Blocks& blocks, const lamp::Rows& rows, int threads) {
  // A block's rows share cache lines, so a block is one item.
  lamp::parallel(threads, (rows.count + kRows - 1) / kRows, [&](std::ptrdiff_t item) {
    const std::ptrdiff_t last = std::min(rows.count, (item + 1) * kRows);
    for (std::ptrdiff_t r = item * kRows; r < last; ++r) pack_block_row(blocks, r, rows.at(r), rows.columns);
  });
}

// Blocks that one item of work takes: enough to be worth the hand-over, few enough to share out evenly.
inline std::ptrdiff_t blocks_together(std::ptrdiff_t blocks) { return std::clamp<std::ptrdiff_t>(blocks / 16, 1, 64); }

// Vectors as 16-bit integers, in tiles, too, where there are many.
struct Vectors {
  Shorts shorts;
  Tiles tiles;
  std::ptrdiff_t count = 0;

  void set(const float* x, std::ptrdiff_t stride, std::ptrdiff_t vectors, std::ptrdiff_t columns, int threads) {
    constexpr std::ptrdiff_t kWorthwhile = 1 << 14;  // numbers, for one thread
    const std::ptrdiff_t some = std::max<std::ptrdiff_t>(1, kWorthwhile / std::max<std::ptrdiff_t>(1, columns));
    count = vectors;
    shorts.reserve(vectors, columns);
    if (vectors >= kMany) tiles.reserve(vectors, shorts.groups);
    lamp::parallel(threads, (vectors + some - 1) / some, [&](std::ptrdiff_t item) {
      for (std::ptrdiff_t v = item * some; v < std::min(vectors, (item + 1) * some); ++v) {
        shorts.set(v, x + v * stride, columns);
        if (vectors >= kMany) tiles.set(v, shorts);
      }
    });
  }
};

// y[v] = matrix * vector v, for vectors that are quantised already.
inline void products_of(const lamp::Blocks& matrix, std::ptrdiff_t rows, const Vectors& x, float* y,
                        int threads) {
  const std::ptrdiff_t vectors = x.count;
  if (vectors >= kMany) return tiled_products(matrix, rows, x.tiles, vectors, y, threads);
  const std::ptrdiff_t blocks = (rows + kRows - 1) / kRows, together = blocks_together(blocks);
  lamp::parallel(threads, (blocks + together - 1) / together, [&](std::ptrdiff_t item) {
    alignas(64) float sums[kMany * kRows];
    for (std::ptrdiff_t b = item * together; b < std::min(blocks, (item + 1) * together); ++b) {
      block_dots(matrix, b, x.shorts, 0, vectors, sums);
      for (std::ptrdiff_t v = 0; v < vectors; ++v)
        std::copy_n(sums + v * kRows, std::min<std::ptrdiff_t>(kRows, rows - b * kRows), y + v * rows + b * kRows);
    }
  });
}

// Vectors whose integers are held at a time: those of a prompt of any length stay in the second cache.
constexpr std::ptrdiff_t kVectorsOfPass = 4 * kVectorsTogether;

inline void lowbit_products(const lamp::LowBitProducts& p) {
  if (p.rows == 0) return;
  thread_local Vectors own;
  Vectors& x = own;
  for (std::ptrdiff_t v = 0; v < p.vectors; v += kVectorsOfPass) {
    const std::ptrdiff_t some = std::min(kVectorsOfPass, p.vectors - v);
    x.set(p.x + v * p.columns, p.columns, some, p.columns, p.threads);
    products_of(p.matrix, p.rows, x, p.y + v * p.rows, p.threads);
  }
}

}  // namespace LAMP_ISA
