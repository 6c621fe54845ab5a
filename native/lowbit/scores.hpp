// First pass of decoding: low-bit scores of every key, and what a softmax must know of them.
#pragma once

#include "lowbit/append.hpp"
#include "lowbit/store_spec.hpp"

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
  float top = -std::numeric_limits<float>::infinity();    // largest low-bit logit
  float shift = -std::numeric_limits<float>::infinity();  // at most kHeadroom below it
  float sum = 0.0f;    // of e^(logit - shift), before recomputation
  float total = 0.0f;  // of e^(logit - the row's largest), after it
  std::int32_t recomputed = 0;
  bool unsafe = false;  // a recomputed logit is far above what the low-bit ones promised
};

// Everything that the passes of a call share; the caller's thread keeps the memory between calls.
struct DecodeWork {
  Shorts shorts;
  std::vector<QueryRow> rows;
  std::vector<float> rotated;
  std::vector<float> weights;  // (rows, width): e^(logit - shift), then e^(logit - the row's largest)
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
inline float logit(const lamp::Attend& p, float y) {
  return p.softcap > 0.0f ? first_lane(tanh(set1(y / p.softcap))) * p.softcap : y;
}

// Rows that are picked one by one wait for memory, each in turn, unless they are asked for well before they are used.
inline void ask_for(const void* start, std::ptrdiff_t bytes) {
  for (std::ptrdiff_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(start) + i);
}

// Logits this far above the one that a split's exponentials refer to still have exponentials, and sums of them, within
// float32; beyond it the split refers to a larger one.
constexpr float kHeadroom = 16.0f;

// The softmax of a row over a split, as its logits come: each is read once, while the next keys are on their way.
struct Running {
  float* e = nullptr;  // of the row, from the beginning of its split
  float shift = -std::numeric_limits<float>::infinity();
  vf top = set1(shift);
  vrows sum = rows_zero();

  // The logits of positions [at, at + kRows).
  void add(const vrows& y, std::ptrdiff_t at) {
    vf most = set1(-std::numeric_limits<float>::infinity());  // first: max(NaN, x) is x
    for (int k = 0; k < kRowVectors; ++k) most = max(y.v[k], most);
    if (bits(gt(most, set1(shift + kHeadroom)))) refer_to(largest(most), at);
    top = max(most, top);
    const vf shifted = set1(shift > -std::numeric_limits<float>::infinity() ? shift : 0.0f);
    for (int k = 0; k < kRowVectors; ++k) {
      const vf term = exp(y.v[k] - shifted);
      store(e + at + k * vf::width, term);
      sum.v[k] = sum.v[k] + term;
    }
  }

 private:
  void refer_to(float larger, std::ptrdiff_t end) {
    const vf factor = exp(set1(shift - larger));
    for (std::ptrdiff_t j = 0; j < end; j += vf::width) store(e + j, load(e + j) * factor);
    for (vf& x : sum.v) x = x * factor;
    shift = larger;
  }
};

// Slow path: softcap, mask, and scores that aren't finite, which come from the full copies at once.
inline vrows finish(const lamp::Attend& p, DecodeWork& work, std::ptrdiff_t kv, std::ptrdiff_t r, std::ptrdiff_t s,
                    std::ptrdiff_t at, const vrows& plain, unsigned seen, unsigned finite) {
  const QueryRow& row = work.rows[static_cast<std::size_t>(r)];
  alignas(64) float y[kRows];
  rows_store(y, plain);
  for (unsigned odd = seen & ~finite; odd; odd &= odd - 1) {
    const int lane = std::countr_zero(odd);
    y[lane] = full_score(p, row, p.store.full_keys_of(kv), at + lane);
    ++work.at(r, s).recomputed;
  }
  if (p.softcap > 0.0f) {
    float* slope = work.slope(r) + (at - work.origin);
    for (int k = 0; k < kRows; k += vf::width) {
      const vf t = tanh(load(y + k) / set1(p.softcap));
      store(y + k, t * set1(p.softcap));
      store(slope + k, set1(1.0f) - t * t);
    }
  }
  for (int lane = 0; lane < kRows; ++lane)
    if (!(seen >> lane & 1u)) y[lane] = -std::numeric_limits<float>::infinity();
  return rows_load(y);
}

// Logits of the keys of one split for every query of a key head, and their exponentials.
inline void score_split(const lamp::Attend& p, DecodeWork& work, std::ptrdiff_t kv, std::ptrdiff_t s) {
  const lamp::Blocks keys = p.store.keys_of(kv);
  const std::ptrdiff_t first_row = kv * work.per_head;
  const std::ptrdiff_t begin = s * work.split, end = std::min(work.width, begin + work.split);
  const vf scaling = set1(p.scaling), huge = set1(std::numeric_limits<float>::max());
  alignas(64) float sums[4 * kRows];
  for (std::ptrdiff_t v = 0; v < work.per_head; v += 4) {
    const std::ptrdiff_t some = std::min<std::ptrdiff_t>(4, work.per_head - v);
    Running running[4];
    for (std::ptrdiff_t i = 0; i < some; ++i) running[i].e = work.weight(first_row + v + i) + begin;
    for (std::ptrdiff_t j = begin; j < end; j += kRows) {
      const std::ptrdiff_t at = work.origin + j;
      block_dots(keys, at / kRows, work.shorts, first_row + v, some, sums);
      for (std::ptrdiff_t i = 0; i < some; ++i) {
        const std::ptrdiff_t r = first_row + v + i;
        const QueryRow& row = work.rows[static_cast<std::size_t>(r)];
        const unsigned seen = visible_bits(p, row, at);
        unsigned finite = 0;
        vrows y = rows_load(sums + i * kRows);
        for (int k = 0; k < kRowVectors; ++k) {
          y.v[k] = fma(y.v[k], scaling, set1(row.offset));
          finite |= bits(le(abs(y.v[k]), huge)) << (k * vf::width);
        }
        if ((seen & finite) != 0xffffu || p.softcap > 0.0f) y = finish(p, work, kv, r, s, at, y, seen, finite);
        running[i].add(y, j - begin);
      }
    }
    for (std::ptrdiff_t i = 0; i < some; ++i) {
      RowSplit& found = work.at(first_row + v + i, s);
      found.top = largest(running[i].top);
      found.shift = running[i].shift;
      found.sum = sum_rows(running[i].sum);
    }
  }
}

}  // namespace LAMP_ISA
