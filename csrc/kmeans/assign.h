// Pieces of balanced k-means that its translation units share.
#pragma once

#include <cstdint>
#include <vector>

#include "kmeans/tiles/device.h"
#include "kmeans/tiles/pass.h"
#include "kmeans/transport/paths.h"
#include "onerec/balanced_kmeans.h"

namespace onerec {

// Costs for the exact finish from tiles of distances; prices, if not null, count as part of the
// costs and must be those that `packed` has.
class TileCosts : public FinishCosts {
 public:
  TileCosts(const FloatRows& x, const float* centers, const double* prices,
            const PackedCenters& packed, const KMeansKernels& kernels)
      : x_(x), centers_(centers), prices_(prices), packed_(packed), kernels_(kernels) {}

  void Rows(const int32_t* items, int64_t count, const Body& body) const override {
    std::vector<int64_t> rows(items, items + count);
    BalancedKMeansOptions alone;  // one thread, no interruption
    DensePass(x_, rows.data(), count, packed_, kernels_, alone,
              [&](int64_t, int64_t i, const float* row, double square) {
                body(i, row, 2 * packed_.Error(square));
              });
  }

  double Exact(int32_t item, int32_t node) const override {
    return Cost(x_, item, centers_, node, kernels_) + (prices_ != nullptr ? prices_[node] : 0);
  }

 private:
  const FloatRows& x_;
  const float* centers_;
  const double* prices_;
  const PackedCenters& packed_;
  const KMeansKernels& kernels_;
};

// BalancedAssign without the checks, on `device` if it is not null. `prices_given` says that prices
// are worth starting from; `certify` fills in cost, dual and gap, for one more pass over
// everything.
BalancedAssignment SolveAssignment(const FloatRows& x, const std::vector<double>& mean,
                                   const float* centers, int64_t clusters,
                                   const BalancedKMeansOptions& options, KMeansDevice* device,
                                   bool prices_given, bool labels_given, bool certify,
                                   double* prices, int32_t* labels);

}  // namespace onerec
