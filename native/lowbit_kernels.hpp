// The low-bit kernels of one spelling.
#pragma once

#include "drive_decode.hpp"
#include "lowbit_linear.hpp"

namespace LAMP_ISA {

inline lamp::LowBitKernels lowbit_kernels() { return {pack_blocks, pack_lines, lowbit_products}; }

inline lamp::DecodeKernels decode_kernels() { return {append, attend}; }

}  // namespace LAMP_ISA
