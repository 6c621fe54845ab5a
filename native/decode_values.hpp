// Second pass of decoding: look ahead through the softmax, recompute the scores that it would amplify, and sum values
// from the copy that each one's probability asks for.
#pragma once

#include "decode_scores.hpp"

namespace LAMP_ISA {

// Beyond this, e^(recomputed logit - largest low-bit logit) is not worth trusting: the row starts again in full.
constexpr float kSurprise = 8.0f;
// Likewise where recomputation leaves less than this of the sum that probabilities were made with.
constexpr float kVanished = 0.125f;

// 2 z (1 - z) s r, the l1 change of the probabilities that a score's error r makes, with s the slope of the softcap.
// That is linear in r, and says nothing once r exceeds a nat: there z counts as what it might be four standard errors
// higher, and 1 - z as 1.
inline vf look_ahead(vf z, vf r, const float* slope) {
  vf w = (set1(1.0f) - z) * z * set1(2.0f) * r;
  if (slope) w = w * load(slope);
  const vmask far = gt(r, set1(1.0f));
  if (!bits(far)) return w;
  const vf up = exp(min(r * set1(4.0f), set1(87.0f)));
  const vf high = min(set1(1.0f), max(z, set1(0x1p-126f)) * up);
  return select(far, high * set1(2.0f) * r, w);
}

// Rows that are picked one by one wait for memory, each in turn, unless they are asked for well before they are used.
inline void ask_for(const void* start, std::ptrdiff_t bytes) {
  for (std::ptrdiff_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(start) + i);
}
inline void ask_for(const lamp::Full& full, std::ptrdiff_t row, std::ptrdiff_t columns) {
  const std::ptrdiff_t bytes = full.half || full.scales ? 2 : 4, groups = (columns + kGroup - 1) / kGroup;
  ask_for(static_cast<const char*>(full.data) + row * full.row * bytes, columns * bytes);
  if (full.scales) __builtin_prefetch(full.scales + row * groups);
}
inline void ask_for(const lamp::Lines& lines, std::ptrdiff_t row) {
  const std::ptrdiff_t bytes = lines.groups * lamp::group_bytes(lines.bits);
  ask_for(lines.codes + row * bytes, bytes);
  __builtin_prefetch(lines.scales + row * lines.groups);
}

// Positions that wait for their memory.
struct Waiting {
  static constexpr int kMost = 48;
  std::ptrdiff_t at[kMost];
  int count = 0;
};

// e^(logit - top) -> e^(logit - the row's largest), with what the rule selects recomputed on the way.
inline void recompute_split(const lamp::Attend& p, DecodeWork& work, std::ptrdiff_t kv, std::ptrdiff_t r,
                            std::ptrdiff_t s) {
  const QueryRow& row = work.rows[static_cast<std::size_t>(r)];
  RowSplit& found = work.at(r, s);
  const float top = work.top[static_cast<std::size_t>(r)];
  const bool some = found.top > -std::numeric_limits<float>::infinity();
  const vf lift = set1(some ? first_lane(exp(set1(found.top - top))) : 0.0f);
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
  const auto recompute = [&] {
    alignas(64) float difference[Waiting::kMost], term[Waiting::kMost];
    for (int i = 0; i < waiting.count; ++i) {
      difference[i] = logit(p, full_score(p, row, full, work.origin + waiting.at[i])) - top;
      found.unsafe |= difference[i] > kSurprise;
    }
    for (int i = waiting.count; i % vf::width; ++i) difference[i] = 0.0f;
    for (int i = 0; i < waiting.count; i += vf::width) store(term + i, exp(min(set1(kSurprise), load(difference + i))));
    for (int i = 0; i < waiting.count; ++i) e[waiting.at[i]] = term[i];
    found.recomputed += waiting.count, waiting.count = 0;
  };
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
    for (; chosen; chosen &= chosen - 1) {
      if (waiting.count == Waiting::kMost) recompute();
      const std::ptrdiff_t at = waiting.at[waiting.count++] = j + std::countr_zero(chosen);
      ask_for(full, work.origin + at, p.store.size);
    }
  }
  recompute();
  vf total = zero();
  for (std::ptrdiff_t j = begin; j < end; j += vf::width) total = total + load(e + j);
  found.total = sum(total);
}

// The strips of low-bit rows of one query, four heads each, and its output.
struct ValueStrips {
  std::vector<Strip> strips;
  void flush(const lamp::Lines& lines, DecodeWork& work, std::ptrdiff_t first_row, std::ptrdiff_t s) {
    for (std::size_t c = 0; c < strips.size(); ++c) {
      const std::ptrdiff_t v = static_cast<std::ptrdiff_t>(4 * c), heads = std::min<std::ptrdiff_t>(4, work.group - v);
      float* out[4];
      for (std::ptrdiff_t i = 0; i < heads; ++i) out[i] = work.part(first_row + v + i, s);
      if (heads == 4) add_lines<4>(lines, strips[c], out);
      if (heads == 3) add_lines<3>(lines, strips[c], out);
      if (heads == 2) add_lines<2>(lines, strips[c], out);
      if (heads == 1) add_lines<1>(lines, strips[c], out);
      strips[c].count = 0;
    }
  }
};

// The values of one split, weighted, for one query of all heads of a group. A row is read once for all of them: in
// full if any head gives it more than the threshold, not at all if no head gives it more than skip / keys: what is left
// out is together less than `skip` of the row's probability.
inline std::int32_t sum_values(const lamp::Attend& p, DecodeWork& work, std::ptrdiff_t kv, std::ptrdiff_t query,
                               std::ptrdiff_t s) {
  const lamp::Lines lines = p.store.values_of(kv);
  const lamp::Full full = p.store.full_values_of(kv);
  const std::ptrdiff_t first_row = kv * work.per_head + query * work.group;
  const std::ptrdiff_t begin = s * work.split, end = std::min(work.width, begin + work.split);
  for (std::ptrdiff_t g = 0; g < work.group; ++g) std::fill_n(work.part(first_row + g, s), work.padded, 0.0f);
  thread_local ValueStrips own;
  own.strips.resize(static_cast<std::size_t>((work.group + 3) / 4));
  for (Strip& strip : own.strips) strip.count = 0;
  const vf bound = set1(p.strange ? -1.0f : p.values_threshold);
  const vf least = set1(p.strange ? 0.0f : p.skip / static_cast<float>(p.last - p.first));
  std::int32_t full_count = 0;
  int count = 0;
  Waiting waiting;
  const auto add_waiting = [&] {
    for (int i = 0; i < waiting.count; ++i)
      for (std::ptrdiff_t g = 0; g < work.group; ++g)
        add_full(full, work.origin + waiting.at[i], work.weight(first_row + g)[waiting.at[i]], p.store.value_size,
                 work.part(first_row + g, s));
    full_count += waiting.count, waiting.count = 0;
  };
  for (std::ptrdiff_t j = begin; j < end; j += kRows) {
    unsigned any = 0, large = 0;
    for (std::ptrdiff_t g = 0; g < work.group; ++g) {
      const float* e = work.weight(first_row + g) + j;
      const vf inverse = set1(1.0f / work.sum[static_cast<std::size_t>(first_row + g)]);
      constexpr unsigned kLanes = (1u << vf::width) - 1u;
      for (int k = 0; k < kRows; k += vf::width) {
        const vf raw = load(e + k), z = raw * inverse;
        any |= (~bits(le(z, least)) & kLanes) << k;
        large |= (~bits(le(z, bound)) & ~bits(le(raw, zero())) & kLanes) << k;
      }
    }
    for (unsigned left = any & ~large; left; left &= left - 1) {
      const int lane = std::countr_zero(left);
      ask_for(lines, work.origin + j + lane);
      for (std::size_t c = 0; c < own.strips.size(); ++c) {
        Strip& strip = own.strips[c];
        strip.rows[count] = work.origin + j + lane;
        for (std::ptrdiff_t i = 0; i < std::min<std::ptrdiff_t>(4, work.group - static_cast<std::ptrdiff_t>(4 * c)); ++i)
          strip.weights[i][count] = work.weight(first_row + static_cast<std::ptrdiff_t>(4 * c) + i)[j + lane];
        strip.count = count + 1;
      }
      if (++count == kStrip) own.flush(lines, work, first_row, s), count = 0;
    }
    for (; large; large &= large - 1) {
      if (waiting.count == Waiting::kMost) add_waiting();
      const std::ptrdiff_t at = waiting.at[waiting.count++] = j + std::countr_zero(large);
      ask_for(full, work.origin + at, p.store.value_size);
    }
  }
  add_waiting();
  if (count) own.flush(lines, work, first_row, s);
  return full_count;
}

}  // namespace LAMP_ISA
