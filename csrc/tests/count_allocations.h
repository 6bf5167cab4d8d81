// Counts what every thread allocates, by the hooks of the sanitizers' allocators.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "support/thread_pool.h"

// Of the sanitizers' runtimes.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, size_t),
                                                         void (*)(const volatile void*))
    __attribute__((weak));

namespace onerec {

inline bool CanCountAllocations() { return &__sanitizer_install_malloc_and_free_hooks != nullptr; }

// Allocations, of every thread, while body runs. Starts the pool's threads before: what a thread
// allocates as it starts is not body's.
inline int64_t CountAllocations(int num_threads, const std::function<void()>& body) {
  static std::atomic<bool> counting{false};
  static std::atomic<int64_t> allocations{0};
  static const int installed = __sanitizer_install_malloc_and_free_hooks(
      [](const volatile void*, size_t) {
        if (counting) ++allocations;
      },
      [](const volatile void*) {});
  if (installed == 0) throw std::runtime_error("the sanitizer takes no more hooks");
  std::atomic<int> started{0};
  ParallelFor(num_threads, num_threads, [&](int64_t) {
    ++started;
    while (started < num_threads) std::this_thread::yield();
  });
  const auto count = [](const std::function<void()>& run) {
    allocations = 0;
    counting = true;
    run();
    counting = false;
    return allocations.load();
  };
  if (count([] { std::make_unique<std::vector<int64_t>>(100); }) == 0) {
    throw std::runtime_error("the hook counts nothing");
  }
  return count(body);
}

}  // namespace onerec
