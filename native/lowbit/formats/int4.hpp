// Four bits: codes -7 ... 7 plus 8, the two of a pair in one byte, the first one low.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamp {

struct Int4 {
  static constexpr int bits = 4, largest = 7;
  static constexpr std::ptrdiff_t pair_bytes = 16;

  static void put_pair(std::uint8_t* p, std::ptrdiff_t lane, int first, int second) {
    p[lane] = static_cast<std::uint8_t>((first + 8) | (second + 8) << 4);
  }
  static void put(std::uint8_t* p, std::ptrdiff_t lane, std::ptrdiff_t half, int code) {
    const int other = p[lane] & (half ? 0x0f : 0xf0);
    p[lane] = static_cast<std::uint8_t>(other | (code + 8) << 4 * half);
  }
  template <class Simd>
  static auto load(const std::uint8_t* p) {
    return Simd::nibbles_less_8(p);
  }
};

}  // namespace lamp
