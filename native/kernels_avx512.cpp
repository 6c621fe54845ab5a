// The kernels compiled for avx512; the flags are in CMakeLists.txt.
#define LAMP_ISA avx512
#include "kernels.hpp"
#include "lowbit/kernels.hpp"
#include "simulation/attention.hpp"

namespace lamp {

const Kernels& avx512_kernels() {
  static const Kernels kernels{"avx512", avx512::products, avx512::recompute, avx512::attention,
                               avx512::lowbit_kernels(), avx512::decode_kernels()};
  return kernels;
}

}  // namespace lamp
