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

inline float activate_one(lamp::Activation kind, float a) { return first_lane(activate(kind, set1(a)).value); }

struct MlpWork {
  Vectors x, hidden;
  std::vector<float> h, weight, squares, sizes, norms, partial;
  std::vector<std::int32_t> read;  // columns of down that are read in full, by item and vector
  std::vector<std::int64_t> selected;
};

// Low-bit pass over the blocks [first, last) for `some` vectors from v0 on: hidden values, weights, and each vector's
// sum of (h_j ||W e_j||)^2.
inline void mlp_low(const lamp::LowBitMlp& p, MlpWork& w, std::ptrdiff_t first, std::ptrdiff_t last, std::ptrdiff_t v0,
                    std::ptrdiff_t some, float* squares) {
  alignas(64) static thread_local float sums[kVectorsTogether * 2 * kRows];
  const std::ptrdiff_t padded = (p.neurons + kRows - 1) / kRows * kRows;
  const bool many = w.x.count >= kMany;
  const std::ptrdiff_t stride = many ? 2 * kRows : kRows, to_up = many ? kRows : some * kRows;
  for (std::ptrdiff_t b = first; b < last; ++b) {
    if (many) {
      strip_dots({{&p.gate, &p.up}, {b, b}, 2}, w.x.tiles, v0, some, sums);
    } else {
      block_dots(p.gate, b, w.x.shorts, v0, some, sums);
      block_dots(p.up, b, w.x.shorts, v0, some, sums + to_up);
    }
    for (std::ptrdiff_t i = 0; i < some; ++i) {
      const float *gate = sums + i * stride, *up = gate + to_up;
      const vf spread = set1(w.norms[static_cast<std::size_t>(v0 + i)]);
      vrows total = rows_zero();
      for (int lane = 0; lane < kRows; lane += vf::width) {
        vf& own = total.v[lane / vf::width];
        const std::ptrdiff_t j = b * kRows + lane;
        const vf up_value = load(up + lane), norm = load(p.down_norms + j);
        const Slope f = activate(p.activation, load(gate + lane));
        const vf h = f.value * up_value;
        const vf from_gate = f.slope * up_value * load(p.gate.errors + j), from_up = f.value * load(p.up.errors + j);
        const vf size = h * norm;
        own = fma(size, size, own);
        store(w.h.data() + (v0 + i) * padded + j, h);
        store(w.weight.data() + (v0 + i) * padded + j,
              norm * spread * sqrt(fma(from_gate, from_gate, from_up * from_up)));
      }
      squares[v0 + i] += sum_rows(total);
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
// leave zeros behind for the low-bit down projection. `out` is written where there are such terms.
inline void mlp_look_ahead(const lamp::LowBitMlp& p, const float* x, const float* weight, float size,
                           std::ptrdiff_t first, std::ptrdiff_t last, float* h, float* out, std::int64_t& recomputed,
                           std::int32_t& read) {
  const float up_limit = limit(p.up_threshold, size), down_limit = limit(p.down_threshold, size);
  for (std::ptrdiff_t j = first; j < last; ++j) {
    if (!(weight[j] <= up_limit)) {
      h[j] = activate_one(p.activation, full_dot(p.gate_full, j, x, p.columns)) * full_dot(p.up_full, j, x, p.columns);
      ++recomputed;
    }
    if (!(std::fabs(h[j]) * p.down_errors[j] <= down_limit)) {
      if (!read) std::fill_n(out, p.outputs, 0.0f);
      add_full(p.down_full, j, h[j], p.outputs, out);
      h[j] = 0.0f;
      ++read;
    }
  }
}

// Sums are formed in eight parts, whatever the threads and vectors, so that they stay the same.
struct MlpParts {
  std::ptrdiff_t blocks, together, items;

  explicit MlpParts(std::ptrdiff_t neurons)
      : blocks((neurons + kRows - 1) / kRows), together(std::max<std::ptrdiff_t>(1, (blocks + 7) / 8)),
        items((blocks + together - 1) / together) {}
};

// Each vector's norm of the output if its terms were orthogonal.
inline void mlp_sizes(const lamp::LowBitMlp& p, MlpWork& w, const MlpParts& parts) {
  w.sizes.resize(static_cast<std::size_t>(p.vectors));
  for (std::ptrdiff_t v = 0; v < p.vectors; ++v) {
    float total = 0.0f;
    for (std::ptrdiff_t item = 0; item < parts.items; ++item)
      total += w.squares[static_cast<std::size_t>(item * p.vectors + v)];
    // Where the sum overflows or a term isn't finite, nothing is known of any neuron.
    const bool known = total <= std::numeric_limits<float>::max();
    w.sizes[static_cast<std::size_t>(v)] = known ? std::sqrt(total) : std::numeric_limits<float>::quiet_NaN();
  }
}

// The MLP of vectors whose work is held at a time; adds to p.selected.
inline void mlp_pass(const lamp::LowBitMlp& p, MlpWork& w) {
  const MlpParts parts(p.neurons);
  const std::ptrdiff_t padded = parts.blocks * kRows;
  const std::ptrdiff_t chunks = (p.vectors + kVectorsTogether - 1) / kVectorsTogether;
  // f(part, first vector, vectors): in parallel, over all parts and vectors.
  const auto everywhere = [&](auto&& f) {
    lamp::parallel(p.threads, parts.items * chunks, [&](std::ptrdiff_t item) {
      const std::ptrdiff_t first = item / parts.items * kVectorsTogether;
      f(item % parts.items, first, std::min(kVectorsTogether, p.vectors - first));
    });
  };
  w.x.set(p.x, p.columns, p.vectors, p.columns, p.threads);
  w.h.resize(static_cast<std::size_t>(p.vectors * padded));
  w.weight.resize(w.h.size());
  w.squares.assign(static_cast<std::size_t>(parts.items * p.vectors), 0.0f);
  w.norms.resize(static_cast<std::size_t>(p.vectors));
  for (std::ptrdiff_t v = 0; v < p.vectors; ++v)
    w.norms[static_cast<std::size_t>(v)] =
        w.x.shorts.norms(v, p.x + v * p.columns, p.columns).norm / std::sqrt(static_cast<float>(p.columns));
  everywhere([&](std::ptrdiff_t part, std::ptrdiff_t first, std::ptrdiff_t some) {
    mlp_low(p, w, part * parts.together, std::min(parts.blocks, (part + 1) * parts.together), first, some,
            w.squares.data() + part * p.vectors);
  });
  const auto blind = [](float threshold) { return threshold > std::numeric_limits<float>::max(); };
  const bool looks = !(blind(p.up_threshold) && blind(p.down_threshold));
  if (looks) {
    mlp_sizes(p, w, parts);
    w.partial.resize(static_cast<std::size_t>(parts.items * p.vectors * p.outputs));
    w.read.assign(static_cast<std::size_t>(parts.items * p.vectors), 0);
    w.selected.assign(static_cast<std::size_t>(parts.items * p.vectors), 0);
    everywhere([&](std::ptrdiff_t part, std::ptrdiff_t from, std::ptrdiff_t some) {
      const std::ptrdiff_t first = part * parts.together * kRows;
      const std::ptrdiff_t last = std::min(p.neurons, first + parts.together * kRows);
      for (std::ptrdiff_t v = from; v < from + some; ++v) {
        const std::ptrdiff_t at = part * p.vectors + v;
        mlp_look_ahead(p, p.x + v * p.columns, w.weight.data() + v * padded, w.sizes[static_cast<std::size_t>(v)], first,
                       last, w.h.data() + v * padded, w.partial.data() + at * p.outputs,
                       w.selected[static_cast<std::size_t>(at)], w.read[static_cast<std::size_t>(at)]);
      }
    });
  }
  w.hidden.set(w.h.data(), padded, p.vectors, p.neurons, p.threads);
  products_of(p.down, p.outputs, w.hidden, p.y, p.threads);
  for (std::ptrdiff_t at = 0; looks && at < parts.items * p.vectors; ++at) {
    p.selected[0] += w.selected[static_cast<std::size_t>(at)];
    const std::int32_t read = w.read[static_cast<std::size_t>(at)];
    if (!read) continue;
    p.selected[1] += read;
    float* y = p.y + at % p.vectors * p.outputs;
    const float* part = w.partial.data() + at * p.outputs;
    for (std::ptrdiff_t k = 0; k < p.outputs; ++k) y[k] += part[k];
  }
}

inline void mlp(const lamp::LowBitMlp& p) {
  p.selected[0] = p.selected[1] = 0;
  thread_local MlpWork work;
  for (std::ptrdiff_t v = 0; v < p.vectors; v += kVectorsOfPass) {
    lamp::LowBitMlp pass = p;
    pass.vectors = std::min(kVectorsOfPass, p.vectors - v);
    pass.x = p.x + v * p.columns;
    pass.y = p.y + v * p.outputs;
    mlp_pass(pass, work);
  }
}

}  // namespace LAMP_ISA
