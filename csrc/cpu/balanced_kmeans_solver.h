// Pieces of balanced k-means that its translation units share.
#pragma once

#include <cstdint>
#include <vector>

#include "onerec/balanced_kmeans.h"

namespace onerec {

// Distinct centres; equal ones are one node that takes as many items as all of them.
struct Nodes {
  int64_t count = 0;
  std::vector<float> centers;         // [count, d]
  std::vector<int64_t> multiplicity;  // [count]
  std::vector<int32_t> node_of;       // [clusters]
};

Nodes MergeEqual(const float* centers, int64_t clusters, int64_t d);

// `count` of 0..total-1 without repetition, ascending, drawn with the seed.
std::vector<int64_t> SampleRows(int64_t total, int64_t count, uint64_t seed);

// A permutation's first `count` values of 0..total-1.
std::vector<int64_t> DrawRows(int64_t total, int64_t count, uint64_t seed);

// BalancedAssign without the checks. `prices_given` says that prices are worth starting from.
BalancedAssignment SolveAssignment(const FloatRows& x, const std::vector<double>& mean,
                                   const float* centers, int64_t clusters,
                                   const BalancedKMeansOptions& options, bool prices_given,
                                   double* prices, int32_t* labels);

}  // namespace onerec
