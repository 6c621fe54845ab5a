// Attention of a few new queries over a look-ahead key-value store, pass by pass.
//
// Keys are cut into splits whose size depends on their number alone, a split's sums are formed by one thread, and
// splits are put together in their order: results don't depend on the number of threads.
#pragma once

#include "lowbit/values.hpp"

namespace LAMP_ISA {

// Low-bit bytes below which waking another thread costs more than it gains.
constexpr std::ptrdiff_t kAlone = 64 * 1024;

inline void prepare(const lamp::Attend& p, DecodeWork& work) {
  const lamp::KeyValues& store = p.store;
  const std::ptrdiff_t rows = store.batches * p.heads * p.queries;
  work.group = p.heads / store.heads;
  work.per_head = work.group * p.queries;
  work.origin = p.first / kRows * kRows;
  work.width = (p.last - work.origin + kRows - 1) / kRows * kRows;
  work.split = std::clamp<std::ptrdiff_t>((work.width / 16 + 63) / 64 * 64, 256, 2048);
  work.splits = std::max<std::ptrdiff_t>(1, (work.width + work.split - 1) / work.split);
  work.padded = store.values.groups * kGroup;
  const auto grow = [](auto& v, std::ptrdiff_t n) {
    if (v.size() < static_cast<std::size_t>(n)) v.resize(static_cast<std::size_t>(n));
  };
  grow(work.weights, rows * work.width);
  grow(work.partial, rows * work.splits * work.padded);
  if (p.softcap > 0.0f)
    grow(work.slopes, rows * work.width);
  else
    work.slopes.clear();
  grow(work.top, rows);
  grow(work.sum, rows);
  work.full_rows.assign(static_cast<std::size_t>(store.batches * store.heads * p.queries * work.splits), 0);
  work.found.assign(static_cast<std::size_t>(rows * work.splits), RowSplit());
  work.rows.resize(static_cast<std::size_t>(rows));
  work.rotated.resize(static_cast<std::size_t>(store.size));
  work.shorts.reserve(rows, store.size);
  const float root = std::sqrt(static_cast<float>(store.size));
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    const std::ptrdiff_t kv = r / work.per_head, query = r % work.per_head / work.group;
    QueryRow& row = work.rows[static_cast<std::size_t>(r)];
    row.batch = kv / store.heads;
    row.head = kv % store.heads * work.group + r % work.group;
    row.query = query;
    row.q = p.q + row.batch * p.q_batch + row.head * p.q_head + query * p.q_row;
    row.end = p.causal ? p.last - p.queries + query + 1 : p.last;
    const float* x = row.q;
    if (store.rotated) {
      std::copy_n(row.q, store.size, work.rotated.data());
      rotate(work.rotated.data(), store.size);
      x = work.rotated.data();
    }
    work.shorts.set(r, x, store.size);
    row.error_scale = std::fabs(p.scaling) * work.shorts.norms(r, x, store.size).norm / root;
    row.offset = store.mean ? full_dot(store.mean_of(kv), row.q, store.size) * p.scaling : 0.0f;
  }
}

// A row from the full copies alone: for the rare row in which recomputation raises a logit by too much.
inline void attend_in_full(const lamp::Attend& p, DecodeWork& work, std::ptrdiff_t r, float* out) {
  const QueryRow& row = work.rows[static_cast<std::size_t>(r)];
  const std::ptrdiff_t kv = r / work.per_head;
  const lamp::Full keys = p.store.full_keys_of(kv), values = p.store.full_values_of(kv);
  float top = p.sinks ? p.sinks[row.head] : -std::numeric_limits<float>::infinity();
  float* e = work.weight(r);
  for (std::ptrdiff_t j = 0; j < work.width; j += kRows)
    for (unsigned seen = visible_bits(p, row, work.origin + j); seen; seen &= seen - 1) {
      const std::ptrdiff_t at = j + std::countr_zero(seen);
      e[at] = logit(p, full_score(p, row, keys, work.origin + at));
      top = e[at] > top ? e[at] : top;
    }
  float total = p.sinks ? exp_one(p.sinks[row.head] - top) : 0.0f;
  std::fill_n(out, work.padded, 0.0f);
  for (std::ptrdiff_t j = 0; j < work.width; j += kRows)
    for (unsigned seen = visible_bits(p, row, work.origin + j); seen; seen &= seen - 1) {
      const std::ptrdiff_t at = j + std::countr_zero(seen);
      const float weight = exp_one(e[at] - top);
      total += weight;
      if (weight != 0.0f) add_full(values, work.origin + at, weight, p.store.value_size, out);
    }
  for (std::ptrdiff_t c = 0; c < p.store.value_size; ++c) out[c] /= total;
}

// A query that sees no key: the mean of all values, as a softmax of equal logits gives; a sink takes all the weight.
inline void attend_blind(const lamp::Attend& p, std::ptrdiff_t kv, float* out) {
  std::fill_n(out, p.store.values.groups * kGroup, 0.0f);
  if (p.sinks || p.first == p.last) return;
  const lamp::Full values = p.store.full_values_of(kv);
  const float weight = 1.0f / static_cast<float>(p.last - p.first);
  for (std::ptrdiff_t j = p.first; j < p.last; ++j) add_full(values, j, weight, p.store.value_size, out);
}

// Largest logit and sum of exponentials of every row, from its splits and its sink.
inline void join_scores(const lamp::Attend& p, DecodeWork& work) {
  for (std::size_t r = 0; r < work.rows.size(); ++r) {
    const float sink = p.sinks ? p.sinks[work.rows[r].head] : -std::numeric_limits<float>::infinity();
    float top = sink;
    for (std::ptrdiff_t s = 0; s < work.splits; ++s)
      top = std::max(top, work.at(static_cast<std::ptrdiff_t>(r), s).top);
    float sum = p.sinks ? exp_one(sink - top) : 0.0f;
    for (std::ptrdiff_t s = 0; s < work.splits; ++s) {
      const RowSplit& found = work.at(static_cast<std::ptrdiff_t>(r), s);
      // A split without visible logits adds nothing, one of NaN alone adds NaN.
      if (found.shift > -std::numeric_limits<float>::infinity())
        sum += found.sum * exp_one(found.shift - top);
      else
        sum += found.sum * 0.0f;
    }
    work.top[r] = top;
    work.sum[r] = sum != 0.0f ? sum : 1.0f;  // 0: nothing is visible
  }
}

inline void join_values(const lamp::Attend& p, DecodeWork& work) {
  const std::ptrdiff_t size = p.store.value_size;
  for (std::size_t i = 0; i < work.rows.size(); ++i) {
    const std::ptrdiff_t r = static_cast<std::ptrdiff_t>(i);
    const QueryRow& row = work.rows[i];
    float* sum = work.part(r, 0);
    const float top = work.top[i];
    float total = p.sinks ? exp_one(p.sinks[row.head] - top) : 0.0f;
    std::int32_t recomputed = 0;
    bool unsafe = false;
    for (std::ptrdiff_t s = 0; s < work.splits; ++s) {
      const RowSplit& found = work.at(r, s);
      total += found.total;
      recomputed += found.recomputed;
      unsafe |= found.unsafe;
      if (s)
        for (std::ptrdiff_t c = 0; c < size; ++c) sum[c] += work.part(r, s)[c];
    }
    const std::int32_t visible = p.visible[row.batch * p.queries + row.query];
    if (visible == 0) {
      attend_blind(p, r / work.per_head, sum);
    } else if (unsafe || total < lamp::kVanished * work.sum[i] ||
               (total != total && top == std::numeric_limits<float>::infinity())) {
      attend_in_full(p, work, r, sum);
      recomputed = visible;
    } else {
      const float inverse = 1.0f / total;
      for (std::ptrdiff_t c = 0; c < size; ++c) sum[c] *= inverse;
    }
    p.recomputed[(row.batch * p.heads + row.head) * p.queries + row.query] = recomputed;
    std::copy_n(sum, size, p.out + ((row.batch * p.queries + row.query) * p.heads + row.head) * size);
  }
}

inline void count_visible(const lamp::Attend& p, const DecodeWork& work) {
  for (std::ptrdiff_t b = 0; b < p.store.batches; ++b)
    for (std::ptrdiff_t i = 0; i < p.queries; ++i) {
      const QueryRow& row = work.rows[static_cast<std::size_t>(b * p.store.heads * work.per_head + i * work.group)];
      std::ptrdiff_t count = std::max<std::ptrdiff_t>(0, row.end - p.first);
      if (p.mask) {
        const std::uint8_t* mask = p.mask + b * p.mask_batch + i * p.mask_row;
        count = std::count_if(mask, mask + count, [](std::uint8_t m) { return m != 0; });
      }
      p.visible[b * p.queries + i] = static_cast<std::int32_t>(count);
    }
}

inline void attend(const lamp::Attend& p) {
  const lamp::KeyValues& store = p.store;
  if (store.batches * p.heads * p.queries == 0) return;
  thread_local DecodeWork own;
  DecodeWork& work = own;
  prepare(p, work);
  count_visible(p, work);
  const std::ptrdiff_t heads = store.batches * store.heads, items = heads * work.splits;
  const std::ptrdiff_t bytes = heads * (p.last - p.first) * (store.size + store.value_size);
  const int threads = bytes < kAlone ? 1 : p.threads;
  lamp::parallel(threads, items, [&](std::ptrdiff_t item) {
    score_split(p, work, item / work.splits, item % work.splits);
  });
  join_scores(p, work);
  lamp::parallel(threads, items, [&](std::ptrdiff_t item) {
    const std::ptrdiff_t kv = item / work.splits, s = item % work.splits;
    for (std::ptrdiff_t r = 0; r < work.per_head; ++r) recompute_split(p, work, kv, kv * work.per_head + r, s);
    for (std::ptrdiff_t i = 0; i < p.queries; ++i)
      work.full_rows[static_cast<std::size_t>((kv * p.queries + i) * work.splits + s)] = sum_values(p, work, kv, i, s);
  });
  join_values(p, work);
  for (std::ptrdiff_t i = 0; i < heads * p.queries; ++i) {
    const auto first = work.full_rows.begin() + i * work.splits;
    std::int32_t count = 0;
    for (auto at = first; at != first + work.splits; ++at) count += *at;
    p.full_rows[i] = count;
  }
}

}  // namespace LAMP_ISA
