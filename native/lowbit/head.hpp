// The LM head: low-bit logits, then full-precision ones where the argmax (or the top few) could lie and where the
// softmax would amplify an error. docs/decoding.md proves that the argmax is the full-precision one.
//
// With the residual d_i = w_i - (low-bit row i), |d_i|_2 <= errors[i], and x = (16-bit copy) + e:
//   |low_i - full_i| <= |d_i| |x| + |low row| |e| + rounding <= errors[i] |x| + N (|e| + |x| unit) + tiny,
// full_i being `full_dot`, N the largest norm of a row (of the copy, too), unit what the float32 sums of both passes and
// of the bounds themselves can lose, and tiny what they can lose to underflow.
#pragma once

#include "lowbit/linear.hpp"
#include "lowbit/look_ahead.hpp"
#include "lowbit/values.hpp"

namespace LAMP_ISA {

constexpr std::ptrdiff_t kTokens = 4096;  // an item of work
constexpr float kLeastNormal = std::numeric_limits<float>::min();

struct HeadWork {
  Shorts x;
  std::vector<float> lower;
};

// The `top`-th largest of low_i - errors_i |x|.
inline float best_lower_bound(const lamp::LowBitHead& p, const float* logits, float norm, HeadWork& w) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  if (p.top <= 1) {
    vf best = set1(kLowest);  // max() keeps its second operand where the first is NaN
    std::ptrdiff_t i = 0;
    for (; i + vf::width <= p.tokens; i += vf::width)
      best = max(fnma(load(p.head.errors + i), set1(norm), load(logits + i)), best);
    float r = largest(best);
    for (; i < p.tokens; ++i) r = std::max(r, std::fma(-p.head.errors[i], norm, logits[i]));
    return r;
  }
  w.lower.resize(static_cast<std::size_t>(p.tokens));
  for (std::ptrdiff_t i = 0; i < p.tokens; ++i) {
    const float x = std::fma(-p.head.errors[i], norm, logits[i]);
    w.lower[static_cast<std::size_t>(i)] = x == x ? x : kLowest;
  }
  const auto at = w.lower.begin() + std::min(p.top, p.tokens) - 1;
  std::nth_element(w.lower.begin(), at, w.lower.end(), [](float a, float b) { return a > b; });
  return *at;
}

// sum of exp(logit - shift), chunk by chunk in a fixed order.
inline float exponentials(const float* logits, std::ptrdiff_t tokens, float shift, int threads) {
  const std::ptrdiff_t chunks = (tokens + kTokens - 1) / kTokens;
  std::vector<float> sums(static_cast<std::size_t>(chunks), 0.0f);
  const auto bounded = [&](vf y) { return exp(min(set1(80.0f), y - set1(shift))); };
  lamp::parallel(threads, chunks, [&](std::ptrdiff_t c) {
    const std::ptrdiff_t last = std::min(tokens, (c + 1) * kTokens);
    vrows total = rows_zero();
    std::ptrdiff_t i = c * kTokens;
    for (; i + kSumLanes <= last; i += kSumLanes)
      for (int k = 0; k < kRowVectors; ++k)
        total.v[k] = total.v[k] + bounded(load(logits + i + k * vf::width));
    float rest = 0.0f;
    for (; i < last; ++i) rest += first_lane(bounded(set1(logits[i])));
    sums[static_cast<std::size_t>(c)] = sum_rows(total) + rest;
  });
  float total = 0.0f;
  for (const float s : sums) total += s;
  return total;
}

// What decides over the tokens of one vector.
struct HeadLimits {
  float norm, slack;   // of the vector, and of every token's bound beside errors[i] |x|
  float best;          // the `top`-th largest lower bound of a logit; -infinity where nothing is known of any token
  float root;          // of the columns
  float total = 1.0f;  // sum of exp(logit - best)
  float cut = std::numeric_limits<float>::infinity();  // no token at or below it weighs more than the threshold
  bool look;           // whether any token's weight is asked for
};

inline HeadLimits head_limits(const lamp::LowBitHead& p, const float* x, const float* logits, HeadWork& w, int threads) {
  w.x.reserve(1, p.columns);
  w.x.set(0, x, p.columns);
  const ShortNorms norms = w.x.norms(0, x, p.columns);
  HeadLimits h;
  // Floors, so that norms among subnormal numbers, whose own rounding is large, are upper bounds too.
  h.norm = std::max(norms.norm * (1.0f + 1e-6f), kLeastNormal);
  h.root = std::sqrt(static_cast<float>(p.columns));
  const float longest = std::max(p.largest_norm, kLeastNormal);
  const float unit = 0x1p-24f * (static_cast<float>(p.columns) / 8 + 40.0f);
  const float tiny = static_cast<float>(w.x.groups) * 0x1p-118f;
  h.slack = longest * (norms.residual + h.norm * unit) + tiny;
  // Where a sum could overflow, and where x isn't finite, nothing is known of any token: all are recomputed.
  const bool safe = longest * h.norm <= 0x1p125f;
  h.best = safe ? best_lower_bound(p, logits, h.norm, w) - h.slack : -std::numeric_limits<float>::infinity();
  h.look = p.threshold >= 0.0f && p.threshold <= std::numeric_limits<float>::max();
  if (!h.look) return h;
  h.total = exponentials(logits, p.tokens, h.best, threads);
  // The weight is at most 2 z r, beyond a nat 2 z e^(4 r) r: below `cut` none exceeds the threshold, and no exponential
  // is needed.
  const float largest_r = p.largest_error * h.norm / h.root;
  const float reach = look_ahead_reach(largest_r) + 1e-3f;
  h.cut = h.best + std::log(h.total * p.threshold / (2.0f * largest_r)) - reach;
  return h;
}

// Tokens that are recomputed: for the top, and in all.
struct HeadCounts {
  std::int64_t for_top = 0, in_all = 0;
};

// Recomputes what must be of the tokens [first, last).
inline HeadCounts head_tokens(const lamp::LowBitHead& p, const HeadLimits& h, const float* x, float* logits,
                              std::ptrdiff_t first, std::ptrdiff_t last) {
  thread_local std::vector<std::ptrdiff_t> chosen;
  chosen.clear();
  HeadCounts counts;
  const auto one = [&](std::ptrdiff_t i) {
    const float low = logits[i], error = p.head.errors[i] * h.norm;
    const bool could_win = !(low + (error + h.slack) < h.best);  // a NaN could
    bool recomputed = could_win || p.threshold < 0.0f;
    if (!recomputed && h.look && low > h.cut) {
      const float z = exp_one(low - h.best) / h.total;
      recomputed = !(look_ahead(z, error / h.root) <= p.threshold);
    }
    counts.for_top += could_win;
    if (recomputed) chosen.push_back(i);
  };
  std::ptrdiff_t i = first;
  for (; i + vf::width <= last; i += vf::width) {
    const vf low = load(logits + i);
    const vf upper = low + (load(p.head.errors + i) * set1(h.norm) + set1(h.slack));  // as `one` forms it
    constexpr unsigned kAll = (1u << vf::width) - 1;
    const unsigned beaten = bits(gt(set1(h.best), upper)) & ~bits(gt(low, set1(h.cut)));
    if (beaten == kAll && p.threshold >= 0.0f) continue;
    for (int lane = 0; lane < vf::width; ++lane) one(i + lane);
  }
  for (; i < last; ++i) one(i);
  // Their rows lie anywhere: each is asked for while those before it are summed.
  constexpr std::size_t kEarly = 4;
  for (std::size_t c = 0; c < std::min(kEarly, chosen.size()); ++c) ask_for(p.full, chosen[c], p.columns);
  for (std::size_t c = 0; c < chosen.size(); ++c) {
    if (c + kEarly < chosen.size()) ask_for(p.full, chosen[c + kEarly], p.columns);
    logits[chosen[c]] = full_dot(p.full, chosen[c], x, p.columns);
  }
  counts.in_all = static_cast<std::int64_t>(chosen.size());
  return counts;
}

// One vector's logits, by so many threads.
inline HeadCounts head_vector(const lamp::LowBitHead& p, std::ptrdiff_t v, int threads) {
  thread_local HeadWork work;
  const float* x = p.x + v * p.columns;
  float* logits = p.logits + v * p.tokens;
  const HeadLimits limits = head_limits(p, x, logits, work, threads);
  const std::ptrdiff_t chunks = (p.tokens + kTokens - 1) / kTokens;
  std::vector<HeadCounts> counts(static_cast<std::size_t>(chunks));
  lamp::parallel(threads, chunks, [&](std::ptrdiff_t c) {
    const std::ptrdiff_t last = std::min(p.tokens, (c + 1) * kTokens);
    counts[static_cast<std::size_t>(c)] = head_tokens(p, limits, x, logits, c * kTokens, last);
  });
  HeadCounts all;
  for (const HeadCounts& one : counts) all.for_top += one.for_top, all.in_all += one.in_all;
  return all;
}

inline void head(const lamp::LowBitHead& p) {
  p.selected[0] = p.selected[1] = 0;
  if (p.vectors == 0 || p.tokens == 0) return;
  lowbit_products({p.head, p.tokens, p.columns, p.vectors, p.x, p.logits, p.threads});
  // Few vectors share the threads, many have one each: a vector's logits then stay in its thread's cache, and no thread
  // waits for another twice a vector. Every sum has the same order either way.
  const bool many = p.vectors >= std::max<std::ptrdiff_t>(kMany, 2 * p.threads);
  std::vector<HeadCounts> counts(static_cast<std::size_t>(p.vectors));
  lamp::parallel(many ? p.threads : 1, p.vectors, [&](std::ptrdiff_t v) {
    counts[static_cast<std::size_t>(v)] = head_vector(p, v, many ? 1 : p.threads);
  });
  for (const HeadCounts& one : counts) p.selected[0] += one.for_top, p.selected[1] += one.in_all;
}

}  // namespace LAMP_ISA
