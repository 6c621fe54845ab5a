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

inline void layer_begin(const lamp::LowBitLayer& p) {
  LayerWork& w = layer_work();
  const std::ptrdiff_t size = p.head_size, rows = (p.heads + 2 * p.kv_heads) * size;
  w.normed.resize(static_cast<std::size_t>(std::max(p.batch * p.hidden, size)));
  w.projected.resize(static_cast<std::size_t>(p.batch * rows));
  for (std::ptrdiff_t b = 0; b < p.batch; ++b)
    rms_norm(p.attention_norm, p.x + b * p.hidden, p.hidden, w.normed.data() + b * p.hidden);
  lowbit_products({p.qkv, rows, p.hidden, p.batch, w.normed.data(), w.projected.data(), p.threads});
  for (std::ptrdiff_t b = 0; b < p.batch; ++b) {
    float* from = w.projected.data() + b * rows;
    if (p.qkv_bias) add(p.qkv_bias, rows, from);
    const float* cosines = p.cosines + b * p.angle_stride;
    const float* sines = p.sines + b * p.angle_stride;
    const auto heads = [&](std::ptrdiff_t count, const lamp::RmsNorm& norm, float* out) {
      for (std::ptrdiff_t h = 0; h < count; ++h, from += size) {
        if (norm.weight) rms_norm(norm, from, size, from);
        rotate(from, cosines, sines, size, out + (b * count + h) * size);
      }
    };
    heads(p.heads, p.query_norm, p.q);
    heads(p.kv_heads, p.key_norm, p.k);
    std::copy_n(from, p.kv_heads * size, p.v + b * p.kv_heads * size);
  }
}

inline void layer_end(const lamp::LowBitLayer& p) {
  LayerWork& w = layer_work();
  const auto numbers = static_cast<std::size_t>(p.batch * p.hidden);
  w.normed.resize(numbers);
  w.projected.resize(numbers);
  float *normed = w.normed.data(), *projected = w.projected.data();
  lowbit_products({p.out, p.hidden, p.heads * p.head_size, p.batch, p.attended, projected, p.threads});
  for (std::ptrdiff_t b = 0; b < p.batch; ++b) {
    const float* x = p.x + b * p.hidden;
    float* own = projected + b * p.hidden;
    float* y = p.y + b * p.hidden;
    if (p.out_bias) add(p.out_bias, p.hidden, own);
    if (p.after_attention.weight) rms_norm(p.after_attention, own, p.hidden, own);
    for (std::ptrdiff_t i = 0; i < p.hidden; ++i) y[i] = x[i] + own[i];
    rms_norm(p.mlp_norm, y, p.hidden, normed + b * p.hidden);
  }
  lamp::LowBitMlp m = p.mlp;
  m.vectors = p.batch;
  m.x = normed;
  m.y = projected;
  m.threads = p.threads;
  mlp(m);
  for (std::ptrdiff_t b = 0; b < p.batch; ++b) {
    float* own = projected + b * p.hidden;
    if (p.after_mlp.weight) rms_norm(p.after_mlp, own, p.hidden, own);
    add(own, p.hidden, p.y + b * p.hidden);
  }
}

}  // namespace LAMP_ISA
