// What the kernels take from the device beyond CUDA's C++, and how they are launched. The tests
// have another header of this name, which runs the kernels on the host.
#pragma once

#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "support/cuda/check.h"

#define ONEREC_PRAGMA(text) _Pragma(#text)
#define ONEREC_UNROLL ONEREC_PRAGMA(unroll)
#define ONEREC_UNROLL_BY(count) ONEREC_PRAGMA(unroll count)

namespace onerec {

// Starts kernel(arguments...) for a grid of blocks of `threads`; waits for nothing.
template <class... Parameters, class... Arguments>
void Launch(const char* operation, void (*kernel)(Parameters...), dim3 grid, int threads,
            size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  CheckCuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), operation);
}

// Bytes of dynamic shared memory that a block of the kernel can have on the current device.
template <class... Parameters>
size_t SharedRoom(const char* operation, void (*kernel)(Parameters...)) {
  int device = 0, most = 0;
  cudaFuncAttributes attributes{};
  CheckCuda(cudaGetDevice(&device), operation);
  CheckCuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
            operation);
  CheckCuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), operation);
  return most - attributes.sharedSizeBytes;
}

// Lets a kernel have `bytes` of dynamic shared memory.
template <class... Parameters>
void AllowShared(const char* operation, void (*kernel)(Parameters...), size_t bytes) {
  CheckCuda(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      operation);
}

// The block's dynamic shared memory.
template <class T>
__device__ T* DynamicShared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return reinterpret_cast<T*>(dynamic_shared);
}

// To tf32, ten bits of mantissa: to nearest, halves away from zero.
__device__ inline uint32_t ToTf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// c += a b for a 16 x 8 and an 8 x 8 tile of tf32; the layouts are those of mma.m16n8k8 in the PTX
// manual.
__device__ inline void Mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Copies 16 bytes to shared memory; they are there for this thread after WaitCopies.
__device__ inline void CopyAsync(float* target, const float* source) {
  __pipeline_memcpy_async(target, source, 16);
}
__device__ inline void WaitCopies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

}  // namespace onerec
