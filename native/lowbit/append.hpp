// New keys and values go into a store: their full-precision copy, and the low-bit one made of it at once.
#pragma once

#include <atomic>

#include "lowbit/products.hpp"
#include "pool.hpp"

namespace LAMP_ISA {

// x <- H x / sqrt(size), H the Hadamard matrix; size is a power of two. Its own inverse.
inline void rotate(float* x, std::ptrdiff_t size) {
  for (std::ptrdiff_t half = 1; half < size; half *= 2)
    for (std::ptrdiff_t start = 0; start < size; start += 2 * half)
      for (std::ptrdiff_t i = start; i < start + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
  const float norm = 1.0f / std::sqrt(static_cast<float>(size));
  for (std::ptrdiff_t i = 0; i < size; ++i) x[i] *= norm;
}

// float32 to float16, to nearest, ties to even.
inline std::uint16_t to_f16(float x) {
  const std::uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u;
  const float a = std::fabs(x);
  if (!(a <= std::numeric_limits<float>::max())) {
    return static_cast<std::uint16_t>(sign | (a == a ? 0x7c00u : 0x7e00u));
  }
  if (a >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (a < 0x1p-14f) {  // adding 2^-1 rounds to multiples of 2^-24, the spacing of subnormal numbers
    return static_cast<std::uint16_t>(sign | (float_bits(a + 0.5f) - float_bits(0.5f)));
  }
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<std::uint16_t>(sign | (rounded - (112u << 23)) >> 13);
}

// Row `row` of a full copy <- x; whether a finite number became infinite, and whether one was not finite.
struct Kept {
  bool overflow = false, nonfinite = false;
};
inline Kept keep_full(const lamp::Full& full, std::ptrdiff_t row, const float* x, std::ptrdiff_t columns) {
  // The store owns its arrays; kernels that read see them as constant.
  void* to = const_cast<void*>(full.data);
  float sum = 0.0f;
  for (std::ptrdiff_t i = 0; i < columns; ++i) sum += x[i] * 0.0f;
  Kept kept{false, sum != sum};  // 0 * x is NaN for an infinite x and for NaN
  if (full.type == lamp::FullType::float16) {
    for (std::ptrdiff_t i = 0; i < columns; ++i) {
      static_cast<std::uint16_t*>(to)[row * full.row + i] = to_f16(x[i]);
      kept.overflow |= std::fabs(x[i]) >= 65520.0f && std::fabs(x[i]) <= std::numeric_limits<float>::max();
    }
  } else {
    std::copy_n(x, columns, static_cast<float*>(to) + row * full.row);
  }
  return kept;
}

inline void append(lamp::Append& p) {
  const lamp::KeyValues& s = p.store;
  if (p.count == 0) return;
  // Positions of a block share cache lines, so an item is whole blocks.
  constexpr std::ptrdiff_t kTogether = 64;
  const std::ptrdiff_t origin = p.start / kTogether, end = p.start + p.count;
  const std::ptrdiff_t chunks = (end + kTogether - 1) / kTogether - origin;
  std::atomic<int> flags{0};
  lamp::parallel(p.count >= kTogether ? p.threads : 1, s.batches * s.heads * chunks, [&](std::ptrdiff_t item) {
    const std::ptrdiff_t head = item / chunks, from = (origin + item % chunks) * kTogether;
    const float* k = p.k + head / s.heads * p.k_batch + head % s.heads * p.k_head;
    const float* v = p.v + head / s.heads * p.v_batch + head % s.heads * p.v_head;
    const lamp::Blocks keys = s.keys_of(head);
    const lamp::RowPairs values = s.values_of(head);
    const lamp::Full full_keys = s.full_keys_of(head), full_values = s.full_values_of(head);
    const float* mean = s.mean_of(head);
    thread_local std::vector<float> buffer;
    buffer.resize(static_cast<std::size_t>(s.size));
    float* x = buffer.data();
    for (std::ptrdiff_t at = std::max(from, p.start); at < std::min(from + kTogether, end); ++at) {
      const float *key = k + (at - p.start) * p.k_row, *value = v + (at - p.start) * p.v_row;
      for (std::ptrdiff_t i = 0; i < s.size; ++i) x[i] = mean ? key[i] - mean[i] : key[i];
      const Kept a = keep_full(full_keys, at, key, s.size);
      const Kept b = keep_full(full_values, at, value, s.value_size);
      if (s.rotated) rotate(x, s.size);
      pack_block_row(keys, at, x, s.size);
      // What can't be represented is never trusted: see lowbit/attend.hpp.
      if (!(keys.errors[at] <= std::numeric_limits<float>::max()))
        keys.errors[at] = std::numeric_limits<float>::quiet_NaN();
      pack_pair_row(values, at, value, s.value_size);
      if (a.overflow || b.overflow) flags.fetch_or(lamp::append_overflow, std::memory_order_relaxed);
      if (b.nonfinite) flags.fetch_or(lamp::append_nonfinite_values, std::memory_order_relaxed);
    }
  });
  p.flags = flags;
}

}  // namespace LAMP_ISA
