#include "kmeans/tiles/device.h"

#include <stdexcept>

#include "onerec/runtime.h"

namespace onerec {

std::unique_ptr<KMeansDevice> OpenDevice(const FloatRows& x, const std::vector<double>& mean,
                                         const BalancedKMeansOptions& options) {
  if (options.cuda_device < 0 || options.method == BalancedMethod::kSequential) return nullptr;
  return std::make_unique<KMeansDevice>(x, mean, options.cuda_device);
}

#ifndef ONEREC_CUDA
struct KMeansDevice::State {};
KMeansDevice::KMeansDevice(const FloatRows&, const std::vector<double>&, int) {
  throw std::runtime_error(GetCudaInfo().problem);
}
KMeansDevice::~KMeansDevice() = default;
void KMeansDevice::SetCenters(const float*, int64_t, const std::vector<int32_t>&) {}
void KMeansDevice::SetPrices(const double*) {}
float KMeansDevice::Error(int64_t) const { return 0; }
void KMeansDevice::Argmin(int32_t*) {}
const KMeansDevice::Lists& KMeansDevice::Candidates(const int64_t*, int64_t, int64_t, double,
                                                    double) {
  static const Lists none;
  return none;
}
#endif

}  // namespace onerec
