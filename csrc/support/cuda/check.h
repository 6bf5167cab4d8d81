// Failed CUDA calls as exceptions that name the operation, and the current device.
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

// Makes a device the thread's current one for as long as this lives.
class DeviceScope {
 public:
  DeviceScope(int device, const char* operation) : device_(device) {
    CheckCuda(cudaGetDevice(&before_), operation);
    if (device_ != before_) CheckCuda(cudaSetDevice(device_), operation);
  }
  ~DeviceScope() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int device_;
  int before_ = 0;
};

}  // namespace onerec
