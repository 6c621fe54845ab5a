// A few worker threads that sleep between calls. The caller says how many threads a call may use.
#pragma once

#include <cstddef>
#include <functional>

namespace lamp {

// Runs body(0) ... body(items - 1), each once, on up to `threads` threads, the caller's among them, and returns when
// all are done. Items are handed out one by one in order. Where the workers are busy with another caller's items, the
// caller runs its own alone. The first exception of a body is thrown again here.
//
// Between items the caller's thread asks now and then whether the call is interrupted (`set_interruption`).
void parallel(int threads, std::ptrdiff_t items, const std::function<void(std::ptrdiff_t)>& body);

// For long items: asks as `parallel` does between items. An interruption, or the exception of another item, ends the item
// with an exception.
void check_interruption();

// `check` throws if the user wants the running call to end; it is asked on the thread that called `parallel`, a few times
// a second at most. Null: nobody asks.
void set_interruption(void (*check)());

}  // namespace lamp
