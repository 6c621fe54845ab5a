// What surrounds the attention of a decoder layer, in two calls instead of some fifty small ones.
#pragma once

#include "lowbit/mlp.hpp"

namespace LAMP_ISA {

inline void rms_norm(const lamp::RmsNorm& norm, const float* x, std::ptrdiff_t size, float* out) {
  vrows squares[2] = {rows_zero(), rows_zero()};
  std::ptrdiff_t i = 0;
  for (; i + 2 * kRows <= size; i += 2 * kRows)
    for (int j = 0; j < 2; ++j)
      for (int k = 0; k < kRowVectors; ++k) {
        const vf v = load(x + i + j * kRows + k * vf::width);
        squares[j].v[k] = fma(v, v, squares[j].v[k]);
      }
  float total = sum_rows(rows_add(squares[0], squares[1]));
  for (; i < size; ++i) total = std::fma(x[i], x[i], total);
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(size) + norm.eps);
  for (std::ptrdiff_t k = 0; k < size; ++k) out[k] = x[k] * factor * norm.weight[k];
}

inline void rms_norms(const lamp::RmsNorm& norm, const float* x, std::ptrdiff_t rows, std::ptrdiff_t size, float* out) {
  for (std::ptrdiff_t row = 0; row < rows; ++row) rms_norm(norm, x + row * size, size, out + row * size);
}

// Rotary positions, the first half of a head against the second: x cos + (-second, first) sin.
inline void rotate(const float* x, const float* cosines, const float* sines, std::ptrdiff_t size, float* out) {
  const std::ptrdiff_t half = size / 2;
  for (std::ptrdiff_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    out[i] = first * cosines[i] - second * sines[i];
    out[i + half] = second * cosines[i + half] + first * sines[i + half];
  }
}

inline void add(const float* x, std::ptrdiff_t count, float* out) {
  for (std::ptrdiff_t i = 0; i < count; ++i) out[i] += x[i];
}

struct LayerWork {
  std::vector<float> normed, projected;
};
inline LayerWork& layer_work() {
  thread_local LayerWork work;
  return work;
}

// f(token) for every token, in parallel where there are many.
template <class F>
inline void each_token(const lamp::LowBitLayer& p, F&& f) {
  constexpr std::ptrdiff_t kOfItem = 8;
  lamp::parallel(p.threads, (p.tokens + kOfItem - 1) / kOfItem, [&](std::ptrdiff_t item) {
    for (std::ptrdiff_t t = item * kOfItem; t < std::min(p.tokens, (item + 1) * kOfItem); ++t) f(t);
  });
}

inline void layer_begin(const lamp::LowBitLayer& p) {
  LayerWork& w = layer_work();
  const std::ptrdiff_t size = p.head_size, rows = (p.heads + 2 * p.kv_heads) * size;
  w.normed.resize(static_cast<std::size_t>(std::max(p.tokens * p.hidden, size)));
  w.projected.resize(static_cast<std::size_t>(p.tokens * rows));
  each_token(p, [&](std::ptrdiff_t t) {
    rms_norm(p.attention_norm, p.x + t * p.hidden, p.hidden, w.normed.data() + t * p.hidden);
  });
  lowbit_products({p.qkv, rows, p.hidden, p.tokens, w.normed.data(), w.projected.data(), p.threads});
  each_token(p, [&](std::ptrdiff_t t) {
    float* from = w.projected.data() + t * rows;
    if (p.qkv_bias) add(p.qkv_bias, rows, from);
    const float* cosines = p.cosines + t % p.angles * size;
    const float* sines = p.sines + t % p.angles * size;
    const auto heads = [&](std::ptrdiff_t count, const lamp::RmsNorm& norm, float* out) {
      for (std::ptrdiff_t h = 0; h < count; ++h, from += size) {
        if (norm.weight) rms_norm(norm, from, size, from);
        rotate(from, cosines, sines, size, out + (t * count + h) * size);
      }
    };
    heads(p.heads, p.query_norm, p.q);
    heads(p.kv_heads, p.key_norm, p.k);
    std::copy_n(from, p.kv_heads * size, p.v + t * p.kv_heads * size);
  });
}

inline void layer_end(const lamp::LowBitLayer& p) {
  LayerWork& w = layer_work();
  const auto numbers = static_cast<std::size_t>(p.tokens * p.hidden);
  w.normed.resize(numbers);
  w.projected.resize(numbers);
  float *normed = w.normed.data(), *projected = w.projected.data();
  lowbit_products({p.out, p.hidden, p.heads * p.head_size, p.tokens, p.attended, projected, p.threads});
  each_token(p, [&](std::ptrdiff_t t) {
    const float* x = p.x + t * p.hidden;
    float* own = projected + t * p.hidden;
    float* y = p.y + t * p.hidden;
    if (p.out_bias) add(p.out_bias, p.hidden, own);
    if (p.after_attention.weight) rms_norm(p.after_attention, own, p.hidden, own);
    for (std::ptrdiff_t i = 0; i < p.hidden; ++i) y[i] = x[i] + own[i];
    rms_norm(p.mlp_norm, y, p.hidden, normed + t * p.hidden);
  });
  lamp::LowBitMlp m = p.mlp;
  m.vectors = p.tokens;
  m.x = normed;
  m.y = projected;
  m.threads = p.threads;
  mlp(m);
  each_token(p, [&](std::ptrdiff_t t) {
    float* own = projected + t * p.hidden;
    if (p.after_mlp.weight) rms_norm(p.after_mlp, own, p.hidden, own);
    add(own, p.hidden, p.y + t * p.hidden);
  });
}

}  // namespace LAMP_ISA
