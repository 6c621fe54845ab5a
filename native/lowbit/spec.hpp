// What the low-bit kernels are told. docs/decoding.md states the layouts and formulas; the torch references are in
// src/torchlamp/kernels/reference_lowbit.py and hold the same layouts, byte for byte.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lowbit/formats.hpp"

namespace lamp {

constexpr int kPackRows = 16;   // rows of a block
constexpr int kPackGroup = 32;  // columns that share a scale
constexpr int kLargestShort = 32767;  // largest of the 16-bit integers that vectors are rounded to

enum class FullType : int { float32, float16, bfloat16 };

// The pattern of a bfloat16 number; that of a float16 number is a plain std::uint16_t.
struct BFloat16 {
  std::uint16_t pattern;
};

// A full-precision matrix, row after row.
struct Full {
  const void* data = nullptr;
  FullType type = FullType::float32;
  std::ptrdiff_t row = 0;  // elements from a row to the next

  std::ptrdiff_t bytes() const { return type == FullType::float32 ? 4 : 2; }  // of an element

  // What `f(pointer to the first number of a row)` gives, for a pointer of the matrix's type.
  template <class F>
  auto with_row(std::ptrdiff_t r, const F& f) const {
    if (type == FullType::float16) return f(static_cast<const std::uint16_t*>(data) + r * row);
    if (type == FullType::bfloat16) return f(static_cast<const BFloat16*>(data) + r * row);
    return f(static_cast<const float*>(data) + r * row);
  }
};

// A low-bit copy in blocks: codes [block][pair of columns][row of the block], scales as bfloat16
// [block][group][row of the block], error[row] = 2-norm of (row - its copy), an upper bound to 1e-6.
struct Blocks {
  std::uint8_t* codes = nullptr;
  std::uint16_t* scales = nullptr;
  float* errors = nullptr;
  int bits = 8;
  std::ptrdiff_t groups = 0;  // ceil(columns / kPackGroup)

  std::ptrdiff_t block_codes() const { return groups * (kPackGroup / 2) * BlockFormats::pair_bytes(bits); }
  std::ptrdiff_t block_scales() const { return groups * kPackRows; }
};

// A low-bit copy whose rows lie two by two, to be summed with weights: codes [pair of rows][column][row of the pair],
// sixteen columns after the other; scales [block of rows][group][row of the block]. There are whole blocks of rows.
struct RowPairs {
  std::uint8_t* codes = nullptr;
  std::uint16_t* scales = nullptr;
  int bits = 8;
  std::ptrdiff_t groups = 0;

  // Bytes of a group of columns of two rows, and of all columns.
  std::ptrdiff_t group_codes() const { return kPackGroup / kPackRows * RowPairFormats::pair_bytes(bits); }
  std::ptrdiff_t pair_codes() const { return groups * group_codes(); }
  std::ptrdiff_t block_scales() const { return groups * kPackRows; }
};

// Rows of float32 numbers, `columns` contiguous each, to be quantised.
struct Rows {
  const float* data = nullptr;
  std::ptrdiff_t count = 0, columns = 0, row = 0;

  // Rows without columns have no memory, hence no address to step from.
  const float* at(std::ptrdiff_t r) const { return columns ? data + r * row : data; }
};

// y[v] = low-bit matrix * x[v]; x (vectors, columns) and y (vectors, rows) contiguous.
struct LowBitProducts {
  Blocks matrix;
  std::ptrdiff_t rows = 0, columns = 0, vectors = 0;
  const float* x = nullptr;
  float* y = nullptr;
  int threads = 1;
};

enum class Activation : int { silu, gelu_tanh };

// y[v] = down * (phi(gate x[v]) o (up x[v])), look-ahead through the activation and the down projection. Neuron j owns
// row j of gate and up and column j of down, whose full-precision copy is transposed.
struct LowBitMlp {
  Blocks gate, up, down;
  Full gate_full, up_full, down_full;
  const float* down_norms = nullptr;   // 2-norm of down's column j
  const float* down_errors = nullptr;  // 2-norm of what its low-bit copy leaves out
  std::ptrdiff_t neurons = 0, columns = 0, outputs = 0, vectors = 0;
  Activation activation = Activation::silu;
  float up_threshold = 0.0f, down_threshold = 0.0f;  // relative to the output's norm; below 0: all, infinite: none
  const float* x = nullptr;
  float* y = nullptr;
  std::int64_t* selected = nullptr;  // 2: neurons recomputed, columns of down read in full precision
  int threads = 1;
};

// logits[v] = head * x[v]: low-bit ones, and full-precision ones for every token that could be among the `top` largest
// and for every token whose weight under the softmax exceeds the threshold.
struct LowBitHead {
  Blocks head;
  Full full;
  std::ptrdiff_t tokens = 0, columns = 0, vectors = 0, top = 1;
  float largest_norm = 0.0f;   // largest 2-norm of a row
  float largest_error = 0.0f;  // largest of head.errors
  float threshold = 0.0f;     // of 2 z (1 - z) r; below 0: all, infinite: none
  const float* x = nullptr;
  float* logits = nullptr;
  std::int64_t* selected = nullptr;  // 2: recomputed for the top, recomputed in all
  int threads = 1;
};

// RMSNorm: x / sqrt(mean x^2 + eps) * weight; weight null: no norm here.
struct RmsNorm {
  const float* weight = nullptr;
  float eps = 0.0f;
};

// A decoder layer but for its attention, some tokens of each sequence: begin gives queries, keys and values, rotated to
// their positions; end takes the attention's output to the layer's. Norms behind the sublayers are optional, as are
// norms of queries and keys and biases.
struct LowBitLayer {
  RmsNorm attention_norm, after_attention, mlp_norm, after_mlp, query_norm, key_norm;
  Blocks qkv, out;
  const float* qkv_bias = nullptr;
  const float* out_bias = nullptr;
  std::ptrdiff_t hidden = 0, heads = 0, kv_heads = 0, head_size = 0;
  LowBitMlp mlp;  // thresholds included
  // The call: tokens are those of the first sequence, then of the next. x (tokens, hidden); cosines and sines (angles,
  // head_size), token t having row t % angles; q (tokens, heads, head_size), k and v (tokens, kv_heads, head_size);
  // attended (tokens, heads * head_size); y (tokens, hidden).
  const float* x = nullptr;
  std::ptrdiff_t tokens = 0, angles = 1;
  const float* cosines = nullptr;
  const float* sines = nullptr;
  float* q = nullptr;
  float* k = nullptr;
  float* v = nullptr;
  const float* attended = nullptr;
  float* y = nullptr;
  int threads = 1;
};

struct LowBitKernels {
  void (*pack_blocks)(const Blocks&, const Rows&, int threads);
  void (*products)(const LowBitProducts&);
  void (*mlp)(const LowBitMlp&);
  void (*head)(const LowBitHead&);
  void (*layer_begin)(const LowBitLayer&);
  void (*layer_end)(const LowBitLayer&);
  // x and out (rows, size), row by row; they may be the same.
  void (*rms_norm)(const RmsNorm&, const float* x, std::ptrdiff_t rows, std::ptrdiff_t size, float* out);
};

}  // namespace lamp
