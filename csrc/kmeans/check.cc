#include "kmeans/check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "onerec/runtime.h"
#include "support/thread_pool.h"

namespace onerec {
namespace {

// Squares of differences of larger values, summed over a row, could leave the range of float.
constexpr float kLargest = 1e15f;

std::string Text(int64_t value) { return std::to_string(value); }

void CheckValue(const std::string& name, float value, int64_t row, int64_t column) {
  if (std::fabs(value) <= kLargest) return;
  throw std::invalid_argument(
      name +
      (std::isfinite(value) ? ": wanted values of size 1e15 at most" : ": wanted finite values") +
      ", got " + std::to_string(value) + " in row " + Text(row) + ", column " + Text(column));
}

}  // namespace

void CheckShape(const FloatRows& x, int64_t clusters, const BalancedKMeansOptions& options) {
  if (x.rows < 1 || x.columns < 1) {
    throw std::invalid_argument("x: wanted at least one row and one column, got shape [" +
                                Text(x.rows) + ", " + Text(x.columns) + "]");
  }
  if (x.rows > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("x: wanted at most 2147483647 rows, got " + Text(x.rows));
  }
  if (x.stride < x.columns) {
    throw std::invalid_argument("x: wanted a stride of at least " + Text(x.columns) + ", got " +
                                Text(x.stride));
  }
  if (clusters < 1) {
    throw std::invalid_argument("clusters: wanted at least 1, got " + Text(clusters));
  }
  const Processes& processes = options.processes;
  if (processes.count < 1 || processes.rank < 0 || processes.rank >= processes.count ||
      (processes.count > 1 && !processes.exchange)) {
    throw std::invalid_argument("processes: wanted a rank in 0.." + Text(processes.count - 1) +
                                " and an exchange, got rank " + Text(processes.rank));
  }
  if (options.num_threads < 1) {
    throw std::invalid_argument("num_threads: wanted at least 1, got " + Text(options.num_threads));
  }
  if (options.cuda_device >= 0) {
    const CudaInfo cuda = GetCudaInfo();
    if (options.cuda_device >= cuda.devices) {
      throw std::invalid_argument("cuda_device: wanted one of " + Text(cuda.devices) +
                                  " devices, got " + Text(options.cuda_device) +
                                  (cuda.problem.empty() ? "" : ": " + cuda.problem));
    }
    if (processes.count > 1) {
      throw std::invalid_argument("cuda_device: wanted -1 with several processes, got " +
                                  Text(options.cuda_device));
    }
  }
}

void CheckBalanced(const FloatRows& x, int64_t clusters, const BalancedKMeansOptions& options) {
  CheckShape(x, clusters, options);
  if (x.rows < clusters) {
    throw std::invalid_argument("x: wanted at least as many rows as clusters (" + Text(clusters) +
                                "), got " + Text(x.rows));
  }
  if (options.max_iter < 1) {
    throw std::invalid_argument("max_iter: wanted at least 1, got " + Text(options.max_iter));
  }
  // What the first price search, the shortest lists and the exact finish cannot do without.
  const int64_t least = 192 * x.rows + 4096 * clusters;
  if (options.memory_budget < least) {
    throw std::invalid_argument("memory_budget: wanted at least " + Text(least) + " bytes for " +
                                Text(x.rows) + " rows and " + Text(clusters) + " clusters, got " +
                                Text(options.memory_budget));
  }
}

void CheckCenters(const float* centers, int64_t clusters, int64_t d, const double* prices) {
  for (int64_t i = 0; i < clusters * d; ++i) {
    CheckValue("centers", centers[i], i / d, i % d);
  }
  for (int64_t k = 0; prices != nullptr && k < clusters; ++k) {
    if (!std::isfinite(prices[k])) {
      throw std::invalid_argument("prices: wanted finite values, got " + std::to_string(prices[k]) +
                                  " at " + Text(k));
    }
  }
}

void CheckSizes(int64_t rows, int64_t clusters, const int32_t* labels) {
  std::vector<int64_t> sizes(clusters);
  for (int64_t i = 0; i < rows; ++i) {
    if (labels[i] < 0 || labels[i] >= clusters) {
      throw std::invalid_argument("labels: wanted 0.." + Text(clusters - 1) + ", got " +
                                  Text(labels[i]) + " at " + Text(i));
    }
    ++sizes[labels[i]];
  }
  const auto [low, high] = std::minmax_element(sizes.begin(), sizes.end());
  if (*low < rows / clusters || *high > (rows + clusters - 1) / clusters) {
    throw std::invalid_argument("labels: wanted clusters of equal size, got sizes from " +
                                Text(*low) + " to " + Text(*high));
  }
}

void CheckValues(const FloatRows& x, int num_threads) {
  const int64_t parts = (x.rows + 1023) / 1024;
  std::vector<int64_t> bad(parts, -1);
  ParallelFor(parts, num_threads, [&](int64_t c) {
    for (int64_t i = c * 1024; i < std::min(x.rows, (c + 1) * 1024); ++i) {
      const float* row = x.data + i * x.stride;
      bool good = true;
      for (int64_t j = 0; j < x.columns; ++j) good &= std::fabs(row[j]) <= kLargest;
      if (!good) {
        bad[c] = i;
        return;
      }
    }
  });
  for (const int64_t i : bad) {
    if (i < 0) continue;
    for (int64_t j = 0; j < x.columns; ++j) {
      CheckValue("x", x.data[i * x.stride + j], i, j);
    }
  }
}

}  // namespace onerec
