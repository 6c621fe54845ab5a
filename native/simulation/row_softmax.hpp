// One query row of an attention tile: scores to probabilities, with look-ahead and recomputation in between.
//
// The rules are stated in torchlamp/rules; this page is their threshold form (ThresholdForm) with the weight as a
// parameter, and the torch tile loop is its oracle.
#pragma once

#include "simulation/draws.hpp"
#include "simulation/products.hpp"

namespace LAMP_ISA {

// The keys that a query sees: `count` of those in [first, last).
struct Range {
  std::ptrdiff_t first, last, count;
};

// One query row: its head and position, its visible keys, its data and that of recomputation, and its numbers.
struct Row {
  std::ptrdiff_t head, query;
  Range keys;
  const float *q, *exact_q;
  float shift, error;  // 0 where there is none
  float square;        // ||q||^2, of bridges
};

// Where the keys of a tile lie: key head `kv` of sample `batch`, keys origin ... origin + width.
struct TileKeys {
  std::ptrdiff_t batch, kv, origin, width;
};

// The buffers of one thread; they grow to the largest tile seen and stay.
struct Tile {
  std::vector<float> scores, squares, logits, dense, key_errors, key_squares;
  Drawn drawn;
  std::vector<std::uint8_t> visible;
  std::vector<std::ptrdiff_t> chosen;
  std::vector<float> recomputed;

  template <class T>
  static void grow(std::vector<T>& v, std::ptrdiff_t n) {
    if (v.size() < static_cast<std::size_t>(n)) v.resize(static_cast<std::size_t>(n));
  }
  void reserve(const lamp::Attention& p, std::ptrdiff_t rows, std::ptrdiff_t width) {
    grow(scores, rows * width);
    grow(squares, p.needs_squares() ? rows * width : 0);
    grow(key_errors, p.key_error ? width : 0);
    grow(key_squares, p.k_squares ? width : 0);
    grow(logits, width);
    grow(dense, width);
    grow(visible, width);
    grow(chosen, width);
    grow(recomputed, width);
  }
};

class RowSoftmax {
 public:
  // `exact` holds the keys of recomputation.
  RowSoftmax(const lamp::Attention& p, const Packed& exact, const TileKeys& keys, Tile& tile)
      : p_(p), exact_(exact), keys_(keys), tile_(tile) {}

  // From raw sums (`y`, of the tile's keys) to probabilities in the same place; returns how many entries were
  // recomputed. `squares` are null where the weight doesn't need them.
  std::int32_t run(const Row& row, float* y, const float* squares) {
    low(row, y);
    const std::ptrdiff_t count = choose(row, y, squares);
    finish(row, y, count);
    return static_cast<std::int32_t>(count);
  }

 protected:
  static std::size_t at(std::ptrdiff_t j) { return static_cast<std::size_t>(j); }

  // From raw sums to scores, and their softmax.
  void low(const Row& row, float* y) {
    see(row);
    scale_and_round(y, keys_.width, p_.scaling, p_.accumulation.result());
    if (p_.shift)
      for (std::ptrdiff_t j = 0; j < keys_.width; j += vf::width) store(y + j, load(y + j) + set1(row.shift));
    softmax(y, row.head);
  }

  // Draws if the rule draws, recomputes the first `count` chosen entries, and leaves probabilities in `y`. The softmax of
  // the row's scores is there.
  void finish(const Row& row, float* y, std::ptrdiff_t count) {
    note(row, count);
    if (count > 0) {
      recompute(row, y, count);
      softmax(y, row.head);
    }
    probabilities(y);
  }

  // Of `count` chosen entries: any others in their place if the rule draws, and marks of their blocks.
  void note(const Row& row, std::ptrdiff_t count) {
    if (p_.draws) draw(row, count);
    if (p_.blocks) note_blocks(row, count);
  }

  void probabilities(float* z) const {
    const vf inverse = set1(1.0f / sum_);
    for (std::ptrdiff_t j = 0; j < keys_.width; j += vf::width) store(z + j, load(&tile_.logits[at(j)]) * inverse);
  }

  // As many entries as are chosen, but any: those with the lowest draws.
  void draw(const Row& row, std::ptrdiff_t count) {
    const float* draws = p_.draws + (row.head * p_.Lq + row.query) * p_.Lk + keys_.origin;
    tile_.drawn.lowest(draws, tile_.visible.data(), row.keys.last - keys_.origin, row.keys.count, count,
                       tile_.chosen.data());
  }

  void see(const Row& row) {
    std::uint8_t* visible = tile_.visible.data();
    std::fill_n(visible, keys_.width, std::uint8_t{0});
    const std::ptrdiff_t begin = row.keys.first - keys_.origin, end = row.keys.last - keys_.origin;
    if (p_.mask)
      std::copy_n(p_.mask + keys_.batch * p_.mask_batch + row.query * p_.mask_row + row.keys.first, end - begin,
                  visible + begin);
    else
      std::fill(visible + begin, visible + end, std::uint8_t{1});
  }

  vf logit(vf y) const { return p_.softcap > 0.0f ? tanh(y / set1(p_.softcap)) * set1(p_.softcap) : y; }

  // Unnormalised probabilities e^(logit - largest) into tile_.logits, 0 where not visible, and their sum.
  void softmax(const float* y, std::ptrdiff_t head) {
    const std::ptrdiff_t width = keys_.width;
    float* e = tile_.logits.data();
    const vf lowest = set1(-std::numeric_limits<float>::infinity());
    vf top = lowest;
    for (std::ptrdiff_t j = 0; j < width; j += vf::width) {
      const vf l = select(mask_bytes(&tile_.visible[at(j)]), logit(load(y + j)), lowest);
      store(e + j, l);
      top = max(l, top);
    }
    float shift = largest(top);
    if (p_.sinks) shift = std::max(shift, p_.sinks[head]);
    // A tile begins at a multiple of sixteen keys, so that a key's lane is its number's, whatever the tile.
    vrows total = rows_zero();
    for (std::ptrdiff_t j = 0; j < width; j += kSumLanes)
      for (int i = 0; i < kRowVectors; ++i) {
        const std::ptrdiff_t k = j + i * vf::width;
        const vf term = select(mask_bytes(&tile_.visible[at(k)]), exp(load(e + k) - set1(shift)), zero());
        store(e + k, term);
        total.v[i] = total.v[i] + term;
      }
    sum_ = sum_rows(total) + (p_.sinks ? exp_one(p_.sinks[head] - shift) : 0.0f);
  }

  // The weight of the rule as torchlamp.rules.ThresholdForm states it, factor by factor in its order; `z` is the
  // probability, or e^(logit - largest) for `relaxed`, `error` the expected error of the score where one is estimated.
  vf weigh(vf z, vf y, vf error) const {
    const bool estimated = p_.is_running() || p_.is_bridge();
    const bool gained = p_.weight == lamp::RuleWeight::strict || estimated;
    vf w = z;
    if (gained) w = (set1(1.0f) - z) * z * set1(2.0f);
    if (p_.weight == lamp::RuleWeight::relaxed) w = w * abs(y);
    if (p_.softcap > 0.0f && p_.weight != lamp::RuleWeight::topz) w = w * slope(y);
    if (p_.weight == lamp::RuleWeight::strict) w = w * abs(y);
    if (estimated) w = w * error;
    return w;
  }

  // The softcap's derivative.
  vf slope(vf y) const {
    const vf t = tanh(y / set1(p_.softcap));
    return set1(1.0f) - t * t;
  }

  // The expected error of the scores of the keys from j on: of a bridge, or of sums and of operands.
  vf expected_error(const Row& row, const float* y, const float* squares, std::ptrdiff_t j) const {
    if (p_.is_bridge()) {
      const vf score = load(y + j), norms = set1(row.square) * load(&tile_.key_squares[at(j)]) * set1(p_.norm_part);
      return sqrt(score * score * set1(p_.score_part) + norms) * set1(p_.error_scale);
    }
    const vf sums = squares ? sqrt(load(squares + j)) * set1(p_.error_scale) : zero();
    if (!p_.row_error) return sums;
    const vf operands = set1(row.error) * load(&tile_.key_errors[at(j)]);
    return squares ? sqrt(fma(operands, operands, sums * sums)) : operands;
  }

  // Marks what the rule recomputes: weight > threshold, and every visible entry whose weight is not a number or whose
  // score is not finite, since nothing is known of its error.
  std::ptrdiff_t choose(const Row& row, const float* y, const float* squares) {
    const std::ptrdiff_t width = keys_.width;
    if (p_.threshold == std::numeric_limits<double>::infinity()) return 0;
    const float* e = tile_.logits.data();
    float threshold = static_cast<float>(p_.threshold);
    vf norm = set1(1.0f / sum_);
    if (p_.weight == lamp::RuleWeight::relaxed) {
      norm = set1(1.0f);
      if (p_.by_length)
        threshold = static_cast<float>(std::min(1.0, p_.threshold * std::sqrt(1024.0 / static_cast<double>(row.keys.count))));
      vf top = zero(), total = zero();  // the sum is NaN where a weight is, which the maximum may hide
      for (std::ptrdiff_t j = 0; j < width; j += vf::width) {
        const vf w = select(mask_bytes(&tile_.visible[at(j)]), weigh(load(e + j), load(y + j), zero()), zero());
        top = max(w, top);
        total = total + w;
      }
      threshold *= std::isnan(sum_halves(total)) ? std::numeric_limits<float>::quiet_NaN() : largest(top);
    }
    const bool estimated = p_.is_running() || p_.is_bridge();
    const vf bound = set1(threshold), huge = set1(std::numeric_limits<float>::max());
    std::ptrdiff_t count = 0;
    for (std::ptrdiff_t j = 0; j < width; j += vf::width) {
      const vf score = load(y + j);
      const vf error = estimated ? expected_error(row, y, squares, j) : zero();
      const vmask low = mask_and(le(weigh(load(e + j) * norm, score, error), bound), le(abs(score), huge));
      unsigned chosen = bits(mask_bytes(&tile_.visible[at(j)])) & ~bits(low);
      for (; chosen; chosen &= chosen - 1) tile_.chosen[at(count++)] = j + std::countr_zero(chosen);
    }
    return count;
  }

  // Which blocks of keys the row sees, and in which of them something is recomputed.
  void note_blocks(const Row& row, std::ptrdiff_t count) {
    const std::ptrdiff_t all = (p_.Lk + lamp::kBlockKeys - 1) / lamp::kBlockKeys, origin = keys_.origin;
    std::uint8_t* blocks = p_.blocks + p_.row_index(keys_.batch, row.head, row.query) * all;
    for (std::ptrdiff_t j = 0; j < keys_.width; ++j)
      if (tile_.visible[at(j)]) blocks[(origin + j) / lamp::kBlockKeys] |= lamp::block_visible;
    for (std::ptrdiff_t c = 0; c < count; ++c)
      blocks[(origin + tile_.chosen[at(c)]) / lamp::kBlockKeys] |= lamp::block_touched;
  }

  // x . row of the first `count` chosen keys, in float32 FMAs in the order of the elements, into tile_.recomputed. The
  // rows of key 0 on start at `rows`, `row` elements apart; `packed` has them as blocks of its matrix `matrix`.
  void float_products(const float* x, const float* rows, std::ptrdiff_t row, const Packed& packed, std::ptrdiff_t matrix,
                      std::ptrdiff_t count) {
    const std::ptrdiff_t* chosen = tile_.chosen.data();
    float* value = tile_.recomputed.data();
    if (count * 8 < keys_.width) return dots(x, 1, rows + keys_.origin * row, 1, row, packed.K, chosen, count, value);
    // So many that all keys are cheaper; the same sums in the same order.
    for (std::ptrdiff_t j = 0; j < keys_.width; j += kColumns) {
      float* out = &tile_.dense[at(j)];
      const Block block{&x, 1, packed.block(matrix, (keys_.origin + j) / kColumns), packed.K, &out, nullptr};
      micro<RoundNone, Form::strict, true, false, 1>(Accumulation(), block);
    }
    for (std::ptrdiff_t c = 0; c < count; ++c) value[c] = tile_.dense[at(chosen[c])];
  }

  void recompute(const Row& row, float* y, std::ptrdiff_t count) {
    const std::ptrdiff_t* chosen = tile_.chosen.data();
    const float* value = tile_.recomputed.data();
    const lamp::HeadRows& keys = p_.exact_k;
    float_products(row.exact_q, keys.at(keys_.batch, keys_.kv), keys.row, exact_, keys_.batch * p_.Hkv + keys_.kv, count);
    for (std::ptrdiff_t c = 0; c < count; ++c) y[chosen[c]] = value[c] * p_.scaling;
    if (p_.shift)
      for (std::ptrdiff_t c = 0; c < count; ++c) y[chosen[c]] += row.shift;
  }

  const lamp::Attention& p_;
  const Packed& exact_;
  const TileKeys& keys_;
  Tile& tile_;
  float sum_ = 0.0f;
};

}  // namespace LAMP_ISA
