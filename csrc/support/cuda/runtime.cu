#include <cuda_runtime.h>

#include "onerec/runtime.h"

namespace onerec {

CudaInfo GetCudaInfo() {
  CudaInfo info;
  info.built = true;
  const cudaError_t status = cudaGetDeviceCount(&info.devices);
  if (status != cudaSuccess) {
    info.devices = 0;
    info.problem = cudaGetErrorString(status);
  } else if (info.devices == 0) {
    info.problem = "the driver shows no device";
  }
  return info;
}

}  // namespace onerec
