// Turns a failed CUDA call into an exception that names the operation.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace onerec {

inline void CheckCuda(cudaError_t status, const char* operation) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(operation) + ": CUDA error " + cudaGetErrorName(status) +
                           ": " + cudaGetErrorString(status));
}

}  // namespace onerec
