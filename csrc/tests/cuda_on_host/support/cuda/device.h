// csrc/support/cuda/device.h on the host: see there.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <functional>

#include "support/cuda/check.h"

#define ONEREC_UNROLL
#define ONEREC_UNROLL_BY(count)

namespace onerec {

namespace on_host {

// Runs a kernel's body for every block, one after the other in a drawn order, and every thread.
void RunGrid(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body);
void* SharedMemory();

// Dynamic shared memory that a kernel may have, unless AllowShared has raised it.
size_t& AllowedShared(const void* kernel);

// Ends the process if a device would refuse the launch.
void CheckLaunch(const char* operation, dim3 grid, int threads, size_t shared_bytes,
                 size_t allowed);

}  // namespace on_host

template <class... Parameters, class... Arguments>
void Launch(const char* operation, void (*kernel)(Parameters...), dim3 grid, int threads,
            size_t shared_bytes, cudaStream_t, Arguments... arguments) {
  on_host::CheckLaunch(operation, grid, threads, shared_bytes,
                       on_host::AllowedShared(reinterpret_cast<const void*>(kernel)));
  on_host::RunGrid(grid, threads, shared_bytes,
                   [&] { kernel(static_cast<Parameters>(arguments)...); });
}

template <class... Parameters>
size_t SharedRoom(const char*, void (*)(Parameters...)) {
  return 160 << 10;
}

template <class... Parameters>
void AllowShared(const char*, void (*kernel)(Parameters...), size_t bytes) {
  on_host::AllowedShared(reinterpret_cast<const void*>(kernel)) = bytes;
}

template <class T>
T* DynamicShared() {
  return static_cast<T*>(on_host::SharedMemory());
}

inline uint32_t ToTf32(float value) {
  return (std::bit_cast<uint32_t>(value) + 0x1000u) & ~0x1FFFu;
}

// With g = lane / 4 and t = lane % 4, a lane gives a(g + 8 (e % 2), t + 4 (e / 2)) and
// b(t + 4 e, g), and has c(g + 8 (e / 2), 2 t + e % 2).
inline void Mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using namespace on_host;
  const int lane = OwnLane();
  for (int e = 0; e < 4; ++e) Shown(lane)[e] = a[e];
  for (int e = 0; e < 2; ++e) Shown(lane)[4 + e] = b[e];
  SyncWarp();
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
    for (int k = 0; k < 8; ++k) {
      const uint64_t left = Shown(row % 8 * 4 + k % 4)[row / 8 + 2 * (k / 4)];
      const uint64_t right = Shown(column * 4 + k % 4)[4 + k / 4];
      c[e] += std::bit_cast<float>(static_cast<uint32_t>(left)) *
              std::bit_cast<float>(static_cast<uint32_t>(right));
    }
  }
  SyncWarp();
}

// A copy arrives no sooner than it is waited for.
void CopyAsync(float* target, const float* source);
void WaitCopies();

}  // namespace onerec
