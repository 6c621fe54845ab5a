// What the parts of the self-test share.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels.hpp"

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
  std::vector<const lamp::Kernels*> all{&lamp::portable_kernels()};
#if defined(LAMP_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    all.push_back(&lamp::avx2_kernels());
  if (all.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    all.push_back(&lamp::avx512_kernels());
  if (all.size() == 3 && __builtin_cpu_supports("avx512vnni")) all.push_back(&lamp::avx512_vnni_kernels());
#endif
  return all;
}

void test_lowbit(const lamp::Kernels& kernels, std::mt19937& random);
void test_pool();

}  // namespace selftest
