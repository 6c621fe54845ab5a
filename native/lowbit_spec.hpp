// What the low-bit kernels are told. docs/decoding.md states the layouts and formulas; the torch twins are in
// src/torchlamp/kernels/twins_lowbit.py and hold the same layouts, byte for byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamp {

constexpr int kPackRows = 16;   // rows of a block
constexpr int kPackGroup = 32;  // columns that share a scale

// Bits of a code (4, 8 or 12) and what follows from them.
constexpr int largest_code(int bits) { return bits == 4 ? 7 : bits == 8 ? 127 : 2047; }
// Bytes of a pair of columns of a block of rows: 12 bits are 32 bytes of high and 16 bytes of low parts.
constexpr std::ptrdiff_t pair_bytes(int bits) { return bits == 4 ? 16 : bits == 8 ? 32 : 48; }
// Bytes of a group of columns of one row, for rows that aren't in blocks (4 or 8 bits).
constexpr std::ptrdiff_t group_bytes(int bits) { return bits == 4 ? 16 : 32; }

// A full-precision matrix, row after row: float32, float16, or 16-bit integers with a bfloat16 scale for each group of
// columns, [row][group]. The integers take float16's memory, keep any magnitude, and are ten times as accurate.
struct Full {
  const void* data = nullptr;
  bool half = false;
  std::ptrdiff_t row = 0;  // elements from a row to the next
  const std::uint16_t* scales = nullptr;  // of integers; null for floats
};

// A low-bit copy in blocks: codes [block][pair of columns][row of the block] (see pair_bytes), scales as bfloat16
// [block][group][row of the block], error[row] = 2-norm of (row - its copy), an upper bound to 1e-6.
struct Blocks {
  std::uint8_t* codes = nullptr;
  std::uint16_t* scales = nullptr;
  float* errors = nullptr;
  int bits = 8;
  std::ptrdiff_t groups = 0;  // ceil(columns / kPackGroup)

  std::ptrdiff_t block_codes() const { return groups * (kPackGroup / 2) * pair_bytes(bits); }
  std::ptrdiff_t block_scales() const { return groups * kPackRows; }
};

// A low-bit copy row after row (4 or 8 bits): codes [row][group][bytes], scales [row][group].
struct Lines {
  std::uint8_t* codes = nullptr;
  std::uint16_t* scales = nullptr;
  int bits = 8;
  std::ptrdiff_t groups = 0;
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

struct LowBitKernels {
  void (*pack_blocks)(const Blocks&, const Rows&, int threads);
  void (*pack_lines)(const Lines&, const Rows&, int threads);
  void (*products)(const LowBitProducts&);
};

}  // namespace lamp
