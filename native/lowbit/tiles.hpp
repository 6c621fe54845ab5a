// Low-bit rows times many vectors. Codes are unpacked once into a panel of 16-bit integers that stays in the first-level
// cache, and tiles of vectors are multiplied by it; every group of columns is summed exactly, and the groups in float32,
// as `block_dot` does, in the same order: the results are those of one vector at a time, bit for bit.
#pragma once

#include "lowbit/products.hpp"
#include "pool.hpp"

namespace LAMP_ISA {

// Blocks of rows that a tile has beside each other, and its vectors: as many sums as registers hold.
constexpr int kTileBlocks = vf::width == kRows ? 2 : 1, kTileVectors = vf::width == kRows ? 8 : 4;
constexpr std::ptrdiff_t kPanelGroups = 8;   // groups of columns of a panel
constexpr std::ptrdiff_t kPairShorts = 2 * kRows;  // integers of a pair of columns of a block
constexpr std::ptrdiff_t kPanelShorts = kPanelGroups * (kGroup / 2) * kPairShorts;  // of a block
// From so many vectors on panels are worth their unpacking.
constexpr std::ptrdiff_t kMany = 5;
// Vectors whose sums are formed before the panel moves on.
constexpr std::ptrdiff_t kVectorsTogether = 128;

// Blocks of one or two matrices of the same size, sixteen rows each: what a tile multiplies.
struct Strip {
  const lamp::Blocks* matrix[2] = {};
  std::ptrdiff_t block[2] = {};
  int count = 0;
};

// Codes of so many pairs of columns of a block as 16-bit integers.
template <class Format>
inline void unpack_panel(const std::uint8_t* codes, std::ptrdiff_t pairs, std::int16_t* panel) {
  for (std::ptrdiff_t i = 0; i < pairs; ++i, codes += Format::pair_bytes, panel += kPairShorts) {
    __builtin_prefetch(codes + kAhead);
    store_pairs(panel, Format::template load<Integers>(codes));
  }
}

// sums[v][block][row] += panel * vector v, over the groups of the panel, which begins at rows[block]; `stride` from a
// vector's sums to the next's.
template <int Blocks, int Vectors>
LAMP_OWN_FUNCTION inline void panel_dot(const std::int16_t* const* rows, const std::uint16_t* const* scales,
                      std::ptrdiff_t groups, const std::int16_t* const* x, const float* const* x_scale, float* sums,
                      std::ptrdiff_t stride) {
  const std::int16_t *first = rows[0], *second = rows[Blocks - 1];
  for (std::ptrdiff_t g = 0; g < groups; ++g) {
    vsums integers[Vectors * Blocks];
    for (auto& s : integers) s = sums_zero();
    for (int pair = 0; pair < kGroup / 2; ++pair, first += kPairShorts, second += kPairShorts) {
      vpairs columns[Blocks];
      columns[0] = load_pairs(first);
      if constexpr (Blocks == 2) columns[1] = load_pairs(second);
      for (int v = 0; v < Vectors; ++v) {
        std::int32_t both;
        std::memcpy(&both, x[v] + g * kGroup + 2 * pair, sizeof both);
        for (int b = 0; b < Blocks; ++b) {
          vsums& s = integers[v * Blocks + b];
          s = multiply_add(columns[b], both, s);
          pin(s);
        }
      }
    }
    for (int b = 0; b < Blocks; ++b) {
      const vrows scale = load_scales(scales[b] + g * kRows);
      for (int v = 0; v < Vectors; ++v) {
        const vrows sum = to_rows(integers[v * Blocks + b]);
        const vf own = set1(x_scale[v][g]);
        float* to = sums + v * stride + b * kRows;
        for (int i = 0; i < kRowVectors; ++i, to += vf::width)
          store(to, fma(sum.v[i], scale.v[i] * own, load(to)));
      }
    }
  }
}

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

// A panel of the groups [group, group + groups) of whole rows.
struct Panel {
  const std::int16_t* rows[2] = {};
  const std::uint16_t* scales[2] = {};
  std::ptrdiff_t group = 0, groups = 0;
};

// Blocks of a panel from `block` on times vectors, tile after tile.
template <int Blocks>
inline void panel_dots(const Panel& panel, int block, const Shorts& x, std::ptrdiff_t first, std::ptrdiff_t vectors,
                       float* sums, std::ptrdiff_t stride) {
  for (std::ptrdiff_t v = 0; v < vectors; v += kTileVectors)
    with_count<kTileVectors>(std::min<std::ptrdiff_t>(kTileVectors, vectors - v), [&]<int Vectors>() {
      const std::int16_t* at[Vectors];
      const float* scale[Vectors];
      for (int i = 0; i < Vectors; ++i) {
        at[i] = x.at(first + v + i) + panel.group * kGroup;
        scale[i] = x.scale(first + v + i) + panel.group;
      }
      panel_dot<Blocks, Vectors>(panel.rows + block, panel.scales + block, panel.groups, at, scale,
                                 sums + v * stride + block * kRows, stride);
    });
}

// sums[v][block of the strip][row] = rows of the strip * vector first + v.
inline void strip_dots(const Strip& strip, const Shorts& x, std::ptrdiff_t first, std::ptrdiff_t vectors, float* sums) {
  alignas(64) static thread_local std::int16_t codes[2][kPanelShorts];
  const std::ptrdiff_t all = x.groups, stride = strip.count * kRows;
  std::fill_n(sums, vectors * stride, 0.0f);
  Panel panel;
  for (std::ptrdiff_t g = 0; g < all; g += kPanelGroups) {
    panel.group = g;
    panel.groups = std::min(kPanelGroups, all - g);
    for (int b = 0; b < strip.count; ++b) {
      const lamp::Blocks& m = *strip.matrix[b];
      const std::ptrdiff_t block = strip.block[b];
      panel.rows[b] = codes[b];
      panel.scales[b] = m.scales + block * m.block_scales() + g * kRows;
      lamp::BlockFormats::with(m.bits, [&]<class Format>() {
        const std::ptrdiff_t pairs = kGroup / 2;
        unpack_panel<Format>(m.codes + block * m.block_codes() + g * pairs * Format::pair_bytes, panel.groups * pairs,
                             codes[b]);
      });
    }
    if constexpr (kTileBlocks == 2) {
      if (strip.count == 2) {
        panel_dots<2>(panel, 0, x, first, vectors, sums, stride);
        continue;
      }
    }
    for (int b = 0; b < strip.count; ++b) panel_dots<1>(panel, b, x, first, vectors, sums, stride);
  }
}

// y[v] = matrix * vector v, for vectors that are quantised already: the rows of a pair of blocks and some vectors are
// an item of work.
inline void tiled_products(const lamp::Blocks& matrix, std::ptrdiff_t rows, const Shorts& x, std::ptrdiff_t vectors,
                           float* y, int threads) {
  const std::ptrdiff_t blocks = (rows + kRows - 1) / kRows, strips = (blocks + 1) / 2;
  const std::ptrdiff_t chunks = (vectors + kVectorsTogether - 1) / kVectorsTogether;
  lamp::parallel(threads, strips * chunks, [&](std::ptrdiff_t item) {
    alignas(64) static thread_local float sums[kVectorsTogether * 2 * kRows];
    const std::ptrdiff_t block = item % strips * 2, first = item / strips * kVectorsTogether;
    const std::ptrdiff_t some = std::min(kVectorsTogether, vectors - first);
    const Strip strip{{&matrix, &matrix}, {block, block + 1}, block + 1 < blocks ? 2 : 1};
    strip_dots(strip, x, first, some, sums);
    const std::ptrdiff_t wide = strip.count * kRows, kept = std::min(wide, rows - block * kRows);
    for (std::ptrdiff_t v = 0; v < some; ++v)
      std::copy_n(sums + v * wide, kept, y + (first + v) * rows + block * kRows);
  });
}

}  // namespace LAMP_ISA
