// As many entries of a row as a rule would recompute, drawn without looking at them (torchlamp.rules.RandomLike).
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "simd/vector.hpp"

namespace LAMP_ISA {

// Draws with their keys, in an order that is that of the draws first and of the keys second.
class Drawn {
 public:
  // The `count` visible keys with the lowest draws, equal draws in the order of their keys, into `chosen`, in any order.
  // Of the keys 0 ... width `visible` says which are seen, `seen` of them.
  void lowest(const float* draws, const std::uint8_t* visible, std::ptrdiff_t width, std::ptrdiff_t seen,
              std::ptrdiff_t count, std::ptrdiff_t* chosen) {
    if (count == 0) return;
    // Few of a row are looked at: those below a level under which a row of n draws almost surely has its `count` lowest
    // (the mean and six deviations of a Poisson count, and a little for the smallest). Where it has not, all are.
    const double mean = static_cast<double>(count);
    candidates(draws, visible, width, static_cast<float>((mean + 6.0 * std::sqrt(mean) + 8.0) / static_cast<double>(seen)));
    if (found_.size() < static_cast<std::size_t>(count))
      candidates(draws, visible, width, std::numeric_limits<float>::quiet_NaN());
    std::nth_element(found_.begin(), found_.begin() + (count - 1), found_.end());
    for (std::ptrdiff_t c = 0; c < count; ++c)
      chosen[c] = static_cast<std::ptrdiff_t>(found_[static_cast<std::size_t>(c)] & 0xffffffffu);
  }

 private:
  // Visible keys whose draw is not at or above the level; a level that is NaN leaves none out.
  void candidates(const float* draws, const std::uint8_t* visible, std::ptrdiff_t width, float level) {
    found_.clear();
    for (std::ptrdiff_t j = 0; j < width; ++j)
      if (visible[j] && !(draws[j] >= level))  // numbers that aren't negative are in the order of their bits
        found_.push_back(std::uint64_t{std::bit_cast<std::uint32_t>(draws[j])} << 32 | static_cast<std::uint64_t>(j));
  }

  std::vector<std::uint64_t> found_;
};

}  // namespace LAMP_ISA
