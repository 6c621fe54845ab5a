// Twelve bits: codes -2047 ... 2047; their high eight bits as 32 bytes, and behind those their low four bits as 16.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamp {

struct Int12 {
  static constexpr int bits = 12, largest = 2047;
  static constexpr std::ptrdiff_t pair_bytes = 48;

  static void put_pair(std::uint8_t* p, std::ptrdiff_t lane, int first, int second) {
    p[2 * lane] = static_cast<std::uint8_t>(first >> 4);
    p[2 * lane + 1] = static_cast<std::uint8_t>(second >> 4);
    p[32 + lane] = static_cast<std::uint8_t>((first & 15) | (second & 15) << 4);
  }
  template <class Simd>
  static auto load(const std::uint8_t* p) {
    return Simd::join(Simd::signed_bytes(p), Simd::nibbles(p + 32));
  }
};

}  // namespace lamp
