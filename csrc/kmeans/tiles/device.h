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
  // Rows of candidates; those of row r begin at start[r], by code.
  struct Lists {
    std::vector<int32_t> count;  // -1: there are too many, and none is here
    std::vector<uint64_t> start;
    std::vector<int32_t> code;
    std::vector<float> value;  // cost + price, less the square of the row
  };

  // Copies x, less `mean`, to the device. Throws std::runtime_error if this build has no CUDA, the
  // device cannot be used, or its memory is too small.
  KMeansDevice(const FloatRows& x, const std::vector<double>& mean, int device);
  ~KMeansDevice();
  KMeansDevice(const KMeansDevice&) = delete;
  KMeansDevice& operator=(const KMeansDevice&) = delete;

  // group_offset: [groups + 1] centres of each group, or empty.
  void SetCenters(const float* centers, int64_t count, const std::vector<int32_t>& group_offset);
  void SetPrices(const double* prices);  // null: zero

  // Bound on |computed - exact| of an item's values at the prices.
  float Error(int64_t item) const;

  // labels[i] = argmin_k |x_i - c_k|^2 + price_k for every item, or -1 where the two smallest are
  // too close for float32 to tell.
  void Argmin(int32_t* labels);

  // The candidates of `count` items, those of `subset` or, if it is null, those from `first`: every
  // centre within `threshold` of the smallest and, if `reach` is larger, the best of each group
  // that is within that, as far as twice Error() leaves open. The answer lasts until the next call.
  const Lists& Candidates(const int64_t* subset, int64_t first, int64_t count, double threshold,
                          double reach);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The device that the options name, with x on it; null if they name none.
std::unique_ptr<KMeansDevice> OpenDevice(const FloatRows& x, const std::vector<double>& mean,
                                         const BalancedKMeansOptions& options);

}  // namespace onerec
