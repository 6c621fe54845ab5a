// Holds every compiled spelling of the kernels against a scalar emulation, without Python.
//
// Products and recomputation must agree bit for bit; attention, whose exponential is a polynomial, to float32 accuracy
// with the same entries recomputed. Low-bit kernels and the pool of threads have files of their own. Prints a closing line
// with the counts; exit status 1 if anything failed.
#include <cstdlib>
#include <string>
#include <vector>

#define LAMP_ISA selftest
#include "simulation/rounding.hpp"
#include "tests/selftest.hpp"

namespace {

using lamp::Accumulation;
using lamp::Grid;
using lamp::Overflow;
using selftest::check;
using selftest::round_scalar;
using selftest::same;

struct Sum {
  float value, squares;
};

// The definition of an accumulator, one operation a line.
Sum accumulate(const std::vector<float>& a, const std::vector<float>& b, const Accumulation& how) {
  const auto step = [&](std::size_t k, float acc) {
    if (how.fused) return std::fma(a[k], b[k], acc);
    const float product = a[k] * b[k];
    return product + acc;
  };
  float acc = 0.0f, total = 0.0f, squares = 0.0f;
  const std::size_t length = static_cast<std::size_t>(how.block > 1 ? how.block : how.promote > 0 ? how.promote : 1);
  for (std::size_t start = 0; start < a.size(); start += length) {
    const std::size_t end = std::min(a.size(), start + length);
    if (how.block > 1) {
      float partial = 0.0f;
      for (std::size_t k = start; k < end; ++k) partial = step(k, partial);
      acc = round_scalar(acc + partial, how.grid);
      squares = std::fma(acc, acc, squares);
      continue;
    }
    if (how.promote > 0) acc = 0.0f;
    for (std::size_t k = start; k < end; ++k) {
      acc = round_scalar(step(k, acc), how.grid);
      squares = std::fma(acc, acc, squares);
    }
    if (how.promote > 0) total = total + acc;
  }
  return {how.promote > 0 ? total : acc, squares};
}

Grid wide(int bits) {
  Grid g;
  g.mantissa_bits = bits;
  return g;
}

Grid narrow(int bits, int smallest, int largest, int lost, Overflow overflow, bool subnormals = true) {
  Grid g;
  g.mantissa_bits = bits;
  g.min_exponent = smallest;
  g.max_exponent = largest;
  g.top_codes_lost = lost;
  g.overflow = overflow;
  g.subnormals = subnormals;
  return g;
}

enum class Data { normal, tiny, huge, special };

float draw(std::mt19937& random, Data kind) {
  std::normal_distribution<float> gauss;
  switch (kind) {
    case Data::tiny: return gauss(random) * 1e-21f;
    case Data::huge: return gauss(random) * 1e18f;
    case Data::special: {
      const auto which = random() % 40;
      if (which == 0) return std::numeric_limits<float>::quiet_NaN();
      if (which == 1) return std::numeric_limits<float>::infinity();
      if (which == 2) return -0.0f;
      if (which == 3) return 1e-41f;
      return gauss(random);
    }
    default: return random() % 16 == 0 ? 0.0f : gauss(random);
  }
}

struct Shape {
  std::ptrdiff_t group, G, M, K, N;
};

Shape small_shape(std::mt19937& random) {
  const auto below = [&](unsigned n) { return static_cast<std::ptrdiff_t>(random() % n); };
  const std::ptrdiff_t group = 1 + below(3);
  return {group, group * (1 + below(2)), 1 + below(60), below(70), 1 + below(150)};
}

void test_products(const lamp::Kernels& kernels, std::mt19937& random, const Accumulation& how, Data kind,
                   const Shape& shape) {
  lamp::Products p;
  p.group = shape.group;
  p.G = shape.G;
  p.M = shape.M;
  p.K = shape.K;
  p.N = shape.N;
  std::vector<float> a(static_cast<std::size_t>(p.G * p.M * p.K)), b(static_cast<std::size_t>(p.G * p.N * p.K));
  for (float& x : a) x = draw(random, kind);
  for (float& x : b) x = draw(random, kind);
  std::vector<float> out(static_cast<std::size_t>(p.G * p.M * p.N), 7.0f), squares = out;
  p.a = a.data();
  p.b = b.data();
  p.out = out.data();
  p.squares = random() % 2 ? squares.data() : nullptr;
  p.a_batch = p.M * p.K;
  p.a_row = p.K;
  p.a_k = 1;
  p.b_batch = p.N * p.K;
  if (random() % 2) {
    p.b_k = p.N;
    p.b_column = 1;
  } else {
    p.b_k = 1;
    p.b_column = p.K;
  }
  p.scaled = random() % 2;
  p.scaling = 0.176776695f;
  p.causal = random() % 2;
  p.offset = static_cast<std::ptrdiff_t>(random() % 40) - 10;
  p.accumulation = how;
  p.threads = static_cast<int>(1 + random() % 4);
  kernels.products(p);
  bool ok = true;
  for (std::ptrdiff_t g = 0; g < p.G; ++g)
    for (std::ptrdiff_t i = 0; i < p.M; ++i)
      for (std::ptrdiff_t j = 0; j < p.N; ++j) {
        std::vector<float> left, right;
        for (std::ptrdiff_t k = 0; k < p.K; ++k) {
          left.push_back(p.a[g * p.a_batch + i * p.a_row + k]);
          right.push_back(p.b[g / p.group * p.b_batch + k * p.b_k + j * p.b_column]);
        }
        Sum want = accumulate(left, right, how);
        if (p.scaled) want.value = round_scalar(want.value * p.scaling, how.result());
        if (p.causal && j > i + p.offset) want = {0.0f, 0.0f};
        const auto at = static_cast<std::size_t>((g * p.M + i) * p.N + j);
        ok = ok && same(out[at], want.value) && (!p.squares || same(squares[at], want.squares));
      }
  check(ok, std::string("products ") + kernels.name + " mu=" + std::to_string(how.grid.mantissa_bits) + " block=" +
                std::to_string(how.block) + " promote=" + std::to_string(how.promote) + " data=" +
                std::to_string(static_cast<int>(kind)));
}

void test_recompute(const lamp::Kernels& kernels, std::mt19937& random) {
  lamp::Recompute p;
  p.group = 2;
  p.G = 4;
  p.M = 1 + static_cast<std::ptrdiff_t>(random() % 20);
  p.K = static_cast<std::ptrdiff_t>(random() % 70);
  p.N = 1 + static_cast<std::ptrdiff_t>(random() % 90);
  std::vector<float> a(static_cast<std::size_t>(p.G * p.M * p.K)), b(static_cast<std::size_t>(2 * p.N * p.K));
  std::vector<float> scores(static_cast<std::size_t>(p.G * p.M * p.N), 5.0f);
  std::vector<std::uint8_t> mask(scores.size());
  for (float& x : a) x = draw(random, Data::normal);
  for (float& x : b) x = draw(random, Data::normal);
  for (auto& x : mask) x = random() % 3 == 0;
  p.a = a.data();
  p.b = b.data();
  p.scores = scores.data();
  p.mask = mask.data();
  p.a_batch = p.M * p.K;
  p.a_row = p.K;
  p.a_k = 1;
  p.b_batch = p.N * p.K;
  p.b_k = 1;
  p.b_column = p.K;
  p.mask_batch = p.M * p.N;
  p.mask_row = p.N;
  p.scaled = true;
  p.scaling = 0.3f;
  p.threads = 2;
  kernels.recompute(p);
  bool ok = true;
  for (std::ptrdiff_t at = 0; at < p.G * p.M * p.N; ++at) {
    const std::ptrdiff_t row = at / p.N, g = row / p.M;
    float want = 0.0f;
    for (std::ptrdiff_t k = 0; k < p.K; ++k)
      want = std::fma(a[static_cast<std::size_t>(row * p.K + k)],
                      b[static_cast<std::size_t>(g / 2 * p.b_batch + at % p.N * p.K + k)], want);
    want = mask[static_cast<std::size_t>(at)] ? want * 0.3f : 5.0f;
    ok = ok && same(scores[static_cast<std::size_t>(at)], want);
  }
  check(ok, std::string("recompute ") + kernels.name);
}

// `transformed`: coarser operands with errors, exact ones for the recomputation, and a shift of each row.
void test_attention(const lamp::Kernels& kernels, std::mt19937& random, lamp::RuleWeight weight, bool transformed) {
  lamp::Attention p;
  p.B = 2;
  p.Hkv = 2;
  p.H = 4;
  p.D = 24;
  p.Dv = 21;
  p.Lq = 1 + static_cast<std::ptrdiff_t>(random() % 50);
  p.Lk = p.Lq + static_cast<std::ptrdiff_t>(random() % 100);
  const auto fill = [&](std::ptrdiff_t n) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& value : x) value = draw(random, Data::normal);
    return x;
  };
  const auto q = fill(p.B * p.H * p.Lq * p.D), k = fill(p.B * p.Hkv * p.Lk * p.D), v = fill(p.B * p.Hkv * p.Lk * p.Dv);
  const auto sinks = fill(p.H);
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(p.B * p.Lq * p.Lk));
  for (auto& x : mask) x = random() % 4 != 0;
  std::vector<float> out(static_cast<std::size_t>(p.B * p.Lq * p.H * p.Dv));
  std::vector<std::int32_t> selected(static_cast<std::size_t>(p.B * p.H * p.Lq));
  std::vector<std::int32_t> visible(static_cast<std::size_t>(2 * p.B * p.Lq));
  p.q = {q.data(), p.H * p.Lq * p.D, p.Lq * p.D, p.D};
  p.k = {k.data(), p.Hkv * p.Lk * p.D, p.Lk * p.D, p.D};
  p.v = {v.data(), p.Hkv * p.Lk * p.Dv, p.Lk * p.Dv, p.Dv};
  const auto exact_q = fill(p.B * p.H * p.Lq * p.D), exact_k = fill(p.B * p.Hkv * p.Lk * p.D);
  const auto shift = fill(p.B * p.H * p.Lq);
  auto row_error = fill(p.B * p.H * p.Lq), key_error = fill(p.B * p.Hkv * p.Lk);
  for (auto* errors : {&row_error, &key_error})
    for (float& x : *errors) x = std::fabs(x);
  p.accumulation.grid = wide(4);
  if (transformed) {
    if (random() % 2) p.exact_q = {exact_q.data(), p.q.batch, p.q.head, p.q.row};
    if (random() % 2) p.exact_k = {exact_k.data(), p.k.batch, p.k.head, p.k.row};
    p.shift = random() % 2 ? shift.data() : nullptr;
    p.row_error = row_error.data();
    p.key_error = key_error.data();
    if (random() % 2) p.accumulation.grid = Grid();
  }
  const bool sums_err = !(transformed && p.accumulation.grid.is_float32());
  p.out = out.data();
  p.selected = selected.data();
  p.visible = visible.data();
  p.mask = mask.data();
  p.mask_batch = p.Lq * p.Lk;
  p.mask_row = p.Lk;
  p.sinks = random() % 2 ? sinks.data() : nullptr;
  p.scaling = 0.25f;
  p.weight = weight;
  p.threshold = 0.05f;
  p.error_scale = 0.01f;
  p.threads = 3;
  p.softcap = random() % 2 ? 2.0f : 0.0f;
  kernels.attention(p);
  double worst = 0.0;
  int miscounted = 0;
  for (std::ptrdiff_t b = 0; b < p.B; ++b)
    for (std::ptrdiff_t h = 0; h < p.H; ++h)
      for (std::ptrdiff_t i = 0; i < p.Lq; ++i) {
        std::vector<double> y, error, logit, z;
        const auto keys = static_cast<std::size_t>(p.Lk);
        const std::uint8_t* sees = &mask[static_cast<std::size_t>((b * p.Lq + i) * p.Lk)];
        std::vector<float> exact;
        for (std::ptrdiff_t j = 0; j < p.Lk; ++j) {
          const auto sum = [&](const lamp::HeadRows& query, const lamp::HeadRows& key, const Accumulation& how) {
            const float *left = query.at(b, h, i), *right = key.at(b, h / 2, j);
            return accumulate({left, left + p.D}, {right, right + p.D}, how);
          };
          const auto row = static_cast<std::size_t>((b * p.H + h) * p.Lq + i);
          const float moved = p.shift ? shift[row] : 0.0f;
          const Sum low = sum(p.q, p.k, p.accumulation);
          y.push_back(round_scalar(low.value * p.scaling, p.accumulation.grid) + moved);
          const double of_sums = sums_err ? p.error_scale * std::sqrt(static_cast<double>(low.squares)) : 0.0;
          const double of_operands =
              transformed ? row_error[row] * key_error[static_cast<std::size_t>((b * 2 + h / 2) * p.Lk + j)] : 0.0;
          error.push_back(std::hypot(of_sums, of_operands));
          const Sum full = sum(p.exact_q.data ? p.exact_q : p.q, p.exact_k.data ? p.exact_k : p.k, Accumulation());
          exact.push_back(full.value * p.scaling + moved);
        }
        const auto softmax = [&] {
          logit.assign(keys, 0.0);
          z.assign(keys, 0.0);
          double top = p.sinks ? p.sinks[h] : -1e300, total = 0.0;
          for (std::size_t j = 0; j < keys; ++j) {
            logit[j] = p.softcap > 0 ? p.softcap * std::tanh(y[j] / p.softcap) : y[j];
            if (sees[j]) top = std::max(top, logit[j]);
          }
          for (std::size_t j = 0; j < keys; ++j) total += z[j] = sees[j] ? std::exp(logit[j] - top) : 0.0;
          if (p.sinks) total += std::exp(p.sinks[h] - top);
          for (double& x : z) x /= total;
        };
        softmax();
        std::vector<double> w(keys, 0.0);
        double top = 0.0, largest = -1e300;
        for (std::size_t j = 0; j < keys; ++j)
          if (sees[j]) largest = std::max(largest, logit[j]);
        for (std::size_t j = 0; j < keys; ++j) {
          if (!sees[j]) continue;
          const double slope = p.softcap > 0 ? 1.0 - std::pow(logit[j] / p.softcap, 2) : 1.0;
          if (weight == lamp::RuleWeight::strict) w[j] = 2 * z[j] * (1 - z[j]) * std::fabs(y[j]) * slope;
          if (weight == lamp::RuleWeight::relaxed) w[j] = std::fabs(y[j]) * slope * std::exp(logit[j] - largest);
          if (weight == lamp::RuleWeight::running)
            w[j] = 2 * z[j] * (1 - z[j]) * slope * error[j];
          if (weight == lamp::RuleWeight::topz) w[j] = z[j];
          top = std::max(top, w[j]);
        }
        std::int32_t count = 0;
        for (std::size_t j = 0; j < keys; ++j)
          if (w[j] > p.threshold * (weight == lamp::RuleWeight::relaxed ? top : 1.0)) y[j] = exact[j], ++count;
        softmax();
        const auto row = static_cast<std::size_t>((b * p.H + h) * p.Lq + i);
        miscounted += selected[row] != count;
        if (selected[row] != count) continue;  // a weight within float32 rounding of the threshold
        double seen = 0.0;
        for (std::size_t j = 0; j < keys; ++j) seen += sees[j];
        for (std::ptrdiff_t d = 0; d < p.Dv; ++d) {
          double want = 0.0;
          for (std::size_t j = 0; j < keys; ++j)
            want += (seen > 0 ? z[j] : 1.0 / static_cast<double>(keys)) *
                    p.v.at(b, h / 2, static_cast<std::ptrdiff_t>(j))[d];
          worst = std::max(worst, std::fabs(want - out[static_cast<std::size_t>(((b * p.Lq + i) * p.H + h) * p.Dv + d)]));
        }
      }
  check(worst < 2e-6 && miscounted <= static_cast<int>(selected.size()) / 50,
        std::string("attention ") + kernels.name + (transformed ? " transformed" : "") + " weight " + std::to_string(static_cast<int>(weight)) + " error " +
            std::to_string(worst) + " miscounted " + std::to_string(miscounted));
}

int report() {
  std::printf("%d passed, %d failed\n", selftest::passed, selftest::failed);
  return selftest::failed ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) {
  selftest::test_pool();
  if (count > 1 && std::string(arguments[1]) == "pool") return report();

  const std::vector<Grid> grids = {wide(1), wide(4), wide(7), wide(22), wide(23),
                                   narrow(3, -6, 8, 1, Overflow::nan), narrow(2, -14, 15, 0, Overflow::inf),
                                   narrow(3, -6, 8, 1, Overflow::saturate), narrow(10, -14, 15, 0, Overflow::inf, false),
                                   narrow(7, -126, 127, 0, Overflow::saturate)};
  std::mt19937 random(20260121);
  for (const lamp::Kernels* kernels : selftest::kernels_here()) {
    for (const Grid& grid : grids)
      for (const Data kind : {Data::normal, Data::tiny, Data::huge, Data::special})
        for (const auto& [block, promote] : {std::pair{1, 0}, std::pair{16, 0}, std::pair{1, 20}})
          for (const bool fused : {true, false})
            test_products(*kernels, random, {grid, fused, block, promote}, kind, small_shape(random));
    // Too large to be packed at once: many narrow matrices, and sums so long that they come in pieces.
    for (const auto& [block, promote] : {std::pair{1, 0}, std::pair{7, 0}, std::pair{300000, 0}, std::pair{1, 128},
                                         std::pair{1, 300000}}) {
      test_products(*kernels, random, {wide(4), true, block, promote}, Data::normal, {2, 14000, 1, 80, 1});
      test_products(*kernels, random, {wide(7), true, block, promote}, Data::normal, {1, 1, 2, 530000, 1});
      test_products(*kernels, random, {grids[5], false, block, promote}, Data::special, {1, 1, 1, 530001, 2});
    }
    for (int i = 0; i < 20; ++i) test_recompute(*kernels, random);
    for (int i = 0; i < 5; ++i)
      for (const auto weight : {lamp::RuleWeight::strict, lamp::RuleWeight::relaxed, lamp::RuleWeight::running, lamp::RuleWeight::topz})
        for (const bool transformed : {false, true}) test_attention(*kernels, random, weight, transformed);
    selftest::test_lowbit(*kernels, random);
    std::printf("%s: checked\n", kernels->name);
  }
  return report();
}
