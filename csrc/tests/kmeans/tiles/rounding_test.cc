#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "kmeans/tiles/pass.h"
#include "tests/each_isa.h"

namespace onerec {
namespace {

class RoundingTest : public EachIsa {};

// Tiles, less the row's constant, are within the bound of the exact cost + price; and not far below
// the bound, which would make it useless.
TEST_P(RoundingTest, TilesAreWithinTheirBound) {
  const KMeansKernels& kernels = CurrentKMeansKernels();
  struct Case {
    int64_t d;
    float offset, spread, price;
  };
  // Of long rows the products make the error, of large prices the bias.
  for (const auto& [d, offset, spread, price] :
       {Case{1, 0, 1, 20}, Case{3, 1000, 1, 20}, Case{32, 0, 1, 20}, Case{300, 1000, 1, 20},
        Case{3, 0, 1e4f, 1}, Case{32, 0, 1e4f, 1}, Case{300, 0, 1e4f, 1}}) {
    const int64_t n = 97, clusters = 41;
    std::vector<float> x = Normal(n * d, 1, spread), centers = Normal(clusters * d, 2, 3.0f);
    for (float& value : x) value += offset;
    for (float& value : centers) value += offset;
    std::vector<double> prices;
    for (const float value : Normal(clusters, 3, price)) {
      prices.push_back(static_cast<double>(value));
    }
    const FloatRows rows{x.data(), n, d, d};
    const std::vector<double> mean(d, static_cast<double>(offset));
    PackedCenters packed(centers.data(), clusters, d, mean, kernels);
    packed.SetPrices(prices.data());
    double largest = 0;  // error, in the bound
    DensePass(rows, nullptr, n, packed, kernels, BalancedKMeansOptions(),
              [&](int64_t, int64_t i, const float* tile, double square) {
                for (int64_t k = 0; k < clusters; ++k) {
                  long double exact = static_cast<long double>(prices[k]);
                  for (int64_t j = 0; j < d; ++j) {
                    const long double to = packed.mean()[j];
                    const long double a = x[i * d + j] - to, c = centers[k * d + j] - to;
                    exact += c * c - 2 * a * c;
                  }
                  const long double error = std::abs(static_cast<long double>(tile[k]) - exact);
                  const auto bound = static_cast<long double>(packed.Error(square));
                  EXPECT_LE(error, bound) << d << ' ' << spread << ' ' << i << ' ' << k;
                  largest = std::max(largest, static_cast<double>(error / bound));
                }
              });
    EXPECT_GT(largest, 0.002) << d << ' ' << spread;
  }
}

TEST_P(RoundingTest, NearCostIsWithinItsBound) {
  const KMeansKernels& kernels = CurrentKMeansKernels();
  for (const int64_t d : {1, 7, 64, 513}) {
    const std::vector<float> x = Normal(d, 4), c = Normal(d, 5);
    long double exact = 0;
    for (int64_t j = 0; j < d; ++j) {
      const long double difference = static_cast<long double>(x[j]) - c[j];
      exact += difference * difference;
    }
    const auto near = static_cast<long double>(kernels.near_cost(x.data(), c.data(), d));
    EXPECT_LE(std::abs(near - exact), exact * (d + 8) * 0x1p-24L) << d;
    EXPECT_NEAR(kernels.exact_cost(x.data(), c.data(), d), static_cast<double>(exact),
                1e-13 * static_cast<double>(exact));
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, RoundingTest, ::testing::ValuesIn(kIsas),
                         [](const auto& info) { return std::string(IsaName(info.param)); });

}  // namespace
}  // namespace onerec
