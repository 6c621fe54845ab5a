// Attention under a threshold rule, tile by tile: low-precision scores, softmax, look ahead, recompute, softmax, values.
//
// One item of work is a tile of query rows of one key-value head (the rows of all query heads that share it), so memory
// grows with the number of keys, never with its square.
#pragma once

#include "simulation/row_softmax.hpp"

namespace LAMP_ISA {

constexpr std::ptrdiff_t kAttentionRows = 32;

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

inline std::vector<Range> visible_ranges(const lamp::Attention& p) {
  std::vector<Range> ranges(static_cast<std::size_t>(p.B * p.Lq));
  constexpr std::ptrdiff_t kTogether = 64;
  const std::ptrdiff_t rows = p.B * p.Lq;
  lamp::parallel(p.mask ? p.threads : 1, (rows + kTogether - 1) / kTogether, [&](std::ptrdiff_t item) {
    for (std::ptrdiff_t row = item * kTogether; row < std::min(rows, (item + 1) * kTogether); ++row) {
      const std::ptrdiff_t b = row / p.Lq, i = row % p.Lq;
      Range r{0, p.causal ? std::min(i + 1, p.Lk) : p.Lk, 0};
      r.count = r.last;
      if (p.mask) {
        const std::uint8_t* mask = p.mask + b * p.mask_batch + i * p.mask_row;
        while (r.last > 0 && !mask[r.last - 1]) --r.last;
        while (r.first < r.last && !mask[r.first]) ++r.first;
        r.count = 0;
        for (std::ptrdiff_t j = r.first; j < r.last; ++j) r.count += mask[j] != 0;
      }
      ranges[static_cast<std::size_t>(row)] = r;
      p.visible[2 * row] = static_cast<std::int32_t>(r.count);
      p.visible[2 * row + 1] = static_cast<std::int32_t>(r.count ? r.last - 1 : -1);
    }
  });
  return ranges;
}

// A query that sees no key: the mean of all values, as a softmax of equal logits gives; a sink takes all the weight.
inline void blind(const lamp::Attention& p, std::ptrdiff_t batch, std::ptrdiff_t kv, float* out) {
  const float* v = p.v + batch * p.v_batch + kv * p.v_head;
  for (std::ptrdiff_t c = 0; c < p.Dv; ++c) {
    double total = 0.0;
    for (std::ptrdiff_t j = 0; j < p.Lk; ++j) total += v[j * p.v_row + c];
    out[c] = p.Lk && !p.sinks ? static_cast<float>(total / static_cast<double>(p.Lk)) : 0.0f;
  }
}

void attention(const lamp::Attention& p) {
  if (p.B == 0 || p.Lq == 0 || p.H == 0) return;
  Packed& packed = workspace_packed();
  std::vector<std::ptrdiff_t> offsets;
  for (std::ptrdiff_t b = 0; b < p.B; ++b)
    for (std::ptrdiff_t h = 0; h < p.Hkv; ++h) offsets.push_back(b * p.k_batch + h * p.k_head);
  packed.pack(p.k, p.B * p.Hkv, offsets.data(), 1, p.k_row, p.D, p.Lk, p.threads);
  Magnitudes seen;
  for (std::ptrdiff_t b = 0; b < p.B; ++b)
    for (std::ptrdiff_t h = 0; h < p.H; ++h)
      for (std::ptrdiff_t i = 0; i < p.Lq; ++i) seen.add(p.q + b * p.q_batch + h * p.q_head + i * p.q_row, p.D);
  const bool running = p.weight == lamp::RuleWeight::running;
  const Micro low = pick_micro(p.accumulation, running, wide_is_exact(seen, packed.all(), p.D));

  const auto ranges = visible_ranges(p);
  const std::ptrdiff_t group = p.H / p.Hkv, rows_per_kv = group * p.Lq;
  const std::ptrdiff_t tiles = (rows_per_kv + kAttentionRows - 1) / kAttentionRows;
  const std::ptrdiff_t items = p.B * p.Hkv * tiles;
  lamp::parallel(p.threads, items, [&](std::ptrdiff_t index) {
    const std::ptrdiff_t item = items - 1 - index;  // the long rows of a causal triangle first
    const std::ptrdiff_t b = item / tiles / p.Hkv, kv = item / tiles % p.Hkv, start = item % tiles * kAttentionRows;
    const int count = static_cast<int>(std::min(kAttentionRows, rows_per_kv - start));
    Row rows[kAttentionRows];
    std::ptrdiff_t first = p.Lk, last = 0;
    for (int r = 0; r < count; ++r) {
      const std::ptrdiff_t head = kv * group + (start + r) / p.Lq, query = (start + r) % p.Lq;
      const Range& keys = ranges[static_cast<std::size_t>(b * p.Lq + query)];
      rows[r] = {head, query, keys, p.q + b * p.q_batch + head * p.q_head + query * p.q_row};
      if (keys.count) first = std::min(first, keys.first), last = std::max(last, keys.last);
    }
    const std::ptrdiff_t origin = first >= last ? 0 : first / kColumns * kColumns;
    const std::ptrdiff_t width = first >= last ? 0 : (last - origin + kColumns - 1) / kColumns * kColumns;
    thread_local Tile tile;
    tile.reserve(count, width, running);

    const float* a[kAttentionRows];
    float *y[kAttentionRows], *squares[kAttentionRows], *block_y[kAttentionRows], *block_squares[kAttentionRows];
    for (int r = 0; r < count; ++r) {
      a[r] = rows[r].q;
      y[r] = tile.scores.data() + r * width;
      squares[r] = running ? tile.squares.data() + r * width : nullptr;
    }
    for (std::ptrdiff_t j = 0; j < width; j += kColumns) {
      int from = 0;  // rows whose keys end before this block need nothing of it
      while (from < count && rows[from].keys.last <= origin + j) ++from;
      for (int r = from; r < count; ++r) block_y[r] = y[r] + j, block_squares[r] = running ? squares[r] + j : nullptr;
      for (int r = 0; r < from; ++r) {
        std::fill_n(y[r] + j, kColumns, 0.0f);
        if (running) std::fill_n(squares[r] + j, kColumns, 0.0f);
      }
      low.run(p.accumulation,
              {a + from, 1, packed.block(b * p.Hkv + kv, (origin + j) / kColumns), p.D, block_y + from,
               running ? block_squares + from : nullptr},
              count - from);
    }

    RowSoftmax softmax(p, packed, tile);
    for (int r = 0; r < count; ++r) {
      std::int32_t& selected = p.selected[(b * p.H + rows[r].head) * p.Lq + rows[r].query];
      selected = 0;
      if (rows[r].keys.count)
        selected = softmax.run(rows[r], b, kv, y[r], squares[r], origin, width);
      else
        std::fill_n(y[r], width, 0.0f);
    }

    const float* v = p.v + b * p.v_batch + kv * p.v_head + origin * p.v_row;
    const float* probability[kAttentionRows];
    float* out[kAttentionRows];
    for (int r = 0; r < count; ++r) {
      probability[r] = y[r];
      out[r] = p.out + ((b * p.Lq + rows[r].query) * p.H + rows[r].head) * p.Dv;
    }
    constexpr int kValueRows = 6;
    int r = 0;
    for (; r < count;) {
      const int some = count - r >= kValueRows ? kValueRows : 1;
      std::ptrdiff_t end = 0;
      for (int i = 0; i < some; ++i) end = std::max(end, std::min(rows[r + i].keys.last, last) - origin);
      if (some == kValueRows)
        values_rows<kValueRows>(probability + r, v, p.v_row, 0, end, out + r, p.Dv);
      else
        values_rows<1>(probability + r, v, p.v_row, 0, end, out + r, p.Dv);
      r += some;
    }
    for (int i = 0; i < count; ++i)
      if (!rows[i].keys.count) blind(p, b, kv, out[i]);
  });
}

}  // namespace LAMP_ISA
