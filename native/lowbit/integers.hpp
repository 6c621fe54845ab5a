// Integer vectors of the low-bit kernels: sixteen rows times a pair of columns at once, and rows of codes as floats.
//
// A block holds sixteen rows with their columns in pairs, [pair][row][2], so that one multiply-add of 16-bit integers
// gives every row the sum of a pair's two products in a 32-bit lane of its own: no sum across lanes is ever needed, and
// results of sixteen rows leave as one vector. The vectors of each instruction set are in simd.
#pragma once

#include "lowbit/spec.hpp"
#include "simd/vector.hpp"

namespace LAMP_ISA {

constexpr int kRows = lamp::kPackRows;      // rows of a block
constexpr int kGroup = lamp::kPackGroup;    // columns that share a scale
static_assert(kRows == kSumLanes);          // a vrows holds a number for every row of a block

inline vrows rows_load(const float* p) {
  vrows r;
  for (int i = 0; i < kRowVectors; ++i) r.v[i] = load(p + i * vf::width);
  return r;
}
inline void rows_store(float* p, const vrows& x) {
  for (int i = 0; i < kRowVectors; ++i) store(p + i * vf::width, x.v[i]);
}

// The operations that formats load with.
struct Integers {
  static vpairs signed_bytes(const std::uint8_t* p) { return LAMP_ISA::signed_bytes(p); }
  static vpairs nibbles(const std::uint8_t* p) { return LAMP_ISA::nibbles(p); }
  static vpairs nibbles_less_8(const std::uint8_t* p) { return LAMP_ISA::nibbles_less_8(p); }
  static vpairs join(const vpairs& high, const vpairs& low) { return LAMP_ISA::join(high, low); }
};

inline vf widen(const float* p) { return load(p); }
inline float widen_one(const float* p) { return *p; }
inline float widen_one(const std::uint16_t* p) { return from_f16(*p); }
inline vf widen(const lamp::BFloat16* p) { return widen_bf16(&p->pattern); }
inline float widen_one(const lamp::BFloat16* p) { return from_bf16(p->pattern); }

}  // namespace LAMP_ISA
