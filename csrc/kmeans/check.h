// What balanced k-means refuses before any work; each throws std::invalid_argument.
#pragma once

#include <cstdint>

#include "onerec/balanced_kmeans.h"

namespace onerec {

void CheckShape(const FloatRows& x, int64_t clusters, const BalancedKMeansOptions& options);

// CheckShape, and what clusters of equal size need: rows, steps and memory.
void CheckBalanced(const FloatRows& x, int64_t clusters, const BalancedKMeansOptions& options);

// prices may be null.
void CheckCenters(const float* centers, int64_t clusters, int64_t d, const double* prices);

// Labels of a step that another goes on from.
void CheckSizes(int64_t rows, int64_t clusters, const int32_t* labels);

// Names the first row and column of x that is not finite, or too large to be squared.
void CheckValues(const FloatRows& x, int num_threads);

}  // namespace onerec
