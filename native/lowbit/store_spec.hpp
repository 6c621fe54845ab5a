// What the decoding kernels are told: a key-value store with a low-bit and a full-precision copy of everything, keys
// and values to append to it, and queries that attend to it. The torch references are in
// src/torchlamp/kernels/reference_decoding.py; docs/decoding.md derives the rules.
#pragma once

#include <algorithm>

#include "lowbit/spec.hpp"

namespace lamp {

// Everything is contiguous, one key head after the other: `capacity` positions each, a multiple of kPackRows.
// Low-bit keys are of (k - mean), rotated by a normalised Hadamard matrix where `rotated`.
struct KeyValues {
  Blocks keys;         // of the first key head
  RowPairs values;     // likewise
  Full full_keys, full_values;
  const float* mean = nullptr;  // (batches * heads, size), or null: nothing is subtracted
  bool rotated = false;
  std::ptrdiff_t batches = 0, heads = 0, capacity = 0, size = 0, value_size = 0;

  Blocks keys_of(std::ptrdiff_t head) const {
    Blocks b = keys;
    const std::ptrdiff_t block = head * (capacity / kPackRows);
    b.codes += block * b.block_codes();
    b.scales += block * b.block_scales();
    b.errors += head * capacity;
    return b;
  }
  RowPairs values_of(std::ptrdiff_t head) const {
    RowPairs p = values;
    p.codes += head * (capacity / 2) * p.pair_codes();
    p.scales += head * (capacity / kPackRows) * p.block_scales();
    return p;
  }
  Full full_keys_of(std::ptrdiff_t head) const { return at(full_keys, head * capacity); }
  Full full_values_of(std::ptrdiff_t head) const { return at(full_values, head * capacity); }
  const float* mean_of(std::ptrdiff_t head) const { return mean ? mean + head * size : nullptr; }

 private:
  static Full at(const Full& full, std::ptrdiff_t row) {
    Full f = full;
    f.data = static_cast<const char*>(full.data) + row * full.row * full.bytes();
    return f;
  }
};

// What is found in numbers that are appended.
enum AppendFlag : int {
  append_overflow = 1,          // a finite number is too large for float16
  append_nonfinite_values = 2,  // a value is infinite or NaN
};

// New keys and values, (batch, head, position, element) with contiguous elements, for positions start, start + 1, ...
struct Append {
  KeyValues store;
  const float *k = nullptr, *v = nullptr;
  std::ptrdiff_t k_batch = 0, k_head = 0, k_row = 0, v_batch = 0, v_head = 0, v_row = 0;
  std::ptrdiff_t start = 0, count = 0;
  int threads = 1;
  int flags = 0;  // out: bits of AppendFlag
};

// Queries (batch, head, query, element) that attend to positions [first, last); output (batch, query, head, element).
struct Attend {
  KeyValues store;
  std::ptrdiff_t first = 0, last = 0;
  const float* q = nullptr;
  std::ptrdiff_t q_batch = 0, q_head = 0, q_row = 0;
  std::ptrdiff_t heads = 0, queries = 0;
  float* out = nullptr;
  const std::uint8_t* mask = nullptr;  // (batch, query, last - first), 1 = visible
  std::ptrdiff_t mask_batch = 0, mask_row = 0;
  bool causal = false;           // query i of n sees positions before last - n + i + 1
  const float* sinks = nullptr;  // (heads): a logit that enters the normaliser but has no value
  float scaling = 1.0f, softcap = 0.0f;
  float scores_threshold = 0.0f;  // of 2 z (1 - z) s r; negative: recompute everything, infinite: nothing
  float values_threshold = 0.0f;  // of z; negative: read everything in full, infinite: nothing
  bool nonfinite_values = false;  // values may be infinite or not a number: read every one of them in full
  std::int32_t* recomputed = nullptr;  // (batch, head, query): scores
  std::int32_t* full_rows = nullptr;   // (batch, key head, query): values, each for all heads of its group
  std::int32_t* visible = nullptr;     // (batch, query): keys
  int threads = 1;
};

// If recomputation raises a logit by more than kSurprise above the row's largest low-bit logit, or leaves less than
// kVanished of the sum that probabilities were made with, the row starts again in full precision.
constexpr float kSurprise = 8.0f;
constexpr float kVanished = 0.125f;
// Low-bit values with z <= kSkip / (keys that the row sees) are left out: together less than kSkip of the weights, and
// 8-bit copies alone err by more.
constexpr float kSkip = 0x1p-8f;

struct DecodeKernels {
  void (*append)(Append&);
  void (*attend)(const Attend&);
};

}  // namespace lamp
