// The kernels compiled for portable; the flags are in CMakeLists.txt.
#define LAMP_ISA portable
#include "kernels.hpp"
#include "lowbit/kernels.hpp"
#include "simulation/attention.hpp"

namespace lamp {

const Kernels& portable_kernels() {
  static const Kernels kernels{"portable", portable::products, portable::recompute, portable::attention,
                               portable::lowbit_kernels(), portable::decode_kernels()};
  return kernels;
}

}  // namespace lamp
