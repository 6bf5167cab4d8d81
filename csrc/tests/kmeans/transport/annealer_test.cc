#include "kmeans/transport/annealer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kmeans/tiles/pass.h"
#include "tests/each_isa.h"
#include "tests/kmeans/brute_force.h"

namespace onerec {
namespace {

constexpr int64_t kItems = 600;
constexpr int64_t kNodes = 5;

CostMatrix MatrixOf(const Problem& problem, int64_t columns) {
  CostMatrix matrix;
  matrix.rows = problem.items;
  matrix.columns = columns;
  matrix.costs.assign(problem.items * columns, std::numeric_limits<float>::infinity());
  matrix.errors.assign(problem.items, 0.0f);
  for (int64_t i = 0; i < problem.items; ++i) {
    for (int64_t k = 0; k < problem.nodes; ++k) {
      matrix.costs[i * columns + k] = static_cast<float>(problem.Cost(i, k));
    }
  }
  return matrix;
}

// Items of each node when an item is shared out as exp(-(cost + price) / eps).
std::vector<double> SoftSizes(const Problem& problem, const double* prices, double eps) {
  std::vector<double> sizes(problem.nodes);
  for (int64_t i = 0; i < problem.items; ++i) {
    double sum = 0;
    for (int64_t k = 0; k < problem.nodes; ++k) {
      sum += std::exp(-(problem.Cost(i, k) + prices[k]) / eps);
    }
    for (int64_t k = 0; k < problem.nodes; ++k) {
      sizes[k] += std::exp(-(problem.Cost(i, k) + prices[k]) / eps) / sum;
    }
  }
  return sizes;
}

class AnnealerTest : public EachIsa {};

TEST_P(AnnealerTest, BalancesTheSharesOfAMatrixAndOfLists) {
  // The first node is much cheaper for everybody, the last one asks for twice the share.
  Problem problem = DrawProblem(kItems, kNodes, 7);
  for (int64_t i = 0; i < kItems; ++i) problem.costs[i * kNodes] -= 6;
  const std::vector<double> share{1 / 6.0, 1 / 6.0, 1 / 6.0, 1 / 6.0, 2 / 6.0};
  BalancedKMeansOptions options;
  const KMeansKernels& kernels = CurrentKMeansKernels();
  const CostMatrix matrix = MatrixOf(problem, kernels.nr);
  CandidateLists lists = FullLists(problem);
  const auto check = [&](const auto& rows) {
    Annealer annealer(share, options, kernels);
    std::vector<double> prices(kNodes, 0.0);
    for (const double eps : {4.0, 1.5}) {
      const Annealer::State state = annealer.Balance(rows, eps, 1e-4, prices.data());
      EXPECT_LT(state.off, 1e-3);
      const std::vector<double> sizes = SoftSizes(problem, prices.data(), eps);
      for (int64_t k = 0; k < kNodes; ++k) EXPECT_NEAR(sizes[k] / kItems, share[k], 2e-3) << k;
    }
    EXPECT_GT(annealer.sweeps(), 0);
    return prices;
  };
  const std::vector<double> by_matrix = check(matrix);
  EXPECT_GT(by_matrix[0], by_matrix[4]);
  check(lists);
}

TEST_P(AnnealerTest, HardLabelsAreTheArgmin) {
  const Problem problem = DrawProblem(200, 7, 3);
  const CandidateLists lists = FullLists(problem);
  const std::vector<double> prices{0, 1.5, -2, 0.25, 4, -0.5, 3};
  const BalancedKMeansOptions options;
  const Annealer annealer(std::vector<double>(7, 1 / 7.0), options, CurrentKMeansKernels());
  std::vector<int32_t> labels(200);
  annealer.ListLabels(lists, prices.data(), labels.data());
  std::vector<double> sizes(7);
  for (int64_t i = 0; i < 200; ++i) {
    double least = std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < 7; ++k) least = std::min(least, problem.Cost(i, k) + prices[k]);
    EXPECT_EQ(problem.Cost(i, labels[i]) + prices[labels[i]], least) << i;
    ++sizes[labels[i]];
  }
  double over = 0;
  for (const double size : sizes) over += std::max(0.0, size / 200 - 1 / 7.0);
  EXPECT_NEAR(annealer.OverFull(lists, prices.data()), over, 1e-12);
}

INSTANTIATE_TEST_SUITE_P(Isas, AnnealerTest, ::testing::ValuesIn(kIsas),
                         [](const auto& info) { return std::string(IsaName(info.param)); });

}  // namespace
}  // namespace onerec
