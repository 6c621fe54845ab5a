// Second pass of decoding: look ahead through the softmax, recompute the scores that it would amplify, and sum values
// from the copy that each one's probability asks for.
#pragma once

#include <array>

#include "lowbit/look_ahead.hpp"
#include "lowbit/scores.hpp"

namespace LAMP_ISA {

using lamp::kSurprise;

inline void ask_for(const lamp::Full& full, std::ptrdiff_t row, std::ptrdiff_t columns) {
  ask_for(static_cast<const char*>(full.data) + row * full.row * full.bytes(), columns * full.bytes());
}

// Positions that wait for their memory.
struct Waiting {
  static constexpr int kMost = 48;
  std::ptrdiff_t at[kMost];
  int count = 0;
};

// e^(logit - shift) -> e^(logit - the row's largest), with what the rule selects recomputed on the way.
inline void recompute_split(const lamp::Attend& p, DecodeWork& work, std::ptrdiff_t kv, std::ptrdiff_t r,
                            std::ptrdiff_t s) {
  const QueryRow& row = work.rows[static_cast<std::size_t>(r)];
  RowSplit& found = work.at(r, s);
  const float top = work.top[static_cast<std::size_t>(r)];
  const bool some = found.shift > -std::numeric_limits<float>::infinity();
  const vf lift = set1(some ? first_lane(exp(set1(found.shift - top))) : 0.0f);
  const vf inverse = set1(1.0f / work.sum[static_cast<std::size_t>(r)]);
  const std::ptrdiff_t begin = s * work.split, end = std::min(work.width, begin + work.split);
  const float* errors = p.store.keys_of(kv).errors + work.origin;
  const float* slope = work.slope(r);
  const lamp::Full full = p.store.full_keys_of(kv);
  float* e = work.weight(r);
  const bool none = p.scores_threshold == std::numeric_limits<float>::infinity();
  if (!none) found.recomputed = 0;  // those of the first pass are selected again
  const vf bound = set1(p.scores_threshold), error_scale = set1(row.error_scale);
  Waiting waiting;
  found.total = 0.0f;
  const auto recompute = [&] {
    alignas(64) float difference[Waiting::kMost], term[Waiting::kMost];
    for (int i = 0; i < waiting.count; ++i) {
      difference[i] = logit(p, full_score(p, row, full, work.origin + waiting.at[i])) - top;
      found.unsafe |= difference[i] > kSurprise;
    }
    for (int i = waiting.count; i % vf::width; ++i) difference[i] = 0.0f;
    for (int i = 0; i < waiting.count; i += vf::width) store(term + i, exp(min(set1(kSurprise), load(difference + i))));
    for (int i = 0; i < waiting.count; ++i) found.total += e[waiting.at[i]] = term[i];
    found.recomputed += waiting.count;
    waiting.count = 0;
  };
  vrows total = rows_zero();  // of those that aren't recomputed
  for (std::ptrdiff_t j = begin; j < end; j += kRows) {
    unsigned chosen = 0;
    for (int k = 0; k < kRows; k += vf::width) {
      const vf lifted = load(e + j + k) * lift;
      store(e + j + k, lifted);
      if (none) continue;
      const vf w = look_ahead(lifted * inverse, load(errors + j + k) * error_scale, slope ? slope + j + k : nullptr);
      chosen |= (~bits(le(w, bound)) & ((1u << vf::width) - 1u)) << k;
    }
    if (chosen) chosen &= visible_bits(p, row, work.origin + j);
    // Before any of this block waits, since `total` takes the block below.
    if (waiting.count + std::popcount(chosen) > Waiting::kMost) recompute();
    for (; chosen; chosen &= chosen - 1) {
      const std::ptrdiff_t at = waiting.at[waiting.count++] = j + std::countr_zero(chosen);
      ask_for(full, work.origin + at, p.store.size);
      e[at] = 0.0f;
    }
    total = rows_add(total, rows_load(e + j));
  }
  recompute();
  found.total += sum_rows(total);
}

// Rows to be read in full that wait for their memory, with their weights, one array for each head.
struct FullRows : Waiting {
  std::vector<std::array<float, kMost>> weights;
};

// out[v] += sum over rows of weight * row, rows in full precision: a group of columns, all rows, then the next.
template <int Vectors>
inline void add_full_rows(const lamp::Full& full, const FullRows& rows, std::ptrdiff_t first, std::ptrdiff_t columns,
                          float* const* out) {
  constexpr int kParts = kGroup / vf::width;
  const std::array<float, FullRows::kMost>* weights = rows.weights.data() + first;
  const std::ptrdiff_t whole = columns / kGroup;
  for (std::ptrdiff_t g = 0; g < whole; ++g) {
    vf sum[Vectors][kParts];
    for (int v = 0; v < Vectors; ++v)
      for (int i = 0; i < kParts; ++i) sum[v][i] = load(out[v] + g * kGroup + i * vf::width);
    for (int r = 0; r < rows.count; ++r) {
      const std::ptrdiff_t row = rows.at[r], at = row * full.row + g * kGroup;
      vf part[kParts];
      for (int i = 0; i < kParts; ++i) {
        const std::ptrdiff_t k = at + i * vf::width;
        part[i] = full.type == lamp::FullType::float16 ? widen(static_cast<const std::uint16_t*>(full.data) + k)
                                                       : load(static_cast<const float*>(full.data) + k);
      }
      for (int v = 0; v < Vectors; ++v) {
        const vf w = set1(weights[v][static_cast<std::size_t>(r)]);
        for (int i = 0; i < kParts; ++i) sum[v][i] = fma(w, part[i], sum[v][i]);
      }
    }
    for (int v = 0; v < Vectors; ++v)
      for (int i = 0; i < kParts; ++i) store(out[v] + g * kGroup + i * vf::width, sum[v][i]);
  }
  if (whole * kGroup == columns) return;
  // The columns behind the last whole group, as rows of their own.
  lamp::Full rest = full;
  rest.data = static_cast<const char*>(full.data) + whole * kGroup * full.bytes();
  for (int r = 0; r < rows.count; ++r)
    for (int v = 0; v < Vectors; ++v)
      add_full(rest, rows.at[r], weights[v][static_cast<std::size_t>(r)], columns - whole * kGroup,
               out[v] + whole * kGroup);
}

inline void add_full_rows(const lamp::Full& full, const FullRows& rows, std::ptrdiff_t columns, float* const* out,
                          std::ptrdiff_t vectors) {
  std::ptrdiff_t v = 0;
  for (; v + 4 <= vectors; v += 4) add_full_rows<4>(full, rows, v, columns, out + v);
  if (vectors - v == 3) add_full_rows<3>(full, rows, v, columns, out + v);
  if (vectors - v == 2) add_full_rows<2>(full, rows, v, columns, out + v);
  if (vectors - v == 1) add_full_rows<1>(full, rows, v, columns, out + v);
}

// What sums the values of one split for one query of all heads of a group; a thread keeps its memory.
struct ValueSums {
  FullRows full;
  Window windows[2];
  std::vector<float> least, bound;  // limits of e^(logit - top), for each head
  std::vector<float*> out;
};

// Which of sixteen rows a head of the group needs at all, and which it needs in full, as bits.
struct Needed {
  unsigned any = 0, large = 0;
};
inline Needed needed(const DecodeWork& work, const ValueSums& sums, const float* weights) {
  constexpr unsigned kLanes = (1u << vf::width) - 1u;
  Needed found;
  for (int k = 0; k < kRows; k += vf::width) {
    vmask tiny = le(load(weights + k), set1(sums.least[0])), small = le(load(weights + k), set1(sums.bound[0]));
    for (std::ptrdiff_t g = 1; g < work.group; ++g) {
      const vf e = load(weights + g * work.width + k);
      tiny = mask_and(tiny, le(e, set1(sums.least[static_cast<std::size_t>(g)])));
      small = mask_and(small, le(e, set1(sums.bound[static_cast<std::size_t>(g)])));
    }
    found.any |= (~bits(tiny) & kLanes) << k;
    found.large |= (~bits(small) & kLanes) << k;
  }
  return found;
}

// Weights of at most `least` become 0, also where the value is read with its neighbour or for another head.
inline void leave_out_tiny(float* weights, std::ptrdiff_t rows, float least) {
  for (std::ptrdiff_t i = 0; i < rows; i += vf::width) {
    const vf w = load(weights + i);
    store(weights + i, select(le(w, set1(least)), zero(), w));
  }
}

// The values of one split, weighted, for one query of all heads of a group. A row is read once for all of them: in
// full if any head gives it more than the threshold, not at all if no head gives it more than kSkip / keys that the
// query sees; what is left out is together less than kSkip of a head's probability. Weights of rows read in full
// become 0.
inline std::int32_t sum_values(const lamp::Attend& p, DecodeWork& work, std::ptrdiff_t kv, std::ptrdiff_t query,
                               std::ptrdiff_t s) {
  const lamp::RowPairs rows = p.store.values_of(kv);
  const lamp::Full full = p.store.full_values_of(kv);
  const std::ptrdiff_t first_row = kv * work.per_head + query * work.group;
  const std::ptrdiff_t begin = s * work.split, end = std::min(work.width, begin + work.split);
  float* weights = work.weight(first_row);
  thread_local ValueSums own;
  ValueSums& sums = own;
  const std::size_t heads = static_cast<std::size_t>(work.group);
  sums.least.resize(heads);
  sums.bound.resize(heads);
  sums.out.resize(heads);
  sums.full.weights.resize(heads);
  const std::int32_t seen = p.visible[kv / p.store.heads * p.queries + query];
  Window *before = &sums.windows[0], *now = &sums.windows[1];
  sums.full.count = before->count = 0;
  for (std::ptrdiff_t g = 0; g < work.group; ++g) {
    const std::size_t i = static_cast<std::size_t>(g);
    const float sum = work.sum[static_cast<std::size_t>(first_row + g)], bound = p.values_threshold * sum;
    sums.least[i] = lamp::kSkip / static_cast<float>(seen) * sum;
    sums.bound[i] = bound > 0.0f && !p.nonfinite_values ? bound : 0.0f;
    sums.out[i] = work.part(first_row + g, s);
    std::fill_n(sums.out[i], work.padded, 0.0f);
  }
  std::int32_t full_count = 0;
  const auto add_full_ones = [&] {
    add_full_rows(full, sums.full, p.store.value_size, sums.out.data(), work.group);
    full_count += sums.full.count;
    sums.full.count = 0;
  };
  const auto add_window = [&](const Window& window, const Window& next) {
    float* own_weights = weights + window.first - work.origin;
    for (std::ptrdiff_t g = 0; g < work.group; ++g)
      leave_out_tiny(own_weights + g * work.width, window.rows, sums.least[static_cast<std::size_t>(g)]);
    add_pairs(rows, window, next, own_weights, work.width, sums.out.data(), work.group);
  };
  const int most = window_pairs(rows) - kRows / 2;
  for (std::ptrdiff_t j = begin; j < end;) {
    Window& window = *now;
    window.first = work.origin + j;
    window.rows = window.count = 0;
    for (; j < end && window.rows < kWindow && window.count <= most; j += kRows, window.rows += kRows) {
      const Needed need = needed(work, sums, weights + j);
      for (unsigned large = need.large; large; large &= large - 1) {
        if (sums.full.count == FullRows::kMost) add_full_ones();
        const std::ptrdiff_t at = j + std::countr_zero(large);
        for (std::size_t g = 0; g < heads; ++g) {
          float& weight = weights[static_cast<std::ptrdiff_t>(g) * work.width + at];
          sums.full.weights[g][static_cast<std::size_t>(sums.full.count)] = weight;
          weight = 0.0f;
        }
        sums.full.at[sums.full.count++] = work.origin + at;
        ask_for(full, work.origin + at, p.store.value_size);
      }
      // Without branches, which nothing could foresee: what isn't needed is written over.
      const unsigned low = need.any & ~need.large, pairs = low | low >> 1;
      for (int i = 0; i < kRows / 2; ++i) {
        window.pairs[window.count] = window.rows / 2 + i;
        window.count += static_cast<int>(pairs >> (2 * i) & 1u);
      }
    }
    if (before->count) add_window(*before, *now);
    std::swap(before, now);
  }
  if (before->count) add_window(*before, *before);
  add_full_ones();
  return full_count;
}

}  // namespace LAMP_ISA
