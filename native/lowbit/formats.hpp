// The low-bit formats. Each is a file and a struct, in a list here:
//   bits, largest: bits of a code, and the largest one; codes are symmetric to zero.
//   pair_bytes: bytes of a pair of codes for each of sixteen lanes.
//   put_pair(p, lane, first, second): the pair of one lane into those bytes.
//   put(p, lane, half, code): one code of it, the other one stays; for formats that lie in pairs of rows.
//   load<Simd>(p): all of it as sixteen pairs of 16-bit integers, from the operations of simd/*.hpp.
// In blocks, a lane is a row and the pair are two columns; in pairs of rows, a lane is a column and the pair two rows.
#pragma once

#include "lowbit/formats/int12.hpp"
#include "lowbit/formats/int4.hpp"
#include "lowbit/formats/int8.hpp"

namespace lamp {

template <class... Formats>
struct FormatList {
  static constexpr bool has(int bits) { return ((Formats::bits == bits) || ...); }

  // f.operator()<Format>() for the format of so many bits, which must be in the list.
  template <class F>
  static constexpr void with(int bits, F&& f) {
    (void)((Formats::bits == bits && (f.template operator()<Formats>(), true)) || ...);
  }
  static constexpr int largest(int bits) {
    int found = 0;
    with(bits, [&]<class Format>() { found = Format::largest; });
    return found;
  }
  static constexpr std::ptrdiff_t pair_bytes(int bits) {
    std::ptrdiff_t found = 0;
    with(bits, [&]<class Format>() { found = Format::pair_bytes; });
    return found;
  }
};

using BlockFormats = FormatList<Int4, Int8, Int12>;
// Weighted sums of many rows of 12-bit codes wouldn't fit 32 bits.
using RowPairFormats = FormatList<Int4, Int8>;

}  // namespace lamp
