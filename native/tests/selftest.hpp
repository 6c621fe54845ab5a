// What the parts of the self-test share.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "processor.hpp"

namespace selftest {

inline int passed = 0, failed = 0;

inline void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok) std::printf("FAILED: %s\n", what.c_str());
}

inline bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

// Every spelling of the kernels that this processor runs.
inline std::vector<const lamp::Kernels*> kernels_here() {
  std::vector<const lamp::Kernels*> all;
  for (const char* name : {"portable", "avx2", "avx512", "avx512_vnni"})
    if (lamp::supports(name)) all.push_back(&lamp::kernels(name));
  return all;
}

void test_lowbit(const lamp::Kernels& kernels, std::mt19937& random);
void test_pool();

}  // namespace selftest
