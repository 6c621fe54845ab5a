// A gated MLP in low precision: gate and up, look ahead through the activation and the down projection, the flagged
// neurons again in full precision, then the down projection, whose large terms are read in full precision.
//
// To first order an error da_j of the gate's sum and db_j of the up projection's move the output by
// (phi'(a_j) b_j da_j + phi(a_j) db_j) W e_j. Quantisation errors are taken as random: the residual of row j has the
// norm errors[j], so that da_j has the standard deviation errors[j] ||x|| / sqrt(columns). The weight of a neuron is the
// norm of what its two errors do to the output, relative to sqrt(sum_j (h_j ||W e_j||)^2), the output's norm if its
// terms were orthogonal.
#pragma once

#include "lowbit/linear.hpp"

namespace LAMP_ISA {

struct Slope {
  vf value, slope;
};

inline vf sigmoid(vf a) {
  const vf s = set1(1.0f) / (set1(1.0f) + exp(min(set1(88.0f), zero() - a)));
  return select(gt(set1(-88.0f), a), zero(), s);  // exp ends there: s would stay at 6e-39, however large |a|
}

inline Slope silu(vf a) {
  const vf s = sigmoid(a);
  return {a * s, s * fma(a, set1(1.0f) - s, set1(1.0f))};
}

inline Slope gelu_tanh(vf a) {
  constexpr float kRoot = 0.7978845608028654f, kCube = 0.044715f;  // sqrt(2 / pi)
  const vf square = a * a;
  // (1 + tanh u) / 2 is the sigmoid of 2 u, in which nothing cancels for negative u.
  const vf s = sigmoid(set1(2.0f * kRoot) * a * fma(set1(kCube), square, set1(1.0f)));
  const vf inner = set1(2.0f * kRoot) * fma(set1(3.0f * kCube), square, set1(1.0f));
  return {a * s, s * fma(a * (set1(1.0f) - s), inner, set1(1.0f))};
}

inline Slope activate(lamp::Activation kind, vf a) { return kind == lamp::Activation::silu ? silu(a) : gelu_tanh(a); }

inline float activate_one(lamp::Activation kind, float a) {
  alignas(64) float lane[vf::width];
  store(lane, activate(kind, set1(a)).value);
  return lane[0];
}

struct MlpWork {
  Shorts x, hidden;
  std::vector<float> h, weight, squares, partial;
};

// Low-bit pass over the blocks [first, last): hidden values, weights, and each vector's sum of (h_j ||W e_j||)^2.
inline void mlp_low(const lamp::LowBitMlp& p, MlpWork& w, const float* norms, std::ptrdiff_t first,
                    std::ptrdiff_t last, float* squares) {
  const std::ptrdiff_t padded = (p.neurons + kRows - 1) / kRows * kRows;
  alignas(64) float gate[4 * kRows], up[4 * kRows];
  for (std::ptrdiff_t b = first; b < last; ++b)
    for (std::ptrdiff_t v = 0; v < p.vectors; v += 4) {
      const std::ptrdiff_t some = std::min<std::ptrdiff_t>(4, p.vectors - v);
      block_dots(p.gate, b, w.x, v, some, gate);
      block_dots(p.up, b, w.x, v, some, up);
      for (std::ptrdiff_t i = 0; i < some; ++i) {
        const vf spread = set1(norms[v + i]);
        vf total = zero();
        for (int lane = 0; lane < kRows; lane += vf::width) {
          const std::ptrdiff_t j = b * kRows + lane;
          const vf up_value = load(up + i * kRows + lane), norm = load(p.down_norms + j);
          const Slope f = activate(p.activation, load(gate + i * kRows + lane));
          const vf h = f.value * up_value;
          const vf from_gate = f.slope * up_value * load(p.gate.errors + j), from_up = f.value * load(p.up.errors + j);
          const vf size = h * norm;
          total = fma(size, size, total);
          store(w.h.data() + (v + i) * padded + j, h);
          store(w.weight.data() + (v + i) * padded + j,
                norm * spread * sqrt(fma(from_gate, from_gate, from_up * from_up)));
        }
        squares[v + i] += sum(total);
      }
    }
}

// What a weight is compared with. Weights that are infinite or NaN exceed every limit, and all exceed a limit of NaN.
inline float limit(float threshold, float size) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  if (threshold < 0.0f) return -1.0f;
  return threshold > kLargest ? kLargest : std::min(threshold * size, kLargest);
}

// Neurons [first, last) of one vector: flagged ones again, and the large terms of the output in full precision, which
// leave zeros behind for the low-bit down projection.
inline void mlp_look_ahead(const lamp::LowBitMlp& p, const float* x, const float* weight, float size,
                           std::ptrdiff_t first, std::ptrdiff_t last, float* h, float* out, std::int64_t* selected) {
  const float up_limit = limit(p.up_threshold, size), down_limit = limit(p.down_threshold, size);
  for (std::ptrdiff_t j = first; j < last; ++j) {
    if (!(weight[j] <= up_limit)) {
      h[j] = activate_one(p.activation, full_dot(p.gate_full, j, x, p.columns)) * full_dot(p.up_full, j, x, p.columns);
      ++selected[0];
    }
    if (!(std::fabs(h[j]) * p.down_errors[j] <= down_limit)) {
      add_full(p.down_full, j, h[j], p.outputs, out);
      h[j] = 0.0f;
      ++selected[1];
    }
  }
}

inline void mlp(const lamp::LowBitMlp& p) {
  p.selected[0] = p.selected[1] = 0;
  if (p.vectors == 0) return;
  thread_local MlpWork own;
  MlpWork& w = own;
  const std::ptrdiff_t blocks = (p.neurons + kRows - 1) / kRows, padded = blocks * kRows;
  const std::ptrdiff_t together = std::max<std::ptrdiff_t>(1, (blocks + 7) / 8);
  const std::ptrdiff_t items = (blocks + together - 1) / together;  // whatever the threads: sums stay the same
  w.x.reserve(p.vectors, p.columns);
  w.h.resize(static_cast<std::size_t>(p.vectors * padded));
  w.weight.resize(w.h.size());
  w.squares.assign(static_cast<std::size_t>(items * p.vectors), 0.0f);
  w.partial.assign(static_cast<std::size_t>(items * p.vectors * p.outputs), 0.0f);
  std::vector<float> norms(static_cast<std::size_t>(p.vectors)), sizes(norms);
  for (std::ptrdiff_t v = 0; v < p.vectors; ++v) {
    w.x.set(v, p.x + v * p.columns, p.columns);
    norms[static_cast<std::size_t>(v)] = w.x.norm / std::sqrt(static_cast<float>(p.columns));
  }
  lamp::parallel(p.threads, items, [&](std::ptrdiff_t item) {
    mlp_low(p, w, norms.data(), item * together, std::min(blocks, (item + 1) * together),
            w.squares.data() + item * p.vectors);
  });
  for (std::ptrdiff_t v = 0; v < p.vectors; ++v) {
    float total = 0.0f;
    for (std::ptrdiff_t item = 0; item < items; ++item) total += w.squares[static_cast<std::size_t>(item * p.vectors + v)];
    // Where the sum overflows or a term isn't finite, nothing is known of any neuron.
    const bool known = total <= std::numeric_limits<float>::max();
    sizes[static_cast<std::size_t>(v)] = known ? std::sqrt(total) : std::numeric_limits<float>::quiet_NaN();
  }
  const auto blind = [](float threshold) { return threshold > std::numeric_limits<float>::max(); };
  if (!(blind(p.up_threshold) && blind(p.down_threshold))) {
    std::vector<std::int64_t> selected(static_cast<std::size_t>(2 * items), 0);
    lamp::parallel(p.threads, items, [&](std::ptrdiff_t item) {
      const std::ptrdiff_t first = item * together * kRows, last = std::min(p.neurons, first + together * kRows);
      for (std::ptrdiff_t v = 0; v < p.vectors; ++v)
        mlp_look_ahead(p, p.x + v * p.columns, w.weight.data() + v * padded, sizes[static_cast<std::size_t>(v)], first,
                       last, w.h.data() + v * padded, w.partial.data() + (item * p.vectors + v) * p.outputs,
                       selected.data() + 2 * item);
    });
    for (std::ptrdiff_t item = 0; item < items; ++item) {
      p.selected[0] += selected[static_cast<std::size_t>(2 * item)];
      p.selected[1] += selected[static_cast<std::size_t>(2 * item + 1)];
    }
  }
  w.hidden.reserve(p.vectors, p.neurons);
  for (std::ptrdiff_t v = 0; v < p.vectors; ++v) w.hidden.set(v, w.h.data() + v * padded, p.neurons);
  products_of(p.down, p.outputs, w.hidden, p.vectors, p.y, p.threads);
  if (p.selected[1])
    for (std::ptrdiff_t item = 0; item < items; ++item) {
      const float* part = w.partial.data() + item * p.vectors * p.outputs;
      for (std::ptrdiff_t k = 0; k < p.vectors * p.outputs; ++k) p.y[k] += part[k];
    }
}

}  // namespace LAMP_ISA
