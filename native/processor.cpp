// Asked of the processor itself: compilers differ in the names that their own questions take, and MSVC has none.
#include "processor.hpp"

#include <stdexcept>

#if defined(LAMP_X86) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#elif defined(LAMP_X86)
#include <cpuid.h>
#endif

namespace lamp {
namespace {

#if defined(LAMP_X86)
// What `cpuid` answers; zeros where the processor doesn't know the question.
struct Answer {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Answer ask(unsigned leaf) {
  Answer answer;
#if defined(_MSC_VER)
  int registers[4];
  __cpuid(registers, 0);
  if (static_cast<unsigned>(registers[0]) < leaf) return answer;
  __cpuidex(registers, static_cast<int>(leaf), 0);
  answer = {static_cast<unsigned>(registers[0]), static_cast<unsigned>(registers[1]),
            static_cast<unsigned>(registers[2]), static_cast<unsigned>(registers[3])};
#else
  __get_cpuid_count(leaf, 0, &answer.eax, &answer.ebx, &answer.ecx, &answer.edx);
#endif
  return answer;
}

// The register sets that the system saves between threads.
unsigned saved_registers() {
#if defined(_MSC_VER)
  return static_cast<unsigned>(_xgetbv(0));
#else
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
#endif
}

constexpr bool has(unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; }
constexpr unsigned bit(int n) { return 1u << n; }

struct Processor {
  bool avx2 = false, avx512 = false, vnni = false;

  Processor() {
    // Intel, Software Developer's Manual, volume 2, CPUID: leaf 1 ECX has FMA, OSXSAVE, AVX, F16C; leaf 7 EBX has AVX2,
    // AVX512F, DQ, BW, VL; leaf 7 ECX has AVX512_VNNI.
    const Answer basic = ask(1), extended = ask(7);
    if (!has(basic.ecx, bit(27))) return;
    const unsigned saved = saved_registers();
    avx2 = has(basic.ecx, bit(12) | bit(28) | bit(29)) && has(extended.ebx, bit(5)) && has(saved, bit(1) | bit(2));
    avx512 = avx2 && has(extended.ebx, bit(16) | bit(17) | bit(30) | bit(31)) && has(saved, bit(5) | bit(6) | bit(7));
    vnni = avx512 && has(extended.ecx, bit(11));
  }
};
#endif

}  // namespace

bool supports(const std::string& isa) {
#if defined(LAMP_X86)
  static const Processor here;
  if (isa == "avx2") return here.avx2;
  if (isa == "avx512") return here.avx512;
  if (isa == "avx512_vnni") return here.vnni;
#endif
  return isa == "portable";
}

const Kernels& kernels(const std::string& isa) {
  if (!supports(isa)) throw std::invalid_argument("this machine cannot run the '" + isa + "' kernels");
#if defined(LAMP_X86)
  if (isa == "avx512_vnni") return avx512_vnni_kernels();
  if (isa == "avx512") return avx512_kernels();
  if (isa == "avx2") return avx2_kernels();
#endif
  return portable_kernels();
}

}  // namespace lamp
