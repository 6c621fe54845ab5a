// One query row of an attention tile: scores to probabilities, with look-ahead and recomputation in between.
//
// The rules are stated in torchlamp/rules; this page is their threshold form (ThresholdForm) with the weight as a
// parameter, and the torch tile loop is its oracle.
#pragma once

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
};

// Where the keys of a tile lie: key head `kv` of sample `batch`, keys origin ... origin + width.
struct TileKeys {
  std::ptrdiff_t batch, kv, origin, width;
};

// The buffers of one thread; they grow to the largest tile seen and stay.
struct Tile {
  std::vector<float> scores, squares, logits, dense, key_errors;
  std::vector<std::uint8_t> visible;
  std::vector<std::ptrdiff_t> chosen;
  std::vector<float> recomputed;

  void reserve(std::ptrdiff_t rows, std::ptrdiff_t width, bool with_squares, bool with_errors) {
    const auto grow = [](auto& v, std::ptrdiff_t n) {
      if (v.size() < static_cast<std::size_t>(n)) v.resize(static_cast<std::size_t>(n));
    };
    grow(scores, rows * width);
    grow(squares, with_squares ? rows * width : 0);
    grow(key_errors, with_errors ? width : 0);
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
    const std::ptrdiff_t width = keys_.width;
    see(row);
    scale_and_round(y, width, p_.scaling, p_.accumulation.result());
    if (p_.shift)
      for (std::ptrdiff_t j = 0; j < width; j += vf::width) store(y + j, load(y + j) + set1(row.shift));
    softmax(y, row.head);
    const std::ptrdiff_t count = choose(row, y, squares);
    if (p_.blocks) note_blocks(row, count);
    if (count > 0) {
      recompute(row, y, count);
      softmax(y, row.head);
    }
    const vf inverse = set1(1.0f / sum_);
    for (std::ptrdiff_t j = 0; j < width; j += vf::width) store(y + j, load(&tile_.logits[at(j)]) * inverse);
    return static_cast<std::int32_t>(count);
  }

 private:
  static std::size_t at(std::ptrdiff_t j) { return static_cast<std::size_t>(j); }

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
  // probability, or e^(logit - largest) for `relaxed`, `error` the expected error of the score for `running`.
  vf weigh(vf z, vf y, vf error) const {
    const bool gained = p_.weight == lamp::RuleWeight::strict || p_.weight == lamp::RuleWeight::running;
    vf w = z;
    if (gained) w = (set1(1.0f) - z) * z * set1(2.0f);
    if (p_.weight == lamp::RuleWeight::relaxed) w = w * abs(y);
    if (p_.softcap > 0.0f && p_.weight != lamp::RuleWeight::topz) {
      const vf t = tanh(y / set1(p_.softcap));
      w = w * (set1(1.0f) - t * t);
    }
    if (p_.weight == lamp::RuleWeight::strict) w = w * abs(y);
    if (p_.weight == lamp::RuleWeight::running) w = w * error;
    return w;
  }

  // The expected error of the scores of the keys from j on, of sums and of operands.
  vf expected_error(const Row& row, const float* squares, std::ptrdiff_t j) const {
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
    const bool running = p_.weight == lamp::RuleWeight::running;
    const vf bound = set1(threshold), huge = set1(std::numeric_limits<float>::max());
    std::ptrdiff_t count = 0;
    for (std::ptrdiff_t j = 0; j < width; j += vf::width) {
      const vf score = load(y + j);
      const vf error = running ? expected_error(row, squares, j) : zero();
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

  void recompute(const Row& row, float* y, std::ptrdiff_t count) {
    const std::ptrdiff_t* chosen = tile_.chosen.data();
    float* value = tile_.recomputed.data();
    if (count * 8 < keys_.width) {
      const lamp::HeadRows& keys = p_.exact_k;
      dots(row.exact_q, 1, keys.at(keys_.batch, keys_.kv, keys_.origin), 1, keys.row, p_.D, chosen, count, value);
    } else {  // so many that the whole row in float32 is cheaper; the same sums in the same order
      const std::ptrdiff_t matrix = keys_.batch * p_.Hkv + keys_.kv;
      for (std::ptrdiff_t j = 0; j < keys_.width; j += kColumns) {
        float* out = &tile_.dense[at(j)];
        const Block block{&row.exact_q, 1, exact_.block(matrix, (keys_.origin + j) / kColumns), p_.D, &out, nullptr};
        micro<RoundNone, Form::strict, true, false, 1>(Accumulation(), block);
      }
      for (std::ptrdiff_t c = 0; c < count; ++c) value[c] = tile_.dense[at(chosen[c])];
    }
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
