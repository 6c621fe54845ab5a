// Low-bit rows times many vectors. Codes are unpacked once into a panel of 16-bit integers that stays in the first-level
// cache, and tiles of vectors are multiplied by it; every group of columns is summed exactly, and the groups in float32,
// as `block_dot` does, in the same order: the results are those of one vector at a time, bit for bit.
#pragma once

#include <utility>

#include "lowbit/products.hpp"
#include "pool.hpp"

namespace LAMP_ISA {

// Blocks of rows that a tile has beside each other, and its vectors: as many sums as registers hold.
constexpr int kTileBlocks = vf::width == kRows ? 2 : 1, kTileVectors = kAtOnce;
constexpr std::ptrdiff_t kPanelGroups = 8;   // groups of columns of a panel
constexpr std::ptrdiff_t kPairShorts = 2 * kRows;  // integers of a pair of columns of a block
constexpr std::ptrdiff_t kPanelShorts = kPanelGroups * (kGroup / 2) * kPairShorts;  // of a block
// From so many vectors on panels are worth their unpacking.
constexpr std::ptrdiff_t kMany = kAtOnce + 1;
// Vectors whose sums are formed before the panel moves on.
constexpr std::ptrdiff_t kVectorsTogether = 128;

// Vectors in tiles: pairs of their integers [tile][group][pair][vector of the tile], scales [tile][group][vector].
constexpr std::ptrdiff_t kTilePairs = kGroup / 2 * kTileVectors;  // of a group
struct Tiles {
  std::vector<std::int32_t> pairs;
  std::vector<float> scales;
  std::ptrdiff_t groups = 0;

  void reserve(std::ptrdiff_t vectors, std::ptrdiff_t groups_) {
    groups = groups_;
    const std::ptrdiff_t tiles = (vectors + kTileVectors - 1) / kTileVectors;
    pairs.resize(static_cast<std::size_t>(tiles * groups * kTilePairs));
    scales.resize(static_cast<std::size_t>(tiles * groups * kTileVectors));
  }
  void set(std::ptrdiff_t vector, const Shorts& x) {
    const std::ptrdiff_t tile = vector / kTileVectors, lane = vector % kTileVectors;
    std::int32_t* to = pairs.data() + tile * groups * kTilePairs + lane;
    const std::int16_t* from = x.at(vector);
    for (std::ptrdiff_t pair = 0; pair < groups * kGroup / 2; ++pair, to += kTileVectors)
      std::memcpy(to, from + 2 * pair, sizeof *to);
    for (std::ptrdiff_t g = 0; g < groups; ++g)
      scales[static_cast<std::size_t>((tile * groups + g) * kTileVectors + lane)] = x.scale(vector)[g];
  }
};

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
    prefetch(codes + kAhead);
    store_pairs(panel, Format::template load<Integers>(codes));
  }
}

// f.operator()<0>() ... f.operator()<n - 1>(), written out one after the other: sums in arrays become registers.
template <int n, class F>
LAMP_INLINE void unrolled(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) LAMP_INLINE_LAMBDA {
    (f.template operator()<I>(), ...);
  }(std::make_integer_sequence<int, n>());
}

// sums[v][block][row] += panel * vector v of a tile, over the groups of the panel, which begins at rows[block]; `stride`
// from a vector's sums to the next's.
template <int Blocks, int Vectors>
LAMP_OWN_FUNCTION inline void panel_dot(const std::int16_t* const* rows, const std::uint16_t* const* scales,
                      std::ptrdiff_t groups, const std::int32_t* x, const float* x_scale, float* sums,
                      std::ptrdiff_t stride) {
  const std::int16_t *first = rows[0], *second = rows[Blocks - 1];
  for (std::ptrdiff_t g = 0; g < groups; ++g, x_scale += kTileVectors) {
    vsums integers[Vectors * Blocks];
    unrolled<Vectors * Blocks>([&]<int i>() LAMP_INLINE_LAMBDA { integers[i] = sums_zero(); });
    for (int pair = 0; pair < kGroup / 2; ++pair, first += kPairShorts, second += kPairShorts, x += kTileVectors) {
      vpairs columns[Blocks];
      columns[0] = load_pairs(first);
      if constexpr (Blocks == 2) columns[1] = load_pairs(second);
      unrolled<Vectors * Blocks>([&]<int i>() LAMP_INLINE_LAMBDA {
        integers[i] = multiply_add(columns[i % Blocks], x[i / Blocks], integers[i]);
        pin(integers[i]);
      });
    }
    unrolled<Vectors * Blocks>([&]<int i>() LAMP_INLINE_LAMBDA {
      constexpr int kVector = i / Blocks, kBlock = i % Blocks;
      const vrows scale = load_scales(scales[kBlock] + g * kRows), sum = to_rows(integers[i]);
      const vf own = set1(x_scale[kVector]);
      float* to = sums + kVector * stride + kBlock * kRows;
      for (int k = 0; k < kRowVectors; ++k, to += vf::width) store(to, fma(sum.v[k], scale.v[k] * own, load(to)));
    });
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
inline void panel_dots(const Panel& panel, int block, const Tiles& x, std::ptrdiff_t first, std::ptrdiff_t vectors,
                       float* sums, std::ptrdiff_t stride) {
  for (std::ptrdiff_t v = 0; v < vectors; v += kTileVectors)
    with_count<kTileVectors>(std::min<std::ptrdiff_t>(kTileVectors, vectors - v), [&]<int Vectors>() {
      const std::ptrdiff_t at = (first + v) / kTileVectors * x.groups + panel.group;
      panel_dot<Blocks, Vectors>(panel.rows + block, panel.scales + block, panel.groups, x.pairs.data() + at * kTilePairs,
                                 x.scales.data() + at * kTileVectors, sums + v * stride + block * kRows, stride);
    });
}

// sums[v][block of the strip][row] = rows of the strip * vector first + v; `first` begins a tile.
inline void strip_dots(const Strip& strip, const Tiles& x, std::ptrdiff_t first, std::ptrdiff_t vectors, float* sums) {
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
inline void tiled_products(const lamp::Blocks& matrix, std::ptrdiff_t rows, const Tiles& x, std::ptrdiff_t vectors,
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
