#include "support/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace onerec {
namespace {

constexpr int kSpins = 2000;  // about 50 us of polling before a worker parks

inline void Pause() {
#ifdef ONEREC_X86
  __builtin_ia32_pause();
#endif
}

// Workers live as long as the process. A job is open from the caller's first chunk until all are
// handed out; who wakes up later passes it by, so the caller waits only for those that joined it.
class Pool {
 public:
  void Run(int64_t chunks, int num_threads, void (*body)(void*, int64_t), void* context) {
    // A call that needs no helper, every nested one among them, leaves the lock to others.
    std::unique_lock lock(owner_, std::defer_lock);
    if (num_threads <= 1 || chunks <= 1 || !lock.try_lock()) {
      for (int64_t c = 0; c < chunks; ++c) body(context, c);
      return;
    }
    const int helpers = static_cast<int>(std::min<int64_t>(num_threads, chunks)) - 1;
    while (static_cast<int>(workers_.size()) < helpers) {
      const int id = static_cast<int>(workers_.size());
      workers_.emplace_back([this, id] { Work(id); });
      workers_.back().detach();
    }
    body_ = body;
    context_ = context;
    chunks_ = chunks;
    helpers_ = helpers;
    next_.store(0, std::memory_order_relaxed);
    failure_ = nullptr;
    state_.fetch_add(kJob, std::memory_order_release);  // opens
    state_.notify_all();
    Drain();
    state_.fetch_add(kJob, std::memory_order_relaxed);  // closes
    for (int spin = 0;; ++spin) {
      const uint64_t state = state_.load(std::memory_order_acquire);
      if (Joined(state) == 0) break;
      if (spin < kSpins) {
        Pause();
      } else {
        state_.wait(state, std::memory_order_acquire);
      }
    }
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  // Upper half: jobs opened and closed so far, odd while one is open. Lower half: workers in it.
  static constexpr uint64_t kJob = uint64_t{1} << 32;
  static uint64_t Job(uint64_t state) { return state >> 32; }
  static uint32_t Joined(uint64_t state) { return static_cast<uint32_t>(state); }

  void Drain() {
    for (;;) {
      const int64_t chunk = next_.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= chunks_) return;
      try {
        body_(context_, chunk);
      } catch (...) {
        const std::lock_guard guard(failure_mutex_);
        if (!failure_) failure_ = std::current_exception();
        next_.store(chunks_, std::memory_order_relaxed);
      }
    }
  }

  void Work(int id) {
    uint64_t seen = 0;  // the last job that this worker joined
    for (;;) {
      uint64_t state = state_.load(std::memory_order_relaxed);
      for (int spin = 0; Job(state) % 2 == 0 || Job(state) == seen; ++spin) {
        if (spin < kSpins) {
          Pause();
        } else {
          state_.wait(state, std::memory_order_relaxed);
        }
        state = state_.load(std::memory_order_relaxed);
      }
      if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) continue;
      seen = Job(state);
      if (id < helpers_) Drain();
      const uint64_t left = state_.fetch_sub(1, std::memory_order_release) - 1;
      if (Joined(left) == 0 && Job(left) % 2 == 0) state_.notify_all();
    }
  }

  std::mutex owner_;
  std::vector<std::thread> workers_;
  std::atomic<uint64_t> state_{0};
  std::atomic<int64_t> next_{0};
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t chunks_ = 0;
  int helpers_ = 0;
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
};

// A forked child has none of its parent's threads, so it starts with a new pool; the old one is
// left behind on purpose, as its threads and locks cannot be destroyed there.
std::atomic<Pool*>& PoolSlot() {
  static std::atomic<Pool*> slot = [] {
    pthread_atfork(nullptr, nullptr, [] { PoolSlot().store(new Pool); });
    return new Pool;
  }();
  return slot;
}

thread_local bool inside_body = false;

}  // namespace

void ParallelForImpl(int64_t chunks, int num_threads, void (*body)(void*, int64_t), void* context) {
  struct Nested {
    void (*body)(void*, int64_t);
    void* context;
  } nested{body, context};
  if (inside_body) num_threads = 1;
  PoolSlot().load()->Run(
      chunks, num_threads,
      [](void* raw, int64_t chunk) {
        const bool before = inside_body;
        inside_body = true;
        const auto* job = static_cast<Nested*>(raw);
        try {
          job->body(job->context, chunk);
        } catch (...) {
          inside_body = before;
          throw;
        }
        inside_body = before;
      },
      &nested);
}

}  // namespace onerec
