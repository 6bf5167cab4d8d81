#include "kmeans/transport/paths.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "tests/kmeans/brute_force.h"

namespace onerec {
namespace {

class MatrixCosts : public FinishCosts {
 public:
  explicit MatrixCosts(const Problem& problem) : problem_(problem) {}
  void Rows(const int32_t* items, int64_t count, const Body& body) const override {
    std::vector<float> row(problem_.nodes);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < problem_.nodes; ++k) {
        row[k] = static_cast<float>(problem_.Cost(items[i], k));
      }
      body(i, row.data(), 0.0f);
    }
  }
  double Exact(int32_t item, int32_t node) const override { return problem_.Cost(item, node); }

 private:
  const Problem& problem_;
};

TEST(ExactFinish, EqualsBruteForceAndItsPricesProveIt) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    const Problem problem = DrawProblem(3 + seed % 6, 2 + seed % 2, seed);
    std::vector<int32_t> labels;  // the hard argmin
    for (int64_t i = 0; i < problem.items; ++i) {
      const double* const row = problem.costs.data() + i * problem.nodes;
      labels.push_back(static_cast<int32_t>(std::min_element(row, row + problem.nodes) - row));
    }
    std::vector<double> prices(problem.nodes, 0.0);
    const MatrixCosts costs(problem);
    ExactFinish finish(problem.capacity, costs, problem.items, labels.data(), prices.data(), 1,
                       nullptr);
    finish.Run();
    const double best = BruteForce(problem);
    ASSERT_TRUE(problem.Holds(labels.data())) << seed;
    EXPECT_EQ(problem.Cost(labels.data()), best) << seed;
    EXPECT_NEAR(DualValue(problem, prices.data()), best, 1e-9) << seed;
    finish.CentrePrices(3);
    EXPECT_NEAR(DualValue(problem, prices.data()), best, 1e-9) << seed;
  }
}

}  // namespace
}  // namespace onerec
