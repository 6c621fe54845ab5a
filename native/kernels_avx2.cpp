// The kernels compiled for avx2; the flags are in CMakeLists.txt.
#define LAMP_ISA avx2
#include "kernels.hpp"
#include "lowbit/kernels.hpp"
#include "simulation/attention.hpp"

namespace lamp {

const Kernels& avx2_kernels() {
  static const Kernels kernels{"avx2", avx2::products, avx2::recompute, avx2::attention,
                               avx2::lowbit_kernels(), avx2::decode_kernels()};
  return kernels;
}

}  // namespace lamp
