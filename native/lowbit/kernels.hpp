// The low-bit kernels of one spelling.
#pragma once

#include "lowbit/attend.hpp"
#include "lowbit/head.hpp"
#include "lowbit/layer.hpp"

namespace LAMP_ISA {

inline lamp::LowBitKernels lowbit_kernels() {
  return {pack_blocks, lowbit_products, mlp, head, layer_begin, layer_end, rms_norms};
}

inline lamp::DecodeKernels decode_kernels() { return {append, attend}; }

}  // namespace LAMP_ISA
