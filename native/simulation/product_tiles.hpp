// Per-step rounded products: a block of rows against a block of columns, acc <- round(fma(a_k, b_k, acc)) for k = 0, 1, ...
//
// Columns lie across the lanes, so every entry of the result is summed in the order k = 0, 1, 2, ... whatever the
// tiling, and MR x NV independent accumulators hide the latency of the rounding chain.
#pragma once

#include <algorithm>
#include <vector>

#include "pool.hpp"
#include "simulation/rounding.hpp"

namespace LAMP_ISA {

enum class Form { strict, block, promote };

constexpr int kVectors = 4;
constexpr std::ptrdiff_t kColumns = kVectors * vf::width;  // columns of one packed block

// What a micro-kernel works on: `rows` row pointers, one packed block (K x kColumns), and where results go.
//
// A sum that is too long to be packed at once comes in pieces. `out`, `squares` and `carry` then hold its state between
// them: the accumulator (of promoted sums the total), the squares, and what a block or a run that isn't over has so far.
struct Block {
  const float* const* a;
  std::ptrdiff_t a_k;
  const float* b;
  std::ptrdiff_t K;
  float* const* out;
  float* const* squares;
  std::ptrdiff_t before = 0;      // products that earlier pieces have summed
  bool last = true;               // no piece comes after this one
  float* const* carry = nullptr;  // there where there are several pieces
};

template <bool Fused>
inline vf multiply_add(vf a, vf b, vf c) {
  if constexpr (Fused) return fma(a, b, c);
  return a * b + c;
}

template <class Round, Form F, bool Fused, bool Squares, int Rows>
void micro(const Accumulation& how, const Block& block) {
  const Round round(how.grid);
  // `inner` is the sum of the block or run under way, `acc` what goes over into it: the accumulator or, of promoted
  // sums, the total. Strict sums have the accumulator alone.
  vf acc[Rows][kVectors], inner[Rows][kVectors], squares[Rows][kVectors];
  const auto each = [&](auto&& apply) {
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < kVectors; ++j) apply(i, j, j * vf::width);
  };
  each([&](int i, int j, int) { acc[i][j] = inner[i][j] = squares[i][j] = zero(); });
  if (block.before > 0)
    each([&](int i, int j, int at) {
      acc[i][j] = load(block.out[i] + at);
      if (F != Form::strict) inner[i][j] = load(block.carry[i] + at);
      if constexpr (Squares) squares[i][j] = load(block.squares[i] + at);
    });

  const auto step = [&](std::ptrdiff_t k, auto&& apply) {
    const float* b = block.b + k * kColumns;
    for (int i = 0; i < Rows; ++i) {
      const vf a = set1(block.a[i][k * block.a_k]);
      for (int j = 0; j < kVectors; ++j) apply(i, j, a, load(b + j * vf::width));
    }
  };
  const auto note_square = [&](int i, int j, vf x) {
    if constexpr (Squares) squares[i][j] = fma(x, x, squares[i][j]);
  };

  if constexpr (F == Form::strict) {
    for (std::ptrdiff_t k = 0; k < block.K; ++k)
      step(k, [&](int i, int j, vf a, vf b) {
        acc[i][j] = round(multiply_add<Fused>(a, b, acc[i][j]));
        note_square(i, j, acc[i][j]);
      });
  } else {
    const std::ptrdiff_t length = F == Form::block ? how.block : how.promote;
    for (std::ptrdiff_t start = 0; start < block.K;) {
      const std::ptrdiff_t done = (block.before + start) % length;
      const std::ptrdiff_t end = std::min(start + length - done, block.K);
      vf run[Rows][kVectors];  // a copy that lives no longer than the loop, so that it stays in registers
      for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < kVectors; ++j) run[i][j] = inner[i][j];
      for (std::ptrdiff_t k = start; k < end; ++k)
        step(k, [&](int i, int j, vf a, vf b) {
          const vf sum = multiply_add<Fused>(a, b, run[i][j]);
          run[i][j] = F == Form::block ? sum : round(sum);
          if (F == Form::promote) note_square(i, j, run[i][j]);
        });
      for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < kVectors; ++j) inner[i][j] = run[i][j];
      const bool over = done + end - start == length || (end == block.K && block.last);
      if (over)
        each([&](int i, int j, int) {
          acc[i][j] = F == Form::block ? round(acc[i][j] + inner[i][j]) : acc[i][j] + inner[i][j];
          if (F == Form::block) note_square(i, j, acc[i][j]);
          inner[i][j] = zero();
        });
      start = end;
    }
  }

  each([&](int i, int j, int at) {
    store(block.out[i] + at, acc[i][j]);
    if (F != Form::strict && !block.last) store(block.carry[i] + at, inner[i][j]);
    if constexpr (Squares) store(block.squares[i] + at, squares[i][j]);
  });
}

// A micro-kernel for `rows` rows at a time and one for a single row, for what is left over.
struct Micro {
  void (*many)(const Accumulation&, const Block&);
  void (*one)(const Accumulation&, const Block&);
  int rows;

  // All `count` rows of a block, whatever their number.
  void run(const Accumulation& how, Block block, int count) const {
    for (; count >= rows; count -= rows) {
      many(how, block);
      block.a += rows;
      block.out += rows;
      block.squares += block.squares ? rows : 0;
      block.carry += block.carry ? rows : 0;
    }
    for (; count > 0; --count) {
      one(how, block);
      ++block.a;
      ++block.out;
      block.squares += block.squares ? 1 : 0;
      block.carry += block.carry ? 1 : 0;
    }
  }
};

template <class Round, Form F, bool Fused>
Micro pick_squares(bool squares) {
  constexpr int rows = Round::rows, fewer = std::min(rows, kSquaresRows);
  if (squares) return {micro<Round, F, Fused, true, fewer>, micro<Round, F, Fused, true, 1>, fewer};
  return {micro<Round, F, Fused, false, rows>, micro<Round, F, Fused, false, 1>, rows};
}

template <class Round>
Micro pick_form(const Accumulation& how, bool squares) {
  const auto fused = [&]<bool Fused>() {
    if (how.block > 1) return pick_squares<Round, Form::block, Fused>(squares);
    if (how.promote > 0) return pick_squares<Round, Form::promote, Fused>(squares);
    return pick_squares<Round, Form::strict, Fused>(squares);
  };
  return how.fused ? fused.template operator()<true>() : fused.template operator()<false>();
}

// The range of magnitudes of some operands: what decides whether the fast rounding is exact for them. Kept as bit
// patterns, whose integer order is the order of the magnitudes, so that a compiler vectorises it.
struct Magnitudes {
  std::uint32_t largest_bits = 0;                // of |x|; infinity and NaN are above all numbers
  std::uint32_t smallest_bits_less_1 = ~0u;      // of |x| less one, so that zero wraps round to the top
  std::uint32_t used_bits = 0;                   // every bit that is set in any of them

  void add(const float* x, std::ptrdiff_t n, std::ptrdiff_t stride = 1) {
    std::uint32_t most = largest_bits, least = smallest_bits_less_1, used = used_bits;
    for (std::ptrdiff_t i = 0; i < n; ++i) {
      const std::uint32_t m = std::bit_cast<std::uint32_t>(x[i * stride]) & 0x7fffffffu;
      most = std::max(most, m);
      least = std::min(least, m - 1u);
      used |= m;
    }
    largest_bits = most;
    smallest_bits_less_1 = least;
    used_bits = used;
  }
  void add(const Magnitudes& other) {
    largest_bits = std::max(largest_bits, other.largest_bits);
    smallest_bits_less_1 = std::min(smallest_bits_less_1, other.smallest_bits_less_1);
    used_bits |= other.used_bits;
  }
  bool finite() const { return largest_bits < 0x7f800000u; }
  bool all_zero() const { return largest_bits == 0; }
  int significant_bits() const { return 24 - std::min(std::countr_zero(used_bits), 23); }
  float largest() const { return std::bit_cast<float>(largest_bits); }
  float smallest() const { return std::bit_cast<float>(smallest_bits_less_1 + 1u); }  // of the nonzero ones
};

// Whether no partial sum of products of such operands can overflow, be subnormal or NaN under PS(mu), in any form.
// Every partial sum is a multiple of 2^-46 times the smallest binade of a product, and at most 2^25 times K times
// the largest product; docs/performance.md has the proof.
inline bool wide_is_exact(const Magnitudes& a, const Magnitudes& b, std::ptrdiff_t K) {
  if (!a.finite() || !b.finite()) return false;
  if (a.all_zero() || b.all_zero()) return true;
  constexpr float normal = std::numeric_limits<float>::min();
  return a.smallest() >= normal && b.smallest() >= normal &&
         static_cast<double>(a.smallest()) * b.smallest() >= std::ldexp(1.0, -78) &&
         static_cast<double>(a.largest()) * b.largest() * 2.0 * static_cast<double>(K) <= std::ldexp(1.0, 100);
}

inline Micro pick_micro(const Accumulation& how, bool squares, bool wide_exact) {
  const Grid& g = how.grid;
  if (g.is_float32()) return pick_form<RoundNone>(how, squares);
  if (g.has_float32_range() && g.mantissa_bits <= 22 && wide_exact) return pick_form<RoundWide>(how, squares);
  if (is_narrow(g) && g.overflow == Overflow::nan) return pick_form<RoundNarrow<false>>(how, squares);
  if (is_narrow(g)) return pick_form<RoundNarrow<true>>(how, squares);
  return pick_form<RoundExact>(how, squares);
}

// y <- round(y * scaling) for n values in place.
inline void scale_and_round(float* y, std::ptrdiff_t n, float scaling, const Grid& g) {
  const auto all = [&](const auto& round) {
    const vf s = set1(scaling);
    std::ptrdiff_t i = 0;
    for (; i + vf::width <= n; i += vf::width) store(y + i, round(load(y + i) * s));
    for (; i < n; ++i) y[i] = round_scalar(y[i] * scaling, g);
  };
  if (g.is_float32()) return all(RoundNone(g));
  if (is_narrow(g)) return all(RoundNarrow<true>(g));
  if (!g.has_float32_range()) return all(RoundExact(g));
  // Scaling can underflow or overflow where the sums did not, so the bit-pattern form of PS(mu), exact everywhere.
  const int shift = 23 - g.mantissa_bits;
  for (std::ptrdiff_t i = 0; i < n; ++i) {
    std::uint32_t x = std::bit_cast<std::uint32_t>(y[i] * scaling);
    const std::uint32_t finite = (x & 0x7f800000u) != 0x7f800000u ? ~0u : 0u;
    const std::uint32_t half = shift ? (1u << (shift - 1)) - 1u + ((x >> shift) & 1u) : 0u;
    x = (x + (half & finite)) & ~(((1u << shift) - 1u) & finite);
    y[i] = std::bit_cast<float>(x);
  }
}

// Columns [first, first + columns) of a matrix, k from [k, k + K), into K x kColumns, zero-padded.
inline void pack_block(const float* source, std::ptrdiff_t k_stride, std::ptrdiff_t column_stride, std::ptrdiff_t K,
                       std::ptrdiff_t columns, float* target) {
  if (columns < kColumns) std::fill_n(target, K * kColumns, 0.0f);
  if (column_stride == 1) {
    for (std::ptrdiff_t k = 0; k < K; ++k) std::copy_n(source + k * k_stride, columns, target + k * kColumns);
  } else {
    for (std::ptrdiff_t j = 0; j < columns; ++j)
      for (std::ptrdiff_t k = 0; k < K; ++k) target[k * kColumns + j] = source[k * k_stride + j * column_stride];
  }
}

// b (K x N, any strides) in blocks of kColumns columns, each K x kColumns, zero-padded; also their magnitudes.
struct Packed {
  std::ptrdiff_t blocks = 0, K = 0;
  std::vector<float> data;
  std::vector<Magnitudes> magnitudes;  // one per matrix and block

  const float* block(std::ptrdiff_t matrix, std::ptrdiff_t index) const {
    return data.data() + (matrix * blocks + index) * K * kColumns;
  }
  Magnitudes all() const {
    Magnitudes m;
    for (const auto& one : magnitudes) m.add(one);
    return m;
  }

  void pack(const float* b, std::ptrdiff_t matrices, const std::ptrdiff_t* matrix_offset, std::ptrdiff_t k_stride,
            std::ptrdiff_t column_stride, std::ptrdiff_t K_, std::ptrdiff_t N, int threads) {
    K = K_;
    blocks = (N + kColumns - 1) / kColumns;
    const auto size = static_cast<std::size_t>(matrices * blocks * K * kColumns);
    if (data.size() < size) data.resize(size);
    magnitudes.assign(static_cast<std::size_t>(matrices * blocks), Magnitudes());
    lamp::parallel(threads, matrices * blocks, [&](std::ptrdiff_t item) {
      const std::ptrdiff_t matrix = item / blocks, first = item % blocks * kColumns;
      float* target = data.data() + item * K * kColumns;
      pack_block(b + matrix_offset[matrix] + first * column_stride, k_stride, column_stride, K,
                 std::min(kColumns, N - first), target);
      magnitudes[static_cast<std::size_t>(item)].add(target, K * kColumns);
    });
  }
  // Gives memory beyond what most calls need back.
  void trim() {
    if (data.capacity() * sizeof(float) > lamp::kKeptBytes) std::vector<float>().swap(data);
  }
};

// The caller's thread keeps the memory of three between calls, up to lamp::kKeptBytes each: of the low-precision operand,
// of the exact one, and of what is behind a softmax. Lent for one call, which may end with an exception.
enum class Operand { low, exact, mapped };
template <Operand Which = Operand::low>
class LentPacked {
 public:
  LentPacked() = default;
  LentPacked(const LentPacked&) = delete;
  LentPacked& operator=(const LentPacked&) = delete;
  ~LentPacked() { packed().trim(); }
  Packed& operator*() const { return packed(); }

 private:
  static Packed& packed() {
    thread_local Packed own;
    return own;
  }
};

void products(const lamp::Products& p);
void recompute(const lamp::Recompute& p);
void attention(const lamp::Attention& p);

}  // namespace LAMP_ISA
