// The low-bit kernels compiled for AVX-512 with VNNI, beside avx512's other ones; the flags are in CMakeLists.txt.
#define LAMP_ISA avx512_vnni
#define LAMP_VNNI
#include "kernels.hpp"
#include "lowbit/kernels.hpp"

namespace lamp {

const Kernels& avx512_vnni_kernels() {
  static const Kernels& other = avx512_kernels();
  static const Kernels kernels{"avx512_vnni",   other.products, other.recompute, other.attention,
                               avx512_vnni::lowbit_kernels(), avx512_vnni::decode_kernels()};
  return kernels;
}

}  // namespace lamp
