#include "onerec/runtime.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/thread_pool.h"

namespace onerec {
namespace {

// Number of chunks that did not run exactly once.
int64_t Wrong(int64_t chunks, int num_threads) {
  std::vector<std::atomic<int>> runs(chunks);
  ParallelFor(chunks, num_threads, [&](int64_t chunk) { ++runs[chunk]; });
  int64_t wrong = 0;
  for (const auto& count : runs) wrong += count != 1;
  return wrong;
}

// Exit status of a forked child that runs `body` and returns what it returned; -1 if it died.
template <class Body>
int InChild(Body body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  if (waitpid(child, &status, 0) != child || !WIFEXITED(status)) return -1;
  return WEXITSTATUS(status);
}

TEST(ThreadPool, RunsEveryChunkOnce) {
  for (int num_threads : {0, 1, 2, 3, 8}) {
    for (int64_t chunks : {0, 1, 2, 31, 33, 1000}) {
      EXPECT_EQ(Wrong(chunks, num_threads), 0) << chunks << " chunks, " << num_threads;
    }
  }
}

TEST(ThreadPool, UsesNoMoreThreadsThanAsked) {
  EXPECT_EQ(Wrong(64, 8), 0);  // eight workers exist from here on
  for (int num_threads : {1, 2, 3}) {
    std::atomic<int> inside{0};
    std::atomic<int> most{0};
    ParallelFor(200, num_threads, [&](int64_t) {
      const int now = ++inside;
      int seen = most;
      while (seen < now && !most.compare_exchange_weak(seen, now)) {
      }
      std::this_thread::yield();
      --inside;
    });
    EXPECT_LE(most, num_threads);
  }
}

TEST(ThreadPool, ThrowsTheBodysExceptionAndWorksAfterwards) {
  for (int num_threads : {1, 4}) {
    for (int round = 0; round < 50; ++round) {
      try {
        ParallelFor(100, num_threads, [&](int64_t chunk) {
          if (chunk == 17) throw std::runtime_error("chunk 17");
        });
        FAIL() << "no exception";
      } catch (const std::runtime_error& error) {
        EXPECT_STREQ(error.what(), "chunk 17");
      }
      EXPECT_EQ(Wrong(100, num_threads), 0);
    }
  }
}

TEST(ThreadPool, AnExceptionLeavesTheThreadAbleToRunInParallel) {
  EXPECT_THROW(ParallelFor(4, 4, [](int64_t) { throw 1; }), int);
  // Both chunks wait for each other: this ends only if two threads take part.
  std::atomic<int> arrived{0};
  ParallelFor(2, 2, [&](int64_t) {
    ++arrived;
    while (arrived < 2) std::this_thread::yield();
  });
  EXPECT_EQ(arrived, 2);
}

TEST(ThreadPool, NestedCallsRunOnTheCallingThread) {
  std::atomic<int64_t> total{0};
  std::atomic<int> elsewhere{0};
  ParallelFor(8, 4, [&](int64_t) {
    const auto self = std::this_thread::get_id();
    ParallelFor(50, 4, [&](int64_t chunk) {
      elsewhere += std::this_thread::get_id() != self;
      total += chunk;
    });
  });
  EXPECT_EQ(total, 8 * 49 * 50 / 2);
  EXPECT_EQ(elsewhere, 0);
}

TEST(ThreadPool, ServesConcurrentCallers) {
  std::atomic<int64_t> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; ++caller) {
    callers.emplace_back([&, caller] {
      for (int round = 0; round < 200; ++round) wrong += Wrong(1 + (round * 7) % 40, 1 + caller);
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

TEST(ThreadPool, ASingleThreadedCallLeavesThePoolToOthers) {
  std::atomic<bool> inside{false};
  std::atomic<bool> done{false};
  std::thread single([&] {
    ParallelFor(1, 1, [&](int64_t) {
      inside = true;
      while (!done) std::this_thread::yield();
    });
  });
  while (!inside) std::this_thread::yield();
  std::atomic<int> arrived{0};
  ParallelFor(2, 2, [&](int64_t) {
    ++arrived;
    while (arrived < 2) std::this_thread::yield();
  });
  done = true;
  single.join();
  EXPECT_EQ(arrived, 2);
}

TEST(ThreadPool, WorksInAForkedChild) {
  EXPECT_EQ(Wrong(100, 4), 0);
  EXPECT_EQ(InChild([] { return Wrong(100, 4) == 0 ? 0 : 1; }), 0);
  EXPECT_EQ(Wrong(100, 4), 0);
}

TEST(Isa, CurrentIsAvailableAndNamed) {
  EXPECT_TRUE(IsaAvailable(CurrentIsa()));
  EXPECT_TRUE(IsaAvailable(Isa::kBaseline));
  EXPECT_STREQ(IsaName(Isa::kBaseline), "baseline");
  EXPECT_STREQ(IsaName(Isa::kAvx2), "avx2");
  EXPECT_STREQ(IsaName(Isa::kAvx512), "avx512");
  EXPECT_STREQ(IsaName(Isa::kAvx512Bf16), "avx512_bf16");
}

TEST(Isa, CanBeSetToWhatTheMachineHasOnly) {
  const Isa before = CurrentIsa();
  for (Isa isa : kIsas) {
    if (IsaAvailable(isa)) {
      SetIsa(isa);
      EXPECT_EQ(CurrentIsa(), isa);
    } else {
      EXPECT_THROW(SetIsa(isa), std::invalid_argument);
    }
  }
  SetIsa(before);
}

TEST(Cuda, SaysWhyThereIsNoDevice) {
  const CudaInfo info = GetCudaInfo();
  EXPECT_EQ(info.problem.empty(), info.devices > 0) << info.problem;
  EXPECT_TRUE(info.built || info.devices == 0);
}

TEST(Version, IsAReleaseNumber) {
  const std::string version = Version();
  int dots = 0;
  for (char c : version) dots += c == '.';
  EXPECT_EQ(dots, 2) << version;
}

}  // namespace
}  // namespace onerec
