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

inline void head(const lamp::LowBitHead& p) {
  p.selected[0] = p.selected[1] = 0;
  if (p.vectors == 0 || p.tokens == 0) return;
  lowbit_products({p.head, p.tokens, p.columns, p.vectors, p.x, p.logits, p.threads});
  thread_local HeadWork own;
  HeadWork& w = own;
  for (std::ptrdiff_t v = 0; v < p.vectors; ++v) {
    const float* x = p.x + v * p.columns;
    float* logits = p.logits + v * p.tokens;
    w.x.reserve(1, p.columns);
    w.x.set(0, x, p.columns);
    const ShortNorms norms = w.x.norms(0, x, p.columns);
    // Floors, so that norms among subnormal numbers, whose own rounding is large, are upper bounds too.
    const float norm = std::max(norms.norm * (1.0f + 1e-6f), kLeastNormal);
    const float longest = std::max(p.largest_norm, kLeastNormal), root = std::sqrt(static_cast<float>(p.columns));
    const float unit = 0x1p-24f * (static_cast<float>(p.columns) / 8 + 40.0f);
    const float tiny = static_cast<float>(w.x.groups) * 0x1p-118f;
    const float slack = longest * (norms.residual + norm * unit) + tiny;
    // Where a sum could overflow, and where x isn't finite, nothing is known of any token: all are recomputed.
    const bool safe = longest * norm <= 0x1p125f;
    const float best =
        safe ? best_lower_bound(p, logits, norm, w) - slack : -std::numeric_limits<float>::infinity();
    const bool look = p.threshold >= 0.0f && p.threshold <= std::numeric_limits<float>::max();
    const float total = look ? exponentials(logits, p.tokens, best, p.threads) : 1.0f;
    // The weight is at most 2 z r, beyond a nat 2 z e^(4 r) r: below `cut` none exceeds the threshold, and no
    // exponential is needed.
    const float largest_r = p.largest_error * norm / root;
    const float reach = look_ahead_reach(largest_r) + 1e-3f;
    const float cut = look ? best + std::log(total * p.threshold / (2.0f * largest_r)) - reach
                           : std::numeric_limits<float>::infinity();
    const std::ptrdiff_t chunks = (p.tokens + kTokens - 1) / kTokens;
    std::vector<std::int64_t> for_top(static_cast<std::size_t>(chunks), 0), in_all(for_top);
    lamp::parallel(p.threads, chunks, [&](std::ptrdiff_t c) {
      const std::ptrdiff_t last = std::min(p.tokens, (c + 1) * kTokens);
      const auto one = [&](std::ptrdiff_t i) {
        const float low = logits[i], error = p.head.errors[i] * norm;
        const bool could_win = !(low + (error + slack) < best);  // a NaN could
        bool chosen = could_win || p.threshold < 0.0f;
        if (!chosen && look && low > cut) {
          const float z = exp_one(low - best) / total;
          chosen = !(look_ahead(z, error / root) <= p.threshold);
        }
        if (!chosen) return;
        logits[i] = full_dot(p.full, i, x, p.columns);
        for_top[static_cast<std::size_t>(c)] += could_win;
        ++in_all[static_cast<std::size_t>(c)];
      };
      std::ptrdiff_t i = c * kTokens;
      for (; i + vf::width <= last; i += vf::width) {
        const vf low = load(logits + i);
        const vf upper = low + (load(p.head.errors + i) * set1(norm) + set1(slack));  // as `one` forms it
        constexpr unsigned kAll = (1u << vf::width) - 1;
        const unsigned beaten = bits(gt(set1(best), upper)) & ~bits(gt(low, set1(cut)));
        if (beaten == kAll && p.threshold >= 0.0f) continue;
        for (int lane = 0; lane < vf::width; ++lane) one(i + lane);
      }
      for (; i < last; ++i) one(i);
    });
    for (std::ptrdiff_t c = 0; c < chunks; ++c) {
      p.selected[0] += for_top[static_cast<std::size_t>(c)];
      p.selected[1] += in_all[static_cast<std::size_t>(c)];
    }
  }
}

}  // namespace LAMP_ISA
