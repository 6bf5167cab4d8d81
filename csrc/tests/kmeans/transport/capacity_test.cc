#include "kmeans/transport/capacity.h"

#include <gtest/gtest.h>

#include <vector>

namespace onerec {
namespace {

TEST(PlaceDummies, TakesTheLeastFirstAndOfEqualsTheFirst) {
  NodeCapacity capacity{{2, 2, 4, 2}, {1, 1, 2, 1}, 4};
  const Dummies dummies = PlaceDummies(capacity, std::vector<double>{3, 1, 1, 2});
  EXPECT_EQ(dummies.held, (std::vector<int64_t>{0, 1, 2, 1}));
  EXPECT_EQ(dummies.last, 3);
}

TEST(PlaceDummies, WithoutDummiesThereIsNoLast) {
  const NodeCapacity capacity{{2, 2}, {0, 0}, 0};
  const Dummies dummies = PlaceDummies(capacity, std::vector<double>{1, 0});
  EXPECT_EQ(dummies.held, (std::vector<int64_t>{0, 0}));
  EXPECT_EQ(dummies.last, -1);
}

}  // namespace
}  // namespace onerec
