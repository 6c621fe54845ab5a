// The low-bit kernels of one spelling.
#pragma once

#include "lowbit_linear.hpp"

namespace LAMP_ISA {

inline lamp::LowBitKernels lowbit_kernels() { return {pack_blocks, pack_lines, lowbit_products}; }

}  // namespace LAMP_ISA
