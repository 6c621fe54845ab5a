// What the kernels are told: plain numbers, the same as torchlamp.kernels.specification.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamp {

enum class Overflow : int { inf, nan, saturate };

// The set of values that results are rounded to, a subset of float32.
struct Grid {
  int mantissa_bits = 23;
  int min_exponent = -126;
  int max_exponent = 127;
  int top_codes_lost = 0;
  Overflow overflow = Overflow::inf;
  bool subnormals = true;
  bool is_signed = true;
  bool negative_zero = true;

  bool has_float32_range() const {
    return min_exponent == -126 && max_exponent == 127 && top_codes_lost == 0 && overflow == Overflow::inf &&
           subnormals && is_signed && negative_zero;
  }
  bool is_float32() const { return has_float32_range() && mantissa_bits == 23; }
};

// A matrix unit (torchlamp.kernels.specification.Fuse): `length` products and the accumulator, aligned and truncated.
struct Fuse {
  int length = 0;  // 0: none
  int bits = 1;
  bool nearest = false;
  int floor_a = -126;
  int floor_b = -126;
  int zero_exponent = -131;
};

// How K products are summed: strict (block = 1, promote = 0), in float32 blocks, or promoted to a float32 total.
struct Accumulation {
  Grid grid;
  bool fused = true;
  int block = 1;
  int promote = 0;
  Fuse fuse = {};

  // The grid that finished sums are rounded to again once scaled: float32 for promoted sums and those of units.
  Grid result() const { return promote > 0 || fuse.length > 0 ? Grid() : grid; }
};

// out[g] = a[g] x b[g / group], sizes (M, K) x (K, N), each with element strides; the columns of out are contiguous.
struct Products {
  const float* a = nullptr;
  const float* b = nullptr;
  float* out = nullptr;
  float* squares = nullptr;  // optional: sum over the rounding steps of acc^2, laid out as out
  std::ptrdiff_t G = 0, M = 0, K = 0, N = 0, group = 1;
  std::ptrdiff_t a_batch = 0, a_row = 0, a_k = 0;
  std::ptrdiff_t b_batch = 0, b_k = 0, b_column = 0;
  bool scaled = false;  // multiply by scaling in float32 and round again
  float scaling = 1.0f;
  bool causal = false;  // row i sees columns j <= i + offset only; the others become 0
  std::ptrdiff_t offset = 0;
  Accumulation accumulation;
  int threads = 1;
};

// scores[g, i, j] = scaling * (a[g, i] . b[g / group, :, j]) in float32 where mask[g, i, j]; the rest stays.
struct Recompute {
  const float* a = nullptr;
  const float* b = nullptr;
  float* scores = nullptr;
  const std::uint8_t* mask = nullptr;
  std::ptrdiff_t G = 0, M = 0, K = 0, N = 0, group = 1;
  std::ptrdiff_t a_batch = 0, a_row = 0, a_k = 0;
  std::ptrdiff_t b_batch = 0, b_k = 0, b_column = 0;
  std::ptrdiff_t mask_batch = 0, mask_row = 0;
  bool scaled = false;
  float scaling = 1.0f;
  int threads = 1;
};

// The weight that a threshold rule compares with its threshold (torchlamp.rules states each formula).
enum class RuleWeight : int { strict, relaxed, running, topz, bridge, running_residual, bridge_residual };

// Keys of a block whose recomputation is counted, and what is noted of a row's block.
constexpr std::ptrdiff_t kBlockKeys = 16;
enum BlockBit : std::uint8_t { block_visible = 1, block_touched = 2 };

// Rows of heads, (batch, head, row, element) with contiguous elements; null: not there.
struct HeadRows {
  const float* data = nullptr;
  std::ptrdiff_t batch = 0, head = 0, row = 0;  // strides in elements

  const float* at(std::ptrdiff_t b, std::ptrdiff_t h, std::ptrdiff_t i = 0) const {
    return data + b * batch + h * head + i * row;
  }
};

// What lies between the heads and the residual stream (torchlamp.rules.RunningResidual); all but `mapped` contiguous.
struct Residual {
  const float* factor = nullptr;  // (H, Dv, Dv): L_h; ||L_h^T x|| is the length of x in the stream
  HeadRows mapped;                // (B, H, Lk, Dv): L_h^T v_j
  const float* squares = nullptr; // (B, H, Lk): ||L_h^T v_j||^2
  const float* scale = nullptr;   // (B, Lq), > 0: what changes are relative to
};

// Attention under a threshold rule: q (B, H, Lq, D), k and v (B, Hkv, Lk, D or Dv).
//
// Scores are y = round(scaling * low-precision sum of q . k) + shift. A recomputed one is scaling * (exact_q . exact_k)
// + shift, all in float32. The operands q and k may be coarser copies of the exact ones; the expected error of a score
// is then the root of (error_scale^2 * sum of squares) + (row_error * key_error)^2.
struct Attention {
  HeadRows q, k, v;
  HeadRows exact_q, exact_k;          // operands of recomputed scores; null: q and k
  const float* shift = nullptr;       // (B, H, Lq), contiguous, or null: none
  const float* row_error = nullptr;   // (B, H, Lq), contiguous, or null: the operands have no error; the factor
  const float* key_error = nullptr;   // (B, Hkv, Lk), contiguous, of row_error, there with it
  const float* q_squares = nullptr;   // bridges: (B, H, Lq), contiguous, ||q||^2
  const float* k_squares = nullptr;   // bridges: (B, Hkv, Lk), contiguous, ||k||^2
  Residual residual;                  // for the weights that look as far as the residual stream
  const float* draws = nullptr;       // (H, Lq, Lk), contiguous, in [0, 1), shared by the samples; or null: nothing is drawn
  float* out = nullptr;               // (B, Lq, H, Dv), contiguous
  std::int32_t* selected = nullptr;   // (B, H, Lq), contiguous: recomputed entries of each row
  std::int32_t* visible = nullptr;    // (B, Lq, 2), contiguous: how many keys each query sees, and the last one or -1
  std::uint8_t* blocks = nullptr;     // (B, H, Lq, ceil(Lk / kBlockKeys)), contiguous, or null: bits of BlockBit
  const std::uint8_t* mask = nullptr; // (B, Lq, Lk), key stride 1, or null
  const float* sinks = nullptr;       // (H), or null
  std::ptrdiff_t B = 0, H = 0, Hkv = 1, Lq = 0, Lk = 0, D = 0, Dv = 0;
  std::ptrdiff_t mask_batch = 0, mask_row = 0;
  bool causal = false;  // query i sees keys j <= i
  float scaling = 1.0f;
  float softcap = 0.0f;  // 0: none
  RuleWeight weight = RuleWeight::topz;
  double threshold = 0.0;
  bool by_length = false;
  float error_scale = 0.0f;  // from the root of a sum of squares to an expected error
  float score_part = 0.0f, norm_part = 0.0f;  // bridges: factors of y^2 and of ||q||^2 ||k||^2 in that sum
  Accumulation accumulation;
  int threads = 1;

  bool is_bridge() const { return weight == RuleWeight::bridge || weight == RuleWeight::bridge_residual; }
  bool is_running() const { return weight == RuleWeight::running || weight == RuleWeight::running_residual; }
  bool is_residual() const { return weight == RuleWeight::running_residual || weight == RuleWeight::bridge_residual; }
  // Whether the weight needs the sums of squares: float32 sums err by nothing beside quantised operands.
  bool needs_squares() const {
    return is_running() && !(row_error && accumulation.grid.is_float32() && accumulation.fuse.length == 0);
  }
  std::ptrdiff_t row_index(std::ptrdiff_t b, std::ptrdiff_t h, std::ptrdiff_t i) const { return (b * H + h) * Lq + i; }
};

}  // namespace lamp
