#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace lamp {
namespace {

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<long>(::getpid());
#else
  return 0;
#endif
}

// Decoding makes hundreds of short calls a token, with little between them: waking a thread that sleeps costs more than
// such a call, so threads look for work (and the caller for the end) for so long before they sleep.
constexpr auto kSpin = std::chrono::microseconds(250);

template <class Done>
bool spin_until(Done done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
#if defined(__x86_64__) || defined(_M_X64)
      _mm_pause();
#endif
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

// One call's items, shared by the threads that work on it.
struct Job {
  const std::function<void(std::ptrdiff_t)>& body;
  const std::ptrdiff_t items;
  std::atomic<std::ptrdiff_t> next{0};
  std::exception_ptr error;
  std::mutex error_lock;
  std::atomic<bool> stopped{false};
  const std::thread::id caller = std::this_thread::get_id();

  Job(const std::function<void(std::ptrdiff_t)>& body_, std::ptrdiff_t items_) : body(body_), items(items_) {}
  void work();
  void check() const;
};

// The job that this thread works on.
thread_local const Job* current = nullptr;

std::atomic<void (*)()> interruption{nullptr};
// Asking takes a lock of Python's, so it is done a few times a second, and never in a call that is over sooner.
constexpr auto kBetweenChecks = std::chrono::milliseconds(100);
thread_local std::chrono::steady_clock::time_point last_check{};

// Why an item ends early whose job has failed elsewhere.
struct Stopped {};

void Job::check() const {
  if (stopped.load(std::memory_order_relaxed)) throw Stopped();
  if (std::this_thread::get_id() != caller) return;
  const auto now = std::chrono::steady_clock::now();
  if (now - last_check < kBetweenChecks) return;
  last_check = now;
  if (const auto ask = interruption.load(std::memory_order_relaxed)) ask();
}

void Job::work() {
  const Job* const outer = std::exchange(current, this);
  for (std::ptrdiff_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
    try {
      check();
      body(i);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(error_lock);
      if (!error) error = std::current_exception();
      stopped.store(true, std::memory_order_relaxed);
      next.store(items, std::memory_order_relaxed);
    }
  }
  current = outer;
}

class Pool {
 public:
  bool run(int helpers, Job& job) {
    const std::unique_lock<std::mutex> one_caller(callers_, std::try_to_lock);
    if (!one_caller) return false;
    {
      const std::lock_guard<std::mutex> guard(lock_);
      while (static_cast<int>(workers_.size()) < helpers) {
        const int index = static_cast<int>(workers_.size());
        workers_.emplace_back([this, index, seen = round_.load()] { loop(index, seen); });
      }
      job_ = &job;
      wanted_ = helpers;
      round_.fetch_add(1);
      if (asleep_ > 0) wake_.notify_all();
    }
    job.work();
    {
      // A worker that comes only now has nothing left to do: on a busy machine it may be long in coming.
      const std::lock_guard<std::mutex> guard(lock_);
      job_ = nullptr;
    }
    const auto finished = [this] { return running_.load() == 0; };
    if (spin_until(finished)) return true;
    std::unique_lock<std::mutex> guard(lock_);
    done_.wait(guard, finished);
    return true;
  }

 private:
  void loop(int index, unsigned long seen) {
    for (;;) {
      Job* job;
      const auto called = [&] { return round_.load() != seen; };
      const bool soon = spin_until(called);
      {
        std::unique_lock<std::mutex> guard(lock_);
        if (!soon) {
          ++asleep_;
          wake_.wait(guard, called);
          --asleep_;
        }
        seen = round_.load();
        if (index >= wanted_ || !job_) continue;
        job = job_;
        running_.fetch_add(1);
      }
      job->work();
      const std::lock_guard<std::mutex> guard(lock_);
      if (running_.fetch_sub(1) == 1) done_.notify_one();
    }
  }

  std::mutex callers_, lock_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int wanted_ = 0, asleep_ = 0;
  std::atomic<int> running_{0};
  std::atomic<unsigned long> round_{0};
};

// The pool is never destroyed: its threads sleep between calls until the process ends. A forked child has none of its
// parent's threads, so it starts a pool of its own.
Pool& pool() {
  static std::mutex lock;
  static Pool* current = nullptr;
  static long owner = 0;
  const std::lock_guard<std::mutex> guard(lock);
  if (!current || owner != process_id()) current = new Pool, owner = process_id();
  return *current;
}

}  // namespace

void check_interruption() {
  if (current) current->check();
}

void set_interruption(void (*check)()) { interruption.store(check); }

void parallel(int threads, std::ptrdiff_t items, const std::function<void(std::ptrdiff_t)>& body) {
  Job job(body, items);
  const std::ptrdiff_t helpers = std::min<std::ptrdiff_t>(threads, items) - 1;
  if (helpers < 1 || !pool().run(static_cast<int>(helpers), job)) job.work();
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace lamp
