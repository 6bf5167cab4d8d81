// Rows drawn with a seed.
#pragma once

#include <cstdint>
#include <vector>

#include "onerec/balanced_kmeans.h"

namespace onerec {

// A permutation's first `count` values of 0..total-1.
std::vector<int64_t> DrawRows(int64_t total, int64_t count, uint64_t seed);

// `count` of 0..total-1 without repetition, ascending.
std::vector<int64_t> SampleRows(int64_t total, int64_t count, uint64_t seed);

// Distinct rows; repeats only when there are too few distinct ones.
void DrawCenters(const FloatRows& x, int64_t clusters, uint64_t seed, float* centers);

}  // namespace onerec
