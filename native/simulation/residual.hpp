// The rules that look as far as the residual stream: running-residual and bridge-residual (docs/method.md 4.9).
//
// An entry's weight is m_j min(||L^T (v_j - o)||, bound_j) / scale, m_j the mean response of the head's output to an error
// of the expected size and o the output of the low pass. Squared, the distance is ||L^T v_j||^2 - 2 L^T v_j . L^T o +
// ||L^T o||^2. The bound, which cancellation doesn't touch, costs two operations and settles all entries whose weight it
// leaves below the threshold; only the others need their product with o. The selection is that of all products: rounding
// is monotone, so that a weight under the bound is at most the bound's.
#pragma once

#include "simulation/row_softmax.hpp"
#include "simulation/weighted_values.hpp"

namespace LAMP_ISA {

// The mean response of a head's output to errors of +-d of one logit, (move(d) - move(-d)) / 2 with
// move(d) = z (e^d - 1) / (1 + z (e^d - 1)), which is z sinh d / (1 + 4 z (1 - z) sinh^2(d / 2)); 0 <= d <= 80.
inline vf response(vf z, vf d) {
  const vf one = set1(1.0f), s = sinh_positive(d * set1(0.5f));
  const vf squared = s * s, c = sqrt(one + squared);
  return z * (set1(2.0f) * s * c) / fma(set1(4.0f) * z * (one - z), squared, one);
}

// What the residual rules keep of a tile beside its scores.
struct ResidualTile {
  std::vector<float> low;     // probabilities of the low pass, a row of the tile after the other
  std::vector<float> mapped;  // L^T o of a row
  std::vector<float> squares, norms, bound, response;  // of the keys: ||L^T v||^2, its root, the bound, and m

  void reserve(const lamp::Attention& p, std::ptrdiff_t rows, std::ptrdiff_t width) {
    Tile::grow(low, rows * width);
    Tile::grow(mapped, p.Dv);
    for (auto* own : {&squares, &norms, &bound, &response}) Tile::grow(*own, width);
  }
};

class ResidualSoftmax : private RowSoftmax {
 public:
  // `mapped` holds L^T v of all keys, a matrix for each query head.
  ResidualSoftmax(const lamp::Attention& p, const Packed& exact, const Packed& mapped, const TileKeys& keys, Tile& tile,
                  ResidualTile& own)
      : RowSoftmax(p, exact, keys, tile), mapped_(mapped), own_(own) {}

  // First, of every row: from raw sums to scores, and their probabilities.
  void low_pass(const Row& row, float* y, float* z) {
    low(row, y);
    probabilities(z);
  }

  // Then, with the low pass' outputs there: scores `y` become the probabilities of the row with chosen entries recomputed.
  // `z` are those of the low pass, `output` is o. Returns how many were recomputed.
  std::int32_t run(const Row& row, float* y, const float* z, const float* squares, const float* output) {
    see(row);
    const std::ptrdiff_t count = choose_ahead(row, y, z, squares, output);
    if (count > 0) {
      finish(row, y, count);
    } else {
      note(row, count);
      std::copy_n(z, keys_.width, y);
    }
    return static_cast<std::int32_t>(count);
  }

 private:
  using RowSoftmax::at;

  // The numbers of the keys that belong to a query head.
  void take_head(std::ptrdiff_t head) {
    if (head == head_) return;
    head_ = head;
    const std::ptrdiff_t there = std::min(keys_.width, p_.Lk - keys_.origin);
    const float* squares = p_.residual.squares + (keys_.batch * p_.H + head) * p_.Lk + keys_.origin;
    std::fill_n(std::copy_n(squares, there, own_.squares.begin()), keys_.width - there, 0.0f);
    for (std::ptrdiff_t j = 0; j < keys_.width; j += vf::width) store(&own_.norms[at(j)], sqrt(load(&own_.squares[at(j)])));
  }

  vf shown(std::ptrdiff_t j, vf x) const { return select(mask_bytes(&tile_.visible[at(j)]), x, zero()); }

  // m_j and the bound of every key; what may exceed the threshold is marked.
  std::ptrdiff_t bounded(const Row& row, const float* y, const float* z, const float* squares, float scale) {
    vrows total = rows_zero();
    for (std::ptrdiff_t j = 0; j < keys_.width; j += kSumLanes)
      for (int i = 0; i < kRowVectors; ++i) {
        const std::ptrdiff_t k = j + i * vf::width;
        total.v[i] = total.v[i] + shown(k, load(z + k) * load(&own_.norms[at(k)]));
      }
    const vf all = set1(sum_rows(total)), threshold = set1(static_cast<float>(p_.threshold));
    const vf huge = set1(std::numeric_limits<float>::max());
    std::ptrdiff_t count = 0;
    for (std::ptrdiff_t j = 0; j < keys_.width; j += vf::width) {
      const vf norm = load(&own_.norms[at(j)]), p = load(z + j), score = load(y + j);
      const vf others = max(zero(), all - p * norm);
      const vf bound = others + (set1(1.0f) - p) * norm;
      vf change = expected_error(row, y, squares, j);
      if (p_.softcap > 0.0f) change = change * slope(score);
      const vf m = response(p, min(set1(kLargestChange), change));
      store(&own_.bound[at(j)], bound);
      store(&own_.response[at(j)], m);
      const vmask stays = mask_and(le(m * (bound / set1(scale)), threshold), le(abs(score), huge));
      unsigned may = bits(mask_bytes(&tile_.visible[at(j)])) & ~bits(stays);
      for (; may; may &= may - 1) tile_.chosen[at(count++)] = j + std::countr_zero(may);
    }
    return count;
  }

  std::ptrdiff_t choose_ahead(const Row& row, const float* y, const float* z, const float* squares, const float* output) {
    if (p_.threshold == std::numeric_limits<double>::infinity()) return 0;
    take_head(row.head);
    const float scale = p_.residual.scale[keys_.batch * p_.Lq + row.query];
    const std::ptrdiff_t may = bounded(row, y, z, squares, scale);
    if (may == 0) return 0;
    float* mapped = own_.mapped.data();
    values_rows<1>(&output, p_.residual.factor + row.head * p_.Dv * p_.Dv, p_.Dv, 0, p_.Dv, &mapped, p_.Dv);
    const std::ptrdiff_t matrix = keys_.batch * p_.H + row.head;
    const lamp::HeadRows& values = p_.residual.mapped;
    float_products(mapped, values.at(keys_.batch, row.head), values.row, mapped_, matrix, may);
    const float own = square_sum(mapped, p_.Dv), threshold = static_cast<float>(p_.threshold);
    std::ptrdiff_t count = 0;
    for (std::ptrdiff_t c = 0; c < may; ++c) {
      const std::ptrdiff_t j = tile_.chosen[at(c)];
      const float squared = own_.squares[at(j)] - 2.0f * tile_.recomputed[at(c)] + own;
      const float distance = std::sqrt(squared < 0.0f ? 0.0f : squared);  // NaN stays
      const bool stays = own_.response[at(j)] * (distance / scale) <= threshold && !std::isnan(own_.bound[at(j)]);
      if (!stays || !std::isfinite(y[j])) tile_.chosen[at(count++)] = j;
    }
    return count;
  }

  // In sixteen lanes.
  static float square_sum(const float* x, std::ptrdiff_t n) {
    alignas(64) float lanes[kSumLanes] = {};
    for (std::ptrdiff_t i = 0; i < n; ++i) lanes[i % kSumLanes] += x[i] * x[i];
    vrows sums;
    for (int i = 0; i < kRowVectors; ++i) sums.v[i] = load(lanes + i * vf::width);
    return sum_rows(sums);
  }

  static constexpr float kLargestChange = 80.0f;  // beyond it e^d overflows, and the output has long arrived at v_j
  const Packed& mapped_;
  ResidualTile& own_;
  std::ptrdiff_t head_ = -1;
};

}  // namespace LAMP_ISA
