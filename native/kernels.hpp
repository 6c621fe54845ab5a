// The table of kernels: one for each instruction set that they are compiled for.
#pragma once

#include "lowbit/spec.hpp"
#include "lowbit/store_spec.hpp"
#include "simulation/spec.hpp"

namespace lamp {

// One compiled spelling of the kernels.
struct Kernels {
  const char* name;
  void (*products)(const Products&);
  void (*recompute)(const Recompute&);
  void (*attention)(const Attention&);
  LowBitKernels lowbit;
  DecodeKernels decode;
};

const Kernels& portable_kernels();
#if defined(LAMP_X86)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_vnni_kernels();
#endif

}  // namespace lamp
