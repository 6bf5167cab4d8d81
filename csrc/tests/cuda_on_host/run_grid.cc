// Fibers for the threads of a block.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "support/cuda/device.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define ONEREC_ASAN 1
#endif

extern char __start_cuda_shared[] __attribute__((visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((visibility("hidden")));

namespace onerec::on_host {
namespace {

constexpr size_t kStackBytes = size_t{1} << 17;
constexpr int kWarp = 32;

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kReady;
  void* fake_stack = nullptr;
  std::vector<std::pair<float*, const float*>> copies;  // under way
};

// The block that runs; one at a time in the process.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<uint64_t> shown;
  std::vector<double> shared;  // dynamic shared memory, aligned
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_bytes = 0;
  size_t now = 0;  // fiber that runs
  std::mt19937 draw{0};
};

Block& TheBlock() {
  static Block block;
  return block;
}

// Leaves the fiber that runs, for good if it is done.
void Leave(State state) {
  Block& block = TheBlock();
  Fiber& fiber = block.fibers[block.now];
  fiber.state = state;
#ifdef ONEREC_ASAN
  __sanitizer_start_switch_fiber(state == State::kDone ? nullptr : &fiber.fake_stack,
                                 block.scheduler_stack, block.scheduler_bytes);
#endif
  swapcontext(&fiber.context, &block.scheduler);
#ifdef ONEREC_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &block.scheduler_stack, &block.scheduler_bytes);
#endif
}

void Enter() {
  Block& block = TheBlock();
#ifdef ONEREC_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_bytes);
#endif
  (*block.body)();
  Leave(State::kDone);
}

void Resume(size_t thread) {
  Block& block = TheBlock();
  block.now = thread;
  thread_index.x = static_cast<unsigned>(thread);
#ifdef ONEREC_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, block.fibers[thread].stack.get(), kStackBytes);
#endif
  swapcontext(&block.scheduler, &block.fibers[thread].context);
#ifdef ONEREC_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// Lets the fibers go on if all that are not done wait in `state`; whether any does.
bool Release(size_t first, size_t last, State state) {
  Block& block = TheBlock();
  bool any = false;
  for (size_t i = first; i < last; ++i) {
    const State own = block.fibers[i].state;
    if (own != state && own != State::kDone) return false;
    any |= own == state;
  }
  for (size_t i = first; i < last; ++i) {
    if (block.fibers[i].state == state) block.fibers[i].state = State::kReady;
  }
  return any;
}

// From one barrier of the block to the next the warps run one after the other, in a new order each
// time, as do the lanes of a warp: a barrier that is missing is likely to show.
void RunBlock(size_t threads) {
  Block& block = TheBlock();
  std::vector<size_t> warps;
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.state = State::kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, Enter, 0);
    if (i % kWarp == 0) warps.push_back(i);
  }
  std::array<size_t, kWarp> lanes;
  std::iota(lanes.begin(), lanes.end(), size_t{0});
  do {
    std::shuffle(warps.begin(), warps.end(), block.draw);
    for (const size_t warp : warps) {
      do {
        std::shuffle(lanes.begin(), lanes.end(), block.draw);
        for (const size_t lane : lanes) {
          if (block.fibers[warp + lane].state == State::kReady) Resume(warp + lane);
        }
      } while (Release(warp, warp + kWarp, State::kAtWarp));
    }
  } while (Release(0, threads, State::kAtBlock));
  for (size_t i = 0; i < threads; ++i) {
    if (block.fibers[i].state == State::kDone) continue;
    std::fprintf(stderr, "thread %zu of block %u waits at a barrier that others never reach\n", i,
                 block_index.x);
    std::abort();
  }
}

}  // namespace

void SyncBlock() { Leave(State::kAtBlock); }
void SyncWarp() { Leave(State::kAtWarp); }

uint64_t* Shown(int lane) {
  Block& block = TheBlock();
  return &block.shown[(block.now / kWarp * kWarp + lane) * 6];
}

void* SharedMemory() { return TheBlock().shared.data(); }

size_t& AllowedShared(const void* kernel) {
  static std::mutex one;
  static std::map<const void*, size_t> allowed;
  const std::lock_guard lock(one);
  return allowed.try_emplace(kernel, size_t{48} << 10).first->second;
}

void CheckLaunch(const char* operation, dim3 grid, int threads, size_t shared_bytes,
                 size_t allowed) {
  if (grid.x >= 1 && grid.x <= 0x7FFFFFFFu && grid.y >= 1 && grid.y <= 65535 && grid.z == 1 &&
      threads >= 1 && threads <= 1024 && shared_bytes <= allowed) {
    return;
  }
  std::fprintf(stderr, "%s: no device starts %u x %u x %u blocks of %d threads, %zu of %zu bytes\n",
               operation, grid.x, grid.y, grid.z, threads, shared_bytes, allowed);
  std::abort();
}

void RunGrid(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
  static std::mutex one;
  const std::lock_guard lock(one);
  Block& block = TheBlock();
  const size_t count = threads;
  if (block.fibers.size() < count) block.fibers = std::vector<Fiber>(count);
  block.shown.resize(count * 6);
  block.shared = std::vector<double>((shared_bytes + 7) / 8);
  block.body = &body;
  grid_size = grid;
  std::vector<unsigned> order(size_t{grid.x} * grid.y);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), block.draw);
  for (const unsigned at : order) {
    block_index = dim3(at % grid.x, at / grid.x);
    std::fill(block.shared.begin(), block.shared.end(), std::bit_cast<double>(~uint64_t{0}));
    std::memset(__start_cuda_shared, 0xFF, __stop_cuda_shared - __start_cuda_shared);
    RunBlock(count);
  }
}

}  // namespace onerec::on_host

namespace onerec {

void CopyAsync(float* target, const float* source) {
  on_host::Block& block = on_host::TheBlock();
  block.fibers[block.now].copies.emplace_back(target, source);
}

void WaitCopies() {
  on_host::Block& block = on_host::TheBlock();
  for (const auto& [target, source] : std::exchange(block.fibers[block.now].copies, {})) {
    std::memcpy(target, source, 16);
  }
}

}  // namespace onerec
