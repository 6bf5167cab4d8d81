// The passes of balanced k-means that a device makes, and a whole fit with them.
#include "cpu/balanced_kmeans_device.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <tuple>
#include <vector>

#include "onerec/balanced_kmeans.h"

namespace onerec {
namespace {

// 190 items and centres of some dimensions, not whole tiles.
struct Data {
  static constexpr int64_t kItems = 190;
  int64_t centre_count, wide;
  std::vector<float> x = std::vector<float>(static_cast<size_t>(kItems * wide));
  std::vector<float> centers = std::vector<float>(static_cast<size_t>(centre_count * wide));
  std::vector<double> prices = std::vector<double>(static_cast<size_t>(centre_count));

  Data(int64_t centre_count_, int64_t wide_) : centre_count(centre_count_), wide(wide_) {
    std::mt19937 draw(0);
    std::normal_distribution<float> normal;
    for (float& value : x) value = normal(draw);
    for (float& value : centers) value = normal(draw);
    for (double& price : prices) price = static_cast<double>(normal(draw));
    // Two centres that no precision tells apart, at item 5.
    for (const int64_t k : {17, 90}) {
      std::copy_n(x.begin() + 5 * wide, wide, centers.begin() + k * wide);
      prices[static_cast<size_t>(k)] = 0;
    }
  }

  FloatRows Rows() const { return {x.data(), kItems, wide, wide}; }

  // |x_i - c_k|^2 + price less |x_i|^2, for every centre.
  std::vector<double> Values(int64_t item) const {
    std::vector<double> values = prices;
    for (int64_t k = 0; k < centre_count; ++k) {
      for (int64_t j = 0; j < wide; ++j) {
        const double own = static_cast<double>(x[static_cast<size_t>(item * wide + j)]);
        const double centre = static_cast<double>(centers[static_cast<size_t>(k * wide + j)]);
        values[static_cast<size_t>(k)] += centre * (centre - 2 * own);
      }
    }
    return values;
  }
};

class KMeansPasses : public testing::TestWithParam<std::tuple<int64_t, int64_t>> {};
// Steps of the walk: four and one.
INSTANTIATE_TEST_SUITE_P(Shapes, KMeansPasses,
                         testing::Values(std::make_tuple(200, 40), std::make_tuple(100, 20)));

TEST_P(KMeansPasses, ArgminIsRightOrLeftOpen) {
  const Data data(std::get<0>(GetParam()), std::get<1>(GetParam()));
  KMeansDevice device(data.Rows(), std::vector<double>(static_cast<size_t>(data.wide), 0.25), 3, 0);
  device.SetCenters(data.centers.data(), data.centre_count);
  std::vector<int32_t> labels(Data::kItems, -7);
  device.Argmin(data.prices.data(), labels.data());
  for (int64_t i = 0; i < Data::kItems; ++i) {
    const std::vector<double> values = data.Values(i);
    const auto best = std::min_element(values.begin(), values.end());
    const int32_t label = labels[static_cast<size_t>(i)];
    if (label != -1) {
      EXPECT_EQ(label, best - values.begin()) << i;
    }
  }
  EXPECT_EQ(labels[5], -1);
  EXPECT_LE(std::count(labels.begin(), labels.end(), -1), 5);
}

TEST_P(KMeansPasses, ColumnSumsAreThoseOfTheEntropicDual) {
  const Data data(std::get<0>(GetParam()), std::get<1>(GetParam()));
  const double eps = 3;
  KMeansDevice device(data.Rows(), std::vector<double>(static_cast<size_t>(data.wide), 0.25), 3, 0);
  device.SetCenters(data.centers.data(), data.centre_count);
  std::vector<double> sums(static_cast<size_t>(data.centre_count)),
      wanted(static_cast<size_t>(data.centre_count));
  device.ColumnSums(Data::kItems, eps, data.prices.data(), sums.data());
  for (int64_t i = 0; i < Data::kItems; ++i) {
    const std::vector<double> values = data.Values(i);
    double sum = 0;
    for (const double value : values) sum += std::exp(-value / eps);
    for (size_t k = 0; k < values.size(); ++k) wanted[k] += std::exp(-values[k] / eps) / sum;
  }
  for (size_t k = 0; k < wanted.size(); ++k) {
    EXPECT_NEAR(sums[k], wanted[k], 0.02 * wanted[k] + 1e-4) << k;
  }
}

TEST(KMeansDevice, AnAssignmentIsTheHosts) {
  std::mt19937 draw(1);
  std::normal_distribution<float> normal;
  constexpr int64_t kItems = 240, kClusters = 12, kWide = 5;
  std::vector<float> x(kItems * kWide);
  for (float& value : x) value = normal(draw);
  const FloatRows rows{x.data(), kItems, kWide, kWide};
  std::vector<double> costs;
  std::vector<std::vector<int32_t>> nearest;
  for (const int device : {-1, 0}) {
    BalancedKMeansOptions options;
    options.cuda_device = device;
    std::vector<double> prices(kClusters);
    std::vector<int32_t> labels(kItems);
    const BalancedAssignment made =
        BalancedAssign(rows, x.data(), kClusters, options, false, prices.data(), labels.data());
    EXPECT_LE(made.gap, 1e-6);
    for (int32_t k = 0; k < kClusters; ++k) {
      EXPECT_EQ(std::count(labels.begin(), labels.end(), k), kItems / kClusters);
    }
    costs.push_back(made.cost);
    PricedArgmin(rows, x.data(), kClusters, nullptr, options, labels.data(), nullptr);
    nearest.push_back(labels);
  }
  EXPECT_NEAR(costs[1], costs[0], 1e-6 * costs[0]);
  EXPECT_EQ(nearest[1], nearest[0]);
}

}  // namespace
}  // namespace onerec
