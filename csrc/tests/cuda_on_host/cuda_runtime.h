// As much of CUDA as this repository's kernels use, on the host: a block's threads are fibers of
// one host thread, and device memory is the host's. For tests: it is slow, and it finds what a
// sanitizer finds, barriers that not all threads reach and, mostly, barriers that are missing.
#pragma once

#include <math.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __device__
#define __global__
// In a section of their own, so that every block finds garbage there.
#define __shared__ static __attribute__((section("cuda_shared")))
#define __launch_bounds__(...)

struct dim3 {
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace onerec::on_host {

// Of the fiber that runs.
inline dim3 thread_index, block_index, grid_size;

void SyncBlock();
void SyncWarp();
// What a lane of this warp shows to the others: six numbers.
uint64_t* Shown(int lane);

inline int OwnLane() { return static_cast<int>(thread_index.x % 32); }

// The value of another lane of the warp.
template <class T>
T FromLane(T value, int lane) {
  std::memcpy(Shown(OwnLane()), &value, sizeof(T));
  SyncWarp();
  T other;
  std::memcpy(&other, Shown(lane), sizeof(T));
  SyncWarp();
  return other;
}

}  // namespace onerec::on_host

#define threadIdx ::onerec::on_host::thread_index
#define blockIdx ::onerec::on_host::block_index
#define gridDim ::onerec::on_host::grid_size

// Every lane of a warp takes part in what the kernels here exchange.
inline void __syncthreads() { onerec::on_host::SyncBlock(); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return onerec::on_host::FromLane(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return onerec::on_host::FromLane(value, onerec::on_host::OwnLane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = onerec::on_host::OwnLane();
  return onerec::on_host::FromLane(value, lane < step ? lane : lane - step);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int step) {
  const int lane = onerec::on_host::OwnLane();
  return onerec::on_host::FromLane(value, lane + step > 31 ? lane : lane + step);
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  using namespace onerec::on_host;
  *Shown(OwnLane()) = mine;
  SyncWarp();
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(*Shown(lane) != 0) << lane;
  SyncWarp();
  return all;
}

template <class T>
T atomicAdd(T* target, T value) {
  const T before = *target;
  *target = before + value;
  return before;
}
template <class T>
T atomicMin(T* target, T value) {
  const T before = *target;
  *target = std::min(before, value);
  return before;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return ffs(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
using std::min;

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
using cudaStream_t = void*;

inline const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaSuccess ? "cudaSuccess" : "cudaErrorMemoryAllocation";
}
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "out of memory";
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
namespace onerec::on_host {
inline thread_local int current_device = 0;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = onerec::on_host::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  onerec::on_host::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = std::malloc(bytes);
  if (*data == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*data, 0xFF, bytes);  // NaN, -1
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* data) {
  std::free(data);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* data, int byte, size_t bytes) {
  std::memset(data, byte, bytes);
  return cudaSuccess;
}
