// A few worker threads that sleep between calls. The caller says how many threads a call may use.
#pragma once

#include <cstddef>
#include <functional>

namespace lamp {

// Runs body(0) ... body(items - 1), each once, on up to `threads` threads, the caller's among them, and returns when
// all are done. Items are handed out one by one in order. Where the workers are busy with another caller's items, the
// caller runs its own alone. The first exception of a body is thrown again here.
void parallel(int threads, std::ptrdiff_t items, const std::function<void(std::ptrdiff_t)>& body);

}  // namespace lamp
