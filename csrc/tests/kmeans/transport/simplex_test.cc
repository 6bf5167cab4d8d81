#include "kmeans/transport/simplex.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "tests/kmeans/brute_force.h"

namespace onerec {
namespace {

ListSimplex::Exact ExactCosts(const Problem& problem) {
  return [&problem](int64_t item, int32_t node) { return problem.Cost(item, node); };
}

TEST(ListSimplex, EqualsBruteForce) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    const Problem problem = DrawProblem(3 + seed % 6, 2 + seed % 2, seed);
    const CandidateLists lists = FullLists(problem);
    std::vector<int32_t> labels;  // of the right sizes
    for (int64_t i = 0; i < problem.items; ++i) {
      labels.push_back(static_cast<int32_t>(i % problem.nodes));
    }
    ASSERT_TRUE(problem.Holds(labels.data()));
    const std::vector<double> prices(problem.nodes, 0.0);
    ListSimplex simplex(problem.capacity, lists, 1, ExactCosts(problem), prices.data(),
                        labels.data());
    simplex.Solve();
    const double best = BruteForce(problem);
    ASSERT_TRUE(problem.Holds(simplex.labels().data())) << seed;
    EXPECT_EQ(problem.Cost(simplex.labels().data()), best) << seed;
    EXPECT_NEAR(DualValue(problem, simplex.prices().data()), best, 1e-9) << seed;
  }
}

TEST(ListSimplex, ALargePenaltyMendsTheSizesOfTheHardArgmin) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    const Problem problem = DrawProblem(3 + seed % 6, 2 + seed % 2, seed);
    const CandidateLists lists = FullLists(problem);
    const std::vector<double> prices(problem.nodes, 0.0);
    ListSimplex simplex(problem.capacity, lists, 1, ExactCosts(problem), prices.data(), nullptr);
    EXPECT_EQ(simplex.Solve(1000), 0) << seed;
    ASSERT_TRUE(problem.Holds(simplex.labels().data())) << seed;
    EXPECT_EQ(problem.Cost(simplex.labels().data()), BruteForce(problem)) << seed;
  }
}

TEST(ListSimplex, ASmallPenaltyLeavesWhatCostsMore) {
  // Both items are 5 cheaper in the first cluster: a penalty of 2 a place moves none of them.
  Problem problem{2, 2, {0, 5, 0, 5}, {{1, 1}, {0, 0}, 0}};
  const CandidateLists lists = FullLists(problem);
  const std::vector<double> prices(2, 0.0);
  ListSimplex simplex(problem.capacity, lists, 1, ExactCosts(problem), prices.data(), nullptr);
  EXPECT_EQ(simplex.Solve(2), 1);
  EXPECT_EQ(simplex.labels(), (std::vector<int32_t>{0, 0}));
  EXPECT_EQ(simplex.Solve(3), 0);
}

}  // namespace
}  // namespace onerec
