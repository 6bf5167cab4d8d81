#include "kmeans/check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "onerec/runtime.h"
#include "support/error.h"
#include "support/int_math.h"
#include "support/thread_pool.h"

namespace onerec {
namespace {

// Squares of differences of larger values, summed over a row, could leave the range of float.
constexpr float kLargest = 1e15f;

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
    throw std::invalid_argument(
        WantedGot("x", "at least one row and one column", "shape [", x.rows, ", ", x.columns, "]"));
  }
  if (x.rows > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(WantedGot("x", "at most 2147483647 rows", x.rows));
  }
  if (x.stride < x.columns) {
    throw std::invalid_argument(WantedGot("x", Text("a stride of at least ", x.columns), x.stride));
  }
  if (clusters < 1) {
    throw std::invalid_argument(WantedGot("clusters", "at least 1", clusters));
  }
  if (options.num_threads < 1) {
    throw std::invalid_argument(WantedGot("num_threads", "at least 1", options.num_threads));
  }
  if (options.cuda_device >= 0) {
    const CudaInfo cuda = GetCudaInfo();
    if (options.cuda_device >= cuda.devices) {
      throw std::invalid_argument(
          WantedGot("cuda_device", Text("one of ", cuda.devices, " devices"), options.cuda_device,
                    (cuda.problem.empty() ? "" : ": " + cuda.problem)));
    }
  }
}

void CheckBalanced(const FloatRows& x, int64_t clusters, const BalancedKMeansOptions& options) {
  CheckShape(x, clusters, options);
  if (x.rows < clusters) {
    throw std::invalid_argument(
        WantedGot("x", Text("at least as many rows as clusters (", clusters, ")"), x.rows));
  }
  if (options.max_iter < 1) {
    throw std::invalid_argument(WantedGot("max_iter", "at least 1", options.max_iter));
  }
  // What the first price search, the shortest lists and the exact finish cannot do without.
  const int64_t least = 192 * x.rows + 4096 * clusters;
  if (options.memory_budget < least) {
    throw std::invalid_argument(WantedGot(
        "memory_budget",
        Text("at least ", least, " bytes for ", x.rows, " rows and ", clusters, " clusters"),
        options.memory_budget));
  }
}

void CheckCenters(const float* centers, int64_t clusters, int64_t d, const double* prices) {
  for (int64_t i = 0; i < clusters * d; ++i) {
    CheckValue("centers", centers[i], i / d, i % d);
  }
  for (int64_t k = 0; prices != nullptr && k < clusters; ++k) {
    if (!std::isfinite(prices[k])) {
      throw std::invalid_argument(
          WantedGot("prices", "finite values", std::to_string(prices[k]) + " at ", k));
    }
  }
}

void CheckSizes(int64_t rows, int64_t clusters, const int32_t* labels) {
  std::vector<int64_t> sizes(clusters);
  for (int64_t i = 0; i < rows; ++i) {
    if (labels[i] < 0 || labels[i] >= clusters) {
      throw std::invalid_argument(
          WantedGot("labels", Text("0..", clusters - 1), labels[i], " at ", i));
    }
    ++sizes[labels[i]];
  }
  const auto [low, high] = std::minmax_element(sizes.begin(), sizes.end());
  if (*low < rows / clusters || *high > DivideUp(rows, clusters)) {
    throw std::invalid_argument(
        WantedGot("labels", "clusters of equal size", "sizes from ", *low, " to ", *high));
  }
}

void CheckValues(const FloatRows& x, int num_threads) {
  const int64_t parts = DivideUp(x.rows, 1024);
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
