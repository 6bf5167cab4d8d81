#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "kmeans/assign.h"
#include "kmeans/check.h"
#include "kmeans/rounding.h"
#include "kmeans/sample.h"
#include "kmeans/tiles/device.h"
#include "kmeans/tiles/pass.h"
#include "onerec/balanced_kmeans.h"
#include "support/int_math.h"
#include "support/thread_pool.h"

namespace onerec {
namespace {

double Inertia(const FloatRows& x, const float* centers, const int32_t* labels,
               const BalancedKMeansOptions& options) {
  const KMeansKernels& kernels = CurrentKMeansKernels();
  const int64_t parts = DivideUp(x.rows, 4096);
  std::vector<double> sums(parts);
  ParallelFor(parts, options.num_threads, [&](int64_t c) {
    double sum = 0;
    for (int64_t i = c * 4096; i < std::min(x.rows, (c + 1) * 4096); ++i) {
      sum += Cost(x, i, centers, labels[i], kernels);
    }
    sums[c] = sum;
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// Algorithm 1 of arXiv 2502.18965, one round: cluster 0, 1, ... takes the nearest of the items that
// are left, N mod K clusters first with one item more. Distances of a block of clusters come from
// one pass; items whose float32 distance leaves the choice open are decided in float64.
void SequentialRound(const FloatRows& x, const std::vector<double>& mean, const float* centers,
                     int64_t clusters, const BalancedKMeansOptions& options, int32_t* labels) {
  const KMeansKernels& kernels = CurrentKMeansKernels();
  const int64_t block = std::min<int64_t>(clusters, 32);
  std::vector<int64_t> left(x.rows);
  std::iota(left.begin(), left.end(), int64_t{0});
  std::vector<float> distances(block * x.rows);
  std::vector<int32_t> open;
  std::vector<std::pair<double, int32_t>> doubtful;
  std::vector<float> values;
  std::fill(labels, labels + x.rows, -1);
  for (int64_t first = 0; first < clusters; first += block) {
    const int64_t width = std::min(block, clusters - first);
    const PackedCenters packed(centers + first * x.columns, width, x.columns, mean, kernels);
    const auto count = static_cast<int64_t>(left.size());
    std::vector<float> error(DivideUp(count, 64));
    DensePass(x, left.data(), count, packed, kernels, options,
              [&](int64_t, int64_t i, const float* row, double square) {
                for (int64_t k = 0; k < width; ++k) {
                  distances[k * count + i] =
                      static_cast<float>(static_cast<double>(row[k]) + square);
                }
              });
    double longest = 0;
    for (const int64_t item : left) {
      longest =
          std::max(longest, kernels.exact_cost(x.data + item * x.stride, packed.mean(), x.columns));
    }
    for (int64_t k = 0; k < width; ++k) {
      const int64_t size = x.rows / clusters + (first + k < x.rows % clusters ? 1 : 0);
      const float* column = distances.data() + k * count;
      values.clear();
      for (int64_t i = 0; i < count; ++i) {
        if (labels[left[i]] < 0) values.push_back(column[i]);
      }
      std::nth_element(values.begin(), values.begin() + size - 1, values.end());
      const float edge = values[size - 1];
      const float error =
          packed.Error(longest) + static_cast<float>(kListRounding) * std::abs(edge);
      int64_t taken = 0;
      doubtful.clear();
      for (int64_t i = 0; i < count; ++i) {
        const auto item = static_cast<int32_t>(left[i]);
        if (labels[item] >= 0 || column[i] > edge + 2 * error) continue;
        if (column[i] < edge - 2 * error) {
          labels[item] = static_cast<int32_t>(first + k);
          ++taken;
        } else {
          doubtful.emplace_back(Cost(x, item, centers, first + k, kernels), item);
        }
      }
      std::sort(doubtful.begin(), doubtful.end());
      for (int64_t t = 0; taken < size; ++t, ++taken) {
        labels[doubtful[t].second] = static_cast<int32_t>(first + k);
      }
    }
    left.erase(
        std::remove_if(left.begin(), left.end(), [&](int64_t item) { return labels[item] >= 0; }),
        left.end());
  }
}

}  // namespace

BalancedAssignment BalancedAssign(const FloatRows& x, const float* centers, int64_t clusters,
                                  const BalancedKMeansOptions& options, bool prices_given,
                                  double* prices, int32_t* labels, bool labels_given) {
  CheckBalanced(x, clusters, options);
  if (labels_given) CheckSizes(x.rows, clusters, labels);
  CheckCenters(centers, clusters, x.columns, prices_given ? prices : nullptr);
  CheckValues(x, options.num_threads);
  const std::vector<double> mean = ColumnMeans(x, options.num_threads);
  const std::unique_ptr<KMeansDevice> device = OpenDevice(x, mean, options);
  return SolveAssignment(x, mean, centers, clusters, options, device.get(), prices_given,
                         labels_given, true, prices, labels);
}

BalancedKMeansResult BalancedKMeansFit(const FloatRows& x, int64_t clusters,
                                       const BalancedKMeansOptions& options, bool centers_given,
                                       float* centers, double* prices, int32_t* labels) {
  CheckBalanced(x, clusters, options);
  CheckValues(x, options.num_threads);
  if (centers_given) {
    CheckCenters(centers, clusters, x.columns, nullptr);
  } else {
    DrawCenters(x, clusters, options.seed, centers);
  }
  const std::vector<double> mean = ColumnMeans(x, options.num_threads);
  const std::unique_ptr<KMeansDevice> device = OpenDevice(x, mean, options);
  if (options.steps_done == 0) {
    std::fill(prices, prices + clusters, 0.0);
  } else {
    CheckSizes(x.rows, clusters, labels);
  }
  BalancedKMeansResult result;
  result.iterations = options.steps_done;
  std::vector<int32_t> previous(x.rows, -1);
  const auto settled = [&] {
    const bool same = std::equal(previous.begin(), previous.end(), labels);
    std::copy(labels, labels + x.rows, previous.begin());
    return same;
  };
  if (options.method == BalancedMethod::kSequential) {
    while (result.iterations < options.max_iter && !result.converged) {
      SequentialRound(x, mean, centers, clusters, options, labels);
      result.converged = settled();
      ClusterMeans(x, labels, clusters, options, centers);
      ++result.iterations;
      if (options.on_iteration) options.on_iteration(result.iterations, 0);
    }
    result.inertia = Inertia(x, centers, labels, options);
    result.gap = std::numeric_limits<double>::quiet_NaN();
    return result;
  }
  const auto assign = [&](bool warm, bool certify) {
    const BalancedAssignment step = SolveAssignment(
        x, mean, centers, clusters, options, device.get(), warm, warm, certify, prices, labels);
    result.inertia = step.cost;
    result.gap = step.gap;
    BalancedAssignment& work = result.work;
    work.cost = step.cost;
    work.dual = step.dual;
    work.gap = step.gap;
    work.moves += step.moves;
    work.passes += step.passes;
    work.sweeps += step.sweeps;
    work.pass_seconds += step.pass_seconds;
    work.price_seconds += step.price_seconds;
    work.finish_seconds += step.finish_seconds;
  };
  double before = options.inertia_done;
  while (result.iterations < options.max_iter && !result.converged) {
    assign(result.iterations > 0, false);
    if (settled()) break;  // the centres are the means of these labels already
    const std::vector<float> old(centers, centers + clusters * x.columns);
    ClusterMeans(x, labels, clusters, options, centers);
    // To first order in the move of a centre, its members' cost + price stays what it was.
    for (int64_t k = 0; k < clusters; ++k) {
      prices[k] += CurrentKMeansKernels().exact_cost(old.data() + k * x.columns,
                                                     centers + k * x.columns, x.columns);
    }
    const double inertia = Inertia(x, centers, labels, options);
    result.converged = result.iterations > 0 && before - inertia <= options.tolerance * before;
    before = inertia;
    ++result.iterations;
    if (options.on_iteration) options.on_iteration(result.iterations, inertia);
  }
  // The last move of the centres is followed by one more assignment, so that labels and prices
  // belong to the centres that are returned.
  assign(true, true);
  result.converged = result.converged || settled();
  return result;
}

}  // namespace onerec
