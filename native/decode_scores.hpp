// First pass of decoding: low-bit scores of every key, and what a softmax must know of them.
#pragma once

#include "decode_append.hpp"
#include "decode_spec.hpp"

namespace LAMP_ISA {

// One query of one head, in the order (batch, key head, query, head of the group).
struct QueryRow {
  const float* q = nullptr;        // in float32
  std::ptrdiff_t batch = 0, head = 0, query = 0;
  float offset = 0.0f;             // scaling * q . mean, which the low-bit score lacks
  float error_scale = 0.0f;        // r_j = error_scale * errors[j]
  std::ptrdiff_t end = 0;          // sees positions before this one
};

// What one row found in one split of the keys.
struct RowSplit {
  float top = -std::numeric_limits<float>::infinity();  // largest low-bit logit
  float sum = 0.0f;    // of e^(logit - top), before recomputation
  float total = 0.0f;  // of e^(logit - the row's largest), after it
  std::int32_t recomputed = 0;
  bool unsafe = false;  // a recomputed logit is far above what the low-bit ones promised
};

// Everything that the passes of a call share; the caller's thread keeps the memory between calls.
struct DecodeWork {
  Shorts shorts;
  std::vector<QueryRow> rows;
  std::vector<float> rotated;
  std::vector<float> weights;  // (rows, width): logits, then e^(logit - top), then e^(logit - the row's largest)
  std::vector<float> slopes;   // (rows, width): derivatives of the softcap, if there is one
  std::vector<RowSplit> found;  // (rows, splits)
  std::vector<float> partial;  // (rows, splits, padded value size)
  std::vector<float> top, sum;  // of the rows, sinks included
  std::vector<std::int32_t> full_rows;  // (batch, key head, query, splits)
  std::ptrdiff_t origin = 0, width = 0, split = 0, splits = 0, group = 0, per_head = 0, padded = 0;

  float* weight(std::ptrdiff_t row) { return weights.data() + row * width; }
  float* slope(std::ptrdiff_t row) { return slopes.empty() ? nullptr : slopes.data() + row * width; }
  RowSplit& at(std::ptrdiff_t row, std::ptrdiff_t s) { return found[static_cast<std::size_t>(row * splits + s)]; }
  float* part(std::ptrdiff_t row, std::ptrdiff_t s) { return partial.data() + (row * splits + s) * padded; }
};

// Which of the sixteen positions from `at` a row sees, as bits.
inline unsigned visible_bits(const lamp::Attend& p, const QueryRow& row, std::ptrdiff_t at) {
  unsigned bits = 0xffffu;
  if (at + kRows > row.end) bits &= row.end > at ? (1u << (row.end - at)) - 1u : 0u;
  if (at < p.first) bits &= p.first - at < kRows ? ~((1u << (p.first - at)) - 1u) : 0u;
  if (!p.mask || !bits) return bits;
  const std::uint8_t* mask = p.mask + row.batch * p.mask_batch + row.query * p.mask_row - p.first + at;
  unsigned seen = 0;
  for (unsigned left = bits; left; left &= left - 1) {
    const int lane = std::countr_zero(left);
    seen |= static_cast<unsigned>(mask[lane] != 0) << lane;
  }
  return seen;
}

// A score from the full-precision copies.
inline float full_score(const lamp::Attend& p, const QueryRow& row, const lamp::Full& keys, std::ptrdiff_t position) {
  return full_dot(keys, position, row.q, p.store.size) * p.scaling;
}
inline float first_lane(vf x) {
  alignas(64) float lane[vf::width];
  store(lane, x);
  return lane[0];
}
inline float logit(const lamp::Attend& p, float y) {
  return p.softcap > 0.0f ? first_lane(tanh(set1(y / p.softcap))) * p.softcap : y;
}

// Rows that are picked one by one wait for memory, each in turn, unless they are asked for well before they are used.
inline void ask_for(const void* start, std::ptrdiff_t bytes) {
  for (std::ptrdiff_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(start) + i);
}

// Logits of the keys of one split for every query of a key head, and their sums of exponentials. A score that is no
// number, since a group of the key or the query isn't finite, comes from the full copies at once.
inline void score_split(const lamp::Attend& p, DecodeWork& work, std::ptrdiff_t kv, std::ptrdiff_t s) {
  const lamp::Blocks keys = p.store.keys_of(kv);
  const lamp::Full full = p.store.full_keys_of(kv);
  const std::ptrdiff_t first_row = kv * work.per_head;
  const std::ptrdiff_t begin = s * work.split, end = std::min(work.width, begin + work.split);
  const vf scaling = set1(p.scaling), lowest = set1(-std::numeric_limits<float>::infinity());
  const vf huge = set1(std::numeric_limits<float>::max());
  alignas(64) float sums[4 * kRows];
  for (std::ptrdiff_t v = 0; v < work.per_head; v += 4) {
    const std::ptrdiff_t some = std::min<std::ptrdiff_t>(4, work.per_head - v);
    for (std::ptrdiff_t j = begin; j < end; j += kRows) {
      const std::ptrdiff_t at = work.origin + j;
      block_dots(keys, at / kRows, work.shorts, first_row + v, some, sums);
      for (std::ptrdiff_t i = 0; i < some; ++i) {
        const QueryRow& row = work.rows[static_cast<std::size_t>(first_row + v + i)];
        float* to = work.weight(first_row + v + i) + j;
        float* slope = work.slope(first_row + v + i);
        float* y = sums + i * kRows;
        const unsigned seen = visible_bits(p, row, at);
        unsigned finite = 0;
        for (int k = 0; k < kRows; k += vf::width) {
          const vf scaled = fma(load(y + k), scaling, set1(row.offset));
          store(y + k, scaled);
          finite |= bits(le(abs(scaled), huge)) << k;
        }
        for (unsigned odd = seen & ~finite; odd; odd &= odd - 1) {
          const int lane = std::countr_zero(odd);
          y[lane] = full_score(p, row, full, at + lane);
          ++work.at(first_row + v + i, s).recomputed;
        }
        if (p.softcap > 0.0f)
          for (int k = 0; k < kRows; k += vf::width) {
            const vf t = tanh(load(y + k) / set1(p.softcap));
            store(y + k, t * set1(p.softcap)), store(slope + j + k, set1(1.0f) - t * t);
          }
        if (seen != 0xffffu)
          for (int lane = 0; lane < kRows; ++lane)
            if (!(seen >> lane & 1u)) y[lane] = -std::numeric_limits<float>::infinity();
        for (int k = 0; k < kRows; k += vf::width) store(to + k, load(y + k));
      }
    }
  }
  for (std::ptrdiff_t r = first_row; r < first_row + work.per_head; ++r) {
    float* e = work.weight(r);
    vf top = lowest, total = zero();
    for (std::ptrdiff_t j = begin; j < end; j += vf::width) top = max(load(e + j), top);
    RowSplit& found = work.at(r, s);
    found.top = largest(top);
    const vf shift = set1(found.top > -std::numeric_limits<float>::infinity() ? found.top : 0.0f);
    for (std::ptrdiff_t j = begin; j < end; j += vf::width) {
      const vf term = exp(load(e + j) - shift);
      store(e + j, term);
      total = total + term;
    }
    found.sum = sum(total);
  }
}

}  // namespace LAMP_ISA
