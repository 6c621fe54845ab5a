// The pool of threads under many callers at once: every item is done once, by whom it may, and exceptions come back.
#include "pool.hpp"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "tests/selftest.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace {

using selftest::check;

// One call; true if each of its items was done exactly once, its memory visible to the caller.
bool once(int threads, std::ptrdiff_t items) {
  std::vector<int> done(static_cast<std::size_t>(items));
  lamp::parallel(threads, items, [&](std::ptrdiff_t i) { ++done[static_cast<std::size_t>(i)]; });
  for (const int times : done)
    if (times != 1) return false;
  return true;
}

// Items that are themselves calls.
bool nested(int threads) {
  std::atomic<int> right = 0;
  lamp::parallel(threads, 6, [&](std::ptrdiff_t i) { right += once(threads, 3 * i); });
  return right == 6;
}

// The exception of one item reaches the caller, and the pool goes on working.
bool throws(int threads) {
  try {
    lamp::parallel(threads, 50, [](std::ptrdiff_t i) {
      if (i == 17) throw std::runtime_error("17");
    });
  } catch (const std::runtime_error& error) {
    return std::string(error.what()) == "17" && once(threads, 20);
  }
  return false;
}

void test_many_callers() {
  std::atomic<int> wrong = 0;
  std::vector<std::thread> callers;
  for (unsigned seed = 0; seed < 8; ++seed)
    callers.emplace_back([&wrong, seed] {
      std::mt19937 random(seed);
      for (int round = 0; round < 300; ++round) {
        const int threads = static_cast<int>(random() % 6);
        const auto items = static_cast<std::ptrdiff_t>(random() % 40);
        if (!once(threads, items)) ++wrong;
        if (round % 20 == 0 && !nested(threads)) ++wrong;
        if (round % 20 == 10 && !throws(threads)) ++wrong;
        // Callers that come and go find workers asleep, about to sleep and awake.
        if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
      }
    });
  for (std::thread& caller : callers) caller.join();
  check(wrong == 0, "pool under many callers: " + std::to_string(wrong) + " calls went wrong");
}

// Short calls one after another, as in decoding: each must see all that the one before it wrote.
void test_calls_in_a_row() {
  std::vector<long> sums(64);
  constexpr int kCalls = 2000;
  for (int call = 0; call < kCalls; ++call)
    lamp::parallel(2 + call % 3, 64, [&](std::ptrdiff_t i) { sums[static_cast<std::size_t>(i)] += i + call; });
  bool right = true;
  for (long i = 0; i < 64; ++i)
    right = right && sums[static_cast<std::size_t>(i)] == kCalls * i + kCalls * (kCalls - 1L) / 2;
  check(right, "pool in a row of short calls");
}

// One matrix that many threads multiply with, each call on several threads itself.
void test_shared_matrix(const lamp::Kernels& kernels) {
  constexpr std::ptrdiff_t kRowCount = 200, kColumnCount = 96, kGroups = 3;
  std::mt19937 random(7);
  std::normal_distribution<float> gauss;
  std::vector<float> weight(kRowCount * kColumnCount), x(kColumnCount), want(kRowCount);
  for (float& w : weight) w = gauss(random);
  for (float& v : x) v = gauss(random);
  std::vector<std::uint8_t> codes(208 * kColumnCount);
  std::vector<std::uint16_t> scales(208 * kGroups);
  std::vector<float> errors(208);
  lamp::LowBitProducts p;
  p.matrix = {codes.data(), scales.data(), errors.data(), 8, kGroups};
  p.rows = kRowCount;
  p.columns = kColumnCount;
  p.vectors = 1;
  p.x = x.data();
  p.y = want.data();
  kernels.lowbit.pack_blocks(p.matrix, {weight.data(), kRowCount, kColumnCount, kColumnCount}, 3);
  kernels.lowbit.products(p);
  std::atomic<int> wrong = 0;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; ++caller)
    callers.emplace_back([&, caller] {
      std::vector<float> y(kRowCount);
      lamp::LowBitProducts own = p;
      own.y = y.data();
      own.threads = 1 + caller % 4;
      for (int call = 0; call < 100; ++call) {
        std::fill(y.begin(), y.end(), 0.0f);
        kernels.lowbit.products(own);
        if (y != want) ++wrong;
      }
    });
  for (std::thread& caller : callers) caller.join();
  check(wrong == 0, std::string("a matrix shared by threads ") + kernels.name);
}

// A forked child starts a pool of its own. ThreadSanitizer doesn't follow threads that are born after a fork. The fork is
// made by the youngest thread: QEMU's user mode gives a child's new threads the numbers after its own, and aborts where
// one of the parent's had that number.
void test_fork() {
#if (defined(__unix__) || defined(__APPLE__)) && !defined(__SANITIZE_THREAD__)
  int status = 1;
  std::thread([&status] {
    const pid_t child = ::fork();
    if (child == 0) ::_exit(once(3, 50) && throws(2) ? 0 : 1);
    if (child > 0) ::waitpid(child, &status, 0);
  }).join();
  check(status == 0, "pool in a forked child");
  check(once(3, 50), "pool after a fork");
#endif
}

}  // namespace

void selftest::test_pool() {
  test_calls_in_a_row();
  test_many_callers();
  for (const lamp::Kernels* kernels : kernels_here()) test_shared_matrix(*kernels);
  test_fork();
}
