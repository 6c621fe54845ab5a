// Attention under a threshold rule, tile by tile: low-precision scores, softmax, look ahead, recompute, softmax, values.
//
// One item of work is a tile of query rows of one key-value head (the rows of all query heads that share it), so memory
// grows with the number of keys, never with its square.
#pragma once

#include "simulation/residual.hpp"

namespace LAMP_ISA {

constexpr std::ptrdiff_t kAttentionRows = 32;

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
  const float* v = p.v.at(batch, kv);
  for (std::ptrdiff_t c = 0; c < p.Dv; ++c) {
    double total = 0.0;
    for (std::ptrdiff_t j = 0; j < p.Lk; ++j) total += v[j * p.v.row + c];
    out[c] = p.Lk && !p.sinks ? static_cast<float>(total / static_cast<double>(p.Lk)) : 0.0f;
  }
}

// The rows of one item of work, and the keys that any of them sees.
struct TileRows {
  Row rows[kAttentionRows];
  int count = 0;
  std::ptrdiff_t first = 0, last = 0;  // the first key that a row sees, and behind the last
  TileKeys keys = {};

  // Rows start ... of the rows (head of the group, query) of a key head.
  TileRows(const lamp::Attention& p, const std::vector<Range>& ranges, std::ptrdiff_t batch, std::ptrdiff_t kv,
           std::ptrdiff_t start) {
    const std::ptrdiff_t group = p.H / p.Hkv;
    count = static_cast<int>(std::min(kAttentionRows, group * p.Lq - start));
    first = p.Lk;
    for (int r = 0; r < count; ++r) {
      const std::ptrdiff_t head = kv * group + (start + r) / p.Lq, query = (start + r) % p.Lq;
      const std::ptrdiff_t index = p.row_index(batch, head, query);
      const Range& seen = ranges[static_cast<std::size_t>(batch * p.Lq + query)];
      rows[r] = {head, query, seen, p.q.at(batch, head, query), p.exact_q.at(batch, head, query),
                 p.shift ? p.shift[index] : 0.0f, p.row_error ? p.row_error[index] : 0.0f,
                 p.q_squares ? p.q_squares[index] : 0.0f};
      if (!seen.count) continue;
      first = std::min(first, seen.first);
      last = std::max(last, seen.last);
    }
    const std::ptrdiff_t origin = first >= last ? 0 : first / kColumns * kColumns;
    const std::ptrdiff_t width = first >= last ? 0 : (last - origin + kColumns - 1) / kColumns * kColumns;
    keys = {batch, kv, origin, width};
  }
};

// Raw sums of every row and key of a tile, block of keys by block, into y[row] and squares[row] (null: not wanted).
inline void low_scores(const lamp::Attention& p, const Micro& low, const Packed& packed, const TileRows& tile,
                       float* const* y, float* const* squares) {
  const float* a[kAttentionRows];
  float *block_y[kAttentionRows], *block_squares[kAttentionRows];
  for (int r = 0; r < tile.count; ++r) a[r] = tile.rows[r].q;
  const TileKeys& keys = tile.keys;
  for (std::ptrdiff_t j = 0; j < keys.width; j += kColumns) {
    int from = 0;  // rows whose keys end before this block need nothing of it
    while (from < tile.count && tile.rows[from].keys.last <= keys.origin + j) ++from;
    for (int r = from; r < tile.count; ++r) {
      block_y[r] = y[r] + j;
      block_squares[r] = squares ? squares[r] + j : nullptr;
    }
    for (int r = 0; r < from; ++r) {
      std::fill_n(y[r] + j, kColumns, 0.0f);
      if (squares) std::fill_n(squares[r] + j, kColumns, 0.0f);
    }
    low.run(p.accumulation,
            {a + from, 1, packed.block(keys.batch * p.Hkv + keys.kv, (keys.origin + j) / kColumns), p.D,
             block_y + from, squares ? block_squares + from : nullptr},
            tile.count - from);
  }
}

// Where the outputs of a tile's rows lie.
inline void outputs_of(const lamp::Attention& p, const TileRows& tile, float** out) {
  for (int r = 0; r < tile.count; ++r)
    out[r] = p.out + ((tile.keys.batch * p.Lq + tile.rows[r].query) * p.H + tile.rows[r].head) * p.Dv;
}

// Values weighted by the probabilities of each row.
inline void sum_values(const lamp::Attention& p, const TileRows& tile, const float* const* probability) {
  constexpr int kValueRows = 6;
  const TileKeys& keys = tile.keys;
  const float* v = p.v.at(keys.batch, keys.kv, keys.origin);
  // From the first key that any row sees: before it, how far a tile reaches depends on the vectors' width.
  const std::ptrdiff_t begin = std::max<std::ptrdiff_t>(0, tile.first - keys.origin);
  float* out[kAttentionRows];
  outputs_of(p, tile, out);
  for (int r = 0; r < tile.count;) {
    const int some = tile.count - r >= kValueRows ? kValueRows : 1;
    std::ptrdiff_t end = 0;
    for (int i = 0; i < some; ++i) end = std::max(end, std::min(tile.rows[r + i].keys.last, tile.last) - keys.origin);
    if (some == kValueRows)
      values_rows<kValueRows>(probability + r, v, p.v.row, begin, end, out + r, p.Dv);
    else
      values_rows<1>(probability + r, v, p.v.row, begin, end, out + r, p.Dv);
    r += some;
  }
  for (int r = 0; r < tile.count; ++r)
    if (!tile.rows[r].keys.count) blind(p, keys.batch, keys.kv, out[r]);
}

// Keys and values of a call in blocks: of the low pass, of recomputation, and, for the residual rules, L^T v.
struct Operands {
  const Packed &low, &exact, &mapped;
};

// The keys' own numbers of a tile, (B, Hkv, Lk), 0 behind the last key.
inline void take_keys(const lamp::Attention& p, const TileKeys& keys, const float* of_all, std::vector<float>& own) {
  if (!of_all) return;
  const std::ptrdiff_t there = std::min(keys.width, p.Lk - keys.origin);
  const float* first = of_all + (keys.batch * p.Hkv + keys.kv) * p.Lk + keys.origin;
  std::fill_n(std::copy_n(first, there, own.begin()), keys.width - there, 0.0f);
}

// Rows of raw sums to probabilities, each decided by itself; `squares` are null where they aren't needed.
inline void choose_rows(const lamp::Attention& p, const Operands& operands, const TileRows& rows, Tile& tile,
                        float* const* y, float* const* squares) {
  RowSoftmax softmax(p, operands.exact, rows.keys, tile);
  for (int r = 0; r < rows.count; ++r) {
    const Row& row = rows.rows[r];
    std::int32_t& selected = p.selected[p.row_index(rows.keys.batch, row.head, row.query)];
    selected = row.keys.count ? softmax.run(row, y[r], squares[r]) : 0;
    if (!row.keys.count) std::fill_n(y[r], rows.keys.width, 0.0f);
  }
}

// The same for the rules that must know the low pass' output, which is summed first.
inline void choose_rows_ahead(const lamp::Attention& p, const Operands& operands, const TileRows& rows, Tile& tile,
                              float* const* y, float* const* squares) {
  const std::ptrdiff_t width = rows.keys.width;
  thread_local ResidualTile own;
  own.reserve(p, rows.count, width);
  ResidualSoftmax softmax(p, operands.exact, operands.mapped, rows.keys, tile, own);
  float *z[kAttentionRows], *output[kAttentionRows];
  for (int r = 0; r < rows.count; ++r) {
    z[r] = own.low.data() + r * width;
    if (rows.rows[r].keys.count)
      softmax.low_pass(rows.rows[r], y[r], z[r]);
    else
      std::fill_n(z[r], width, 0.0f);
  }
  sum_values(p, rows, z);
  outputs_of(p, rows, output);
  for (int r = 0; r < rows.count; ++r) {
    const Row& row = rows.rows[r];
    std::int32_t& selected = p.selected[p.row_index(rows.keys.batch, row.head, row.query)];
    selected = row.keys.count ? softmax.run(row, y[r], z[r], squares[r], output[r]) : 0;
    if (!row.keys.count) std::fill_n(y[r], width, 0.0f);
  }
}

// One tile: scores, softmax and look-ahead row by row, values.
inline void attend_tile(const lamp::Attention& p, const Micro& low, const Operands& operands, const TileRows& rows) {
  const TileKeys& keys = rows.keys;
  const bool with_squares = p.needs_squares();
  thread_local Tile tile;
  tile.reserve(p, rows.count, keys.width);
  take_keys(p, keys, p.key_error, tile.key_errors);
  take_keys(p, keys, p.k_squares, tile.key_squares);
  float *y[kAttentionRows], *squares[kAttentionRows];
  for (int r = 0; r < rows.count; ++r) {
    y[r] = tile.scores.data() + r * keys.width;
    squares[r] = with_squares ? tile.squares.data() + r * keys.width : nullptr;
  }
  low_scores(p, low, operands.low, rows, y, with_squares ? squares : nullptr);
  (p.is_residual() ? choose_rows_ahead : choose_rows)(p, operands, rows, tile, y, squares);
  sum_values(p, rows, y);
}

// Rows of `heads` heads of every sample, in blocks of rows: K numbers each.
inline void pack_rows(const lamp::Attention& p, const lamp::HeadRows& rows, std::ptrdiff_t heads, std::ptrdiff_t K,
                      Packed& packed) {
  std::vector<std::ptrdiff_t> offsets;
  for (std::ptrdiff_t b = 0; b < p.B; ++b)
    for (std::ptrdiff_t h = 0; h < heads; ++h) offsets.push_back(b * rows.batch + h * rows.head);
  packed.pack(rows.data, p.B * heads, offsets.data(), 1, rows.row, K, p.Lk, p.threads);
}

void attention(const lamp::Attention& call) {
  lamp::Attention p = call;
  if (p.B == 0 || p.Lq == 0 || p.H == 0) return;
  const bool own_keys = p.exact_k.data != nullptr;
  if (!p.exact_q.data) p.exact_q = p.q;
  if (!own_keys) p.exact_k = p.k;
  const LentPacked<> lent;
  const LentPacked<Operand::exact> lent_exact;
  const LentPacked<Operand::mapped> lent_mapped;
  pack_rows(p, p.k, p.Hkv, p.D, *lent);
  if (own_keys) pack_rows(p, p.exact_k, p.Hkv, p.D, *lent_exact);
  if (p.is_residual()) pack_rows(p, p.residual.mapped, p.H, p.Dv, *lent_mapped);
  const Operands operands{*lent, own_keys ? *lent_exact : *lent, *lent_mapped};
  Magnitudes seen;
  for (std::ptrdiff_t b = 0; b < p.B; ++b)
    for (std::ptrdiff_t h = 0; h < p.H; ++h)
      for (std::ptrdiff_t i = 0; i < p.Lq; ++i) seen.add(p.q.at(b, h, i), p.D);
  const Micro low = pick_sums(p.accumulation, p.needs_squares(), seen, operands.low.all(), p.D);

  const auto ranges = visible_ranges(p);
  const std::ptrdiff_t tiles = (p.H / p.Hkv * p.Lq + kAttentionRows - 1) / kAttentionRows;
  const std::ptrdiff_t items = p.B * p.Hkv * tiles;
  lamp::parallel(p.threads, items, [&](std::ptrdiff_t index) {
    const std::ptrdiff_t item = items - 1 - index;  // the long rows of a causal triangle first
    const TileRows rows(p, ranges, item / tiles / p.Hkv, item / tiles % p.Hkv, item % tiles * kAttentionRows);
    attend_tile(p, low, operands, rows);
  });
}

}  // namespace LAMP_ISA
