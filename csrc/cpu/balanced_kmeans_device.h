// The passes of balanced k-means over all items and all centres on a CUDA device. What the passes
// leave open, and the exact finish, are the host's.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "onerec/balanced_kmeans.h"

namespace onerec {

class KMeansDevice {
 public:
  // Copies x, less `mean`, to the device, in an order drawn with the seed: the first rows there are
  // a sample. Throws std::runtime_error if this build has no CUDA, the device cannot be used, or
  // its memory is too small.
  KMeansDevice(const FloatRows& x, const std::vector<double>& mean, uint64_t seed, int device);
  ~KMeansDevice();
  KMeansDevice(const KMeansDevice&) = delete;
  KMeansDevice& operator=(const KMeansDevice&) = delete;

  void SetCenters(const float* centers, int64_t count);

  // labels[i] = argmin_k |x_i - c_k|^2 + prices[k] for every item, or -1 where the two smallest are
  // too close for float32 to tell.
  void Argmin(const double* prices, int32_t* labels);

  // sums[k] = sum over the first `rows` items there of softmax_k(-(cost + price) / eps). Summed in
  // fixed point: the same on every run.
  void ColumnSums(int64_t rows, double eps, const double* prices, double* sums);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace onerec
