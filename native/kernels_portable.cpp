// The kernels compiled for portable; the flags are in CMakeLists.txt.
#define LAMP_ISA portable
#include "drive_attention.hpp"
#include "lowbit_kernels.hpp"

namespace lamp {

const Kernels& portable_kernels() {
  static const Kernels kernels{"portable", portable::products, portable::recompute, portable::attention,
                               portable::lowbit_kernels(), portable::decode_kernels()};
  return kernels;
}

}  // namespace lamp
