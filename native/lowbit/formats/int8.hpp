// Eight bits: codes -127 ... 127, the two of a pair in neighbouring bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamp {

struct Int8 {
  static constexpr int bits = 8, largest = 127;
  static constexpr std::ptrdiff_t pair_bytes = 32;

  static void put_pair(std::uint8_t* p, std::ptrdiff_t lane, int first, int second) {
    p[2 * lane] = static_cast<std::uint8_t>(first);
    p[2 * lane + 1] = static_cast<std::uint8_t>(second);
  }
  static void put(std::uint8_t* p, std::ptrdiff_t lane, std::ptrdiff_t half, int code) {
    p[2 * lane + half] = static_cast<std::uint8_t>(code);
  }
  template <class Simd>
  static auto load(const std::uint8_t* p) {
    return Simd::signed_bytes(p);
  }
};

}  // namespace lamp
