// What compilers spell differently: GCC and Clang, and MSVC. Included by simd/vector.hpp.
#pragma once

#if defined(_MSC_VER) && !defined(__clang__)
#define LAMP_MSVC 1
#include <intrin.h>
#else
#define LAMP_MSVC 0
#endif

#if LAMP_MSVC
#define LAMP_NOINLINE __declspec(noinline)
#define LAMP_INLINE __forceinline
// MSVC has no such word for a lambda; its optimiser decides.
#define LAMP_INLINE_LAMBDA
#else
#define LAMP_NOINLINE [[gnu::noinline]]
#define LAMP_INLINE [[gnu::always_inline]] inline
// Stands between the parameters of a lambda and its body.
#define LAMP_INLINE_LAMBDA __attribute__((always_inline))
#endif

namespace LAMP_ISA {

// Asks for the cache line of this address. A hint: an address that isn't there does no harm.
inline void prefetch(const void* p) {
#if LAMP_MSVC && defined(_M_X64)
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
#elif LAMP_MSVC
  __prefetch(p);
#else
  __builtin_prefetch(p);
#endif
}

}  // namespace LAMP_ISA
