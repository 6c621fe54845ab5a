// Packing of whole matrices, and a low-bit matrix times a few vectors.
#pragma once

#include "lowbit/products.hpp"
#include "pool.hpp"

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

// y[v] = matrix * vector v, for vectors that are quantised already.
inline void products_of(const lamp::Blocks& matrix, std::ptrdiff_t rows, const Shorts& x, std::ptrdiff_t vectors,
                        float* y, int threads) {
  const std::ptrdiff_t blocks = (rows + kRows - 1) / kRows, together = blocks_together(blocks);
  lamp::parallel(threads, (blocks + together - 1) / together, [&](std::ptrdiff_t item) {
    alignas(64) float sums[4 * kRows];
    for (std::ptrdiff_t b = item * together; b < std::min(blocks, (item + 1) * together); ++b)
      for (std::ptrdiff_t v = 0; v < vectors; v += 4) {
        const std::ptrdiff_t some = std::min<std::ptrdiff_t>(4, vectors - v);
        block_dots(matrix, b, x, v, some, sums);
        for (std::ptrdiff_t i = 0; i < some; ++i)
          std::copy_n(sums + i * kRows, std::min<std::ptrdiff_t>(kRows, rows - b * kRows),
                      y + (v + i) * rows + b * kRows);
      }
  });
}

inline void lowbit_products(const lamp::LowBitProducts& p) {
  if (p.rows == 0 || p.vectors == 0) return;
  thread_local Shorts x;
  x.reserve(p.vectors, p.columns);
  for (std::ptrdiff_t v = 0; v < p.vectors; ++v) x.set(v, p.x + v * p.columns, p.columns);
  products_of(p.matrix, p.rows, x, p.vectors, p.y, p.threads);
}

}  // namespace LAMP_ISA
