// How much memory threads keep between calls, and a hint to the system.
//
// Large results are written once, to memory that the system has never touched: most of the time goes into mapping its
// pages one by one. Larger pages cost a fraction of that where the system grants them.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lamp {

// Bytes of a buffer that a thread keeps between calls: what more a call needed is given back at its end.
constexpr std::size_t kKeptBytes = std::size_t{64} << 20;

// Asks for large pages under [start, start + bytes). A hint: nothing depends on it.
inline void prefer_large_pages([[maybe_unused]] void* start, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::size_t kPage = 4096, kWorthwhile = std::size_t{4} << 20;
  if (bytes < kWorthwhile) return;
  const auto first = (reinterpret_cast<std::uintptr_t>(start) + kPage - 1) / kPage * kPage;
  const auto last = (reinterpret_cast<std::uintptr_t>(start) + bytes) / kPage * kPage;
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace lamp
