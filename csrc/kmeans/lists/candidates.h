// Passes over rows and all centres that say which centres may be among a row's nearest: from tiles
// on the host, or from a device.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kmeans/nodes.h"
#include "kmeans/tiles/device.h"
#include "kmeans/tiles/pass.h"

namespace onerec {

// The centres whose cost + price is near a row's smallest. Values are less |x|^2, x from the mean.
struct Candidates {
  std::vector<int32_t> code;  // ascending
  std::vector<float> value;
  float low = 0;    // the smallest value
  float error = 0;  // bound on the error of a difference of two values
  float limit = 0;  // every centre below is here
};

class CandidatePass {
 public:
  // May change what it is given.
  using Body = std::function<void(int64_t chunk, int64_t position, Candidates& row)>;

  // `centers` are the nodes', packed; `device` may be null, else it gets the nodes and makes the
  // passes, `device_rows` at a time.
  CandidatePass(const FloatRows& x, const Nodes& nodes, const BalancedKMeansOptions& options,
                const KMeansKernels& kernels, PackedCenters& centers, KMeansDevice* device,
                int64_t device_rows = 65536);

  bool on_device() const { return device_ != nullptr; }

  // Calls body(chunk, position, row) for the rows of a subset or, if it is null, for all, in the
  // chunks of PlanPass, as DensePass does. A row's candidates are all within `threshold` of the
  // smallest at the prices, those that its error leaves open included, and of each group that has
  // none of them the best, if it is within `reach`.
  void Run(const double* prices, double threshold, double reach, const int64_t* subset,
           int64_t count, const Body& body);

 private:
  void OnHost(double threshold, double reach, const int64_t* subset, int64_t count,
              const Body& body) const;
  void OnDevice(double threshold, double reach, const int64_t* subset, int64_t count,
                const Body& body) const;
  int64_t AddLeaders(const float* row, const Candidates& of, double reach, int64_t found,
                     std::vector<int32_t>& where) const;

  const FloatRows& x_;
  const Nodes& nodes_;
  const BalancedKMeansOptions& options_;
  const KMeansKernels& kernels_;
  PackedCenters& centers_;
  KMeansDevice* device_;
  int64_t device_rows_;
};

}  // namespace onerec
