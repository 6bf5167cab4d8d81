// The passes of balanced k-means that a device makes, and a whole fit with them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "kmeans/lists/candidates.h"
#include "kmeans/nodes.h"
#include "kmeans/tiles/device.h"
#include "onerec/balanced_kmeans.h"
#include "tests/cuda_on_host/cuda_runtime.h"

namespace onerec {
namespace {

// 190 items and centres of some dimensions, not whole tiles.
struct Data {
  static constexpr int64_t kItems = 190;
  int64_t centre_count, wide;
  std::vector<float> x = std::vector<float>(kItems * wide);
  std::vector<float> centers = std::vector<float>(centre_count * wide);
  std::vector<double> prices = std::vector<double>(centre_count);

  Data(int64_t centre_count_, int64_t wide_) : centre_count(centre_count_), wide(wide_) {
    std::mt19937 draw(0);
    std::normal_distribution<float> normal;
    for (float& value : x) value = normal(draw);
    for (float& value : centers) value = normal(draw);
    for (double& price : prices) price = static_cast<double>(normal(draw));
    // Two centres that no precision tells apart, at item 5.
    for (const int64_t k : {17, 90}) {
      std::copy_n(x.begin() + 5 * wide, wide, centers.begin() + k * wide);
      prices[k] = 0;
    }
  }

  FloatRows Rows() const { return {x.data(), kItems, wide, wide}; }

  // |x_i - c_k|^2 + price less |x_i|^2, for every centre.
  std::vector<double> Values(int64_t item) const {
    std::vector<double> values = prices;
    for (int64_t k = 0; k < centre_count; ++k) {
      for (int64_t j = 0; j < wide; ++j) {
        const double own = static_cast<double>(x[item * wide + j]);
        const double centre = static_cast<double>(centers[k * wide + j]);
        values[k] += centre * (centre - 2 * own);
      }
    }
    return values;
  }
};

TEST(KMeansDevice, LeavesTheCurrentDevice) {
  const Data data(100, 20);
  KMeansDevice device(data.Rows(), std::vector<double>(20, 0.25), 1);
  device.SetCenters(data.centers.data(), data.centre_count, {});
  device.SetPrices(nullptr);
  std::vector<int32_t> labels(Data::kItems);
  device.Argmin(labels.data());
  device.Candidates(nullptr, 0, Data::kItems, 0, 0);
  int current = -1;
  cudaGetDevice(&current);
  EXPECT_EQ(current, 0);
}

class KMeansPasses : public testing::TestWithParam<std::tuple<int64_t, int64_t>> {};
// Steps of the walk: four and one.
INSTANTIATE_TEST_SUITE_P(Shapes, KMeansPasses,
                         testing::Values(std::make_tuple(200, 40), std::make_tuple(100, 20)));

TEST_P(KMeansPasses, ArgminIsRightOrLeftOpen) {
  const Data data(std::get<0>(GetParam()), std::get<1>(GetParam()));
  KMeansDevice device(data.Rows(), std::vector<double>(data.wide, 0.25), 0);
  device.SetCenters(data.centers.data(), data.centre_count, {});
  device.SetPrices(data.prices.data());
  std::vector<int32_t> labels(Data::kItems, -7);
  device.Argmin(labels.data());
  for (int64_t i = 0; i < Data::kItems; ++i) {
    const std::vector<double> values = data.Values(i);
    const auto best = std::min_element(values.begin(), values.end());
    const int32_t label = labels[i];
    if (label != -1) {
      EXPECT_EQ(label, best - values.begin()) << i;
    }
  }
  EXPECT_EQ(labels[5], -1);
  EXPECT_LE(std::count(labels.begin(), labels.end(), -1), 5);
}

// Items in any order, some twice, or a piece of all that begins within a tile.
TEST_P(KMeansPasses, CandidatesAreAllThatAreNear) {
  const Data data(std::get<0>(GetParam()), std::get<1>(GetParam()));
  const std::vector<int32_t> groups = {0, 1, 30, 31, 75, static_cast<int32_t>(data.centre_count)};
  const std::vector<double> mean(data.wide, 0.25);
  KMeansDevice device(data.Rows(), mean, 0);
  device.SetCenters(data.centers.data(), data.centre_count, groups);
  device.SetPrices(data.prices.data());
  std::vector<int64_t> subset = {189, 5, 5, 128, 0};
  for (int64_t i = 0; i < 126; ++i) subset.push_back(7 * i % Data::kItems);
  const double infinity = std::numeric_limits<double>::infinity();
  int full = 0, leaders = 0, left_out = 0;
  const auto check = [&](const int64_t* some, int64_t first, int64_t count, double threshold,
                         double reach) {
    const KMeansDevice::Lists& lists = device.Candidates(some, first, count, threshold, reach);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t item = some != nullptr ? some[r] : first + r;
      const std::vector<double> values = data.Values(item);
      // Values are less |x - mean|^2, here less |x|^2.
      double shift = 0;
      for (int64_t j = 0; j < data.wide; ++j) {
        const auto own = static_cast<double>(data.x[item * data.wide + j]);
        shift += own * own - (own - 0.25) * (own - 0.25);
      }
      const double low = *std::min_element(values.begin(), values.end());
      const auto error = static_cast<double>(device.Error(item));
      EXPECT_LT(error, 0.05);
      std::vector<double> best(groups.size() - 1, infinity);
      std::vector<size_t> group(values.size());
      for (size_t g = 0; g + 1 < groups.size(); ++g) {
        for (int32_t k = groups[g]; k < groups[g + 1]; ++k) {
          best[g] = std::min(best[g], values[k]);
          group[k] = g;
        }
      }
      const int32_t size = lists.count[r];
      const auto near = [&](double by) {
        return std::count_if(values.begin(), values.end(), [&](double v) { return v <= low + by; });
      };
      if (size < 0) {
        ++full;
        EXPECT_GT(near(std::max(threshold, reach) + 4 * error), 128);
        continue;
      }
      EXPECT_LE(near(threshold), 128);
      std::vector<uint8_t> listed(values.size());
      int32_t before = -1;
      for (int32_t t = 0; t < size; ++t) {
        const auto at = lists.start[r] + t;
        const int32_t k = lists.code[at];
        ASSERT_GT(k, before) << item;
        ASSERT_LT(k, data.centre_count);
        before = k;
        const size_t node = k;
        listed[node] = 1;
        EXPECT_NEAR(static_cast<double>(lists.value[at]), values[node] + shift, error);
        if (values[node] <= low + threshold + 4 * error) continue;
        ++leaders;
        EXPECT_LE(values[node], best[group[node]] + 2 * error);
        EXPECT_LE(values[node], low + reach + 4 * error);
      }
      for (size_t k = 0; k < values.size(); ++k) {
        left_out += listed[k] == 0;
        if (values[k] <= low + threshold) {
          EXPECT_TRUE(listed[k]) << item << " " << k;
        }
      }
      for (size_t g = 0; reach > threshold && g < best.size(); ++g) {
        if (best[g] > low + reach) continue;
        int32_t of_group = 0;
        for (int32_t k = groups[g]; k < groups[g + 1]; ++k) {
          of_group += listed[k];
        }
        EXPECT_GT(of_group, 0) << item << " " << g;
      }
    }
  };
  const auto some = static_cast<int64_t>(subset.size());
  check(nullptr, 0, Data::kItems, 0, 0);
  check(subset.data(), 0, some, 8, 20);
  EXPECT_GT(leaders, 0);
  check(nullptr, 3, 140, 8, infinity);
  check(nullptr, 189, 1, 8, 8);
  EXPECT_EQ(full, 0);
  EXPECT_GT(left_out, 0);
  // The tenth of item 7 is beyond the threshold by less than two values err.
  const std::vector<double> values = data.Values(7);
  std::vector<double> sorted = values;
  std::sort(sorted.begin(), sorted.end());
  const auto error = static_cast<double>(device.Error(7));
  const double edge = sorted[9] - sorted[0] - 1.5 * error;
  const KMeansDevice::Lists& lists = device.Candidates(nullptr, 7, 1, edge, edge);
  EXPECT_GE(lists.count[0], 10);
  EXPECT_EQ(lists.count[0], std::count_if(values.begin(), values.end(), [&](double value) {
              return value <= sorted[9] + 0.5 * error;
            }));
  check(subset.data(), 0, some, infinity, infinity);
  EXPECT_EQ(full, data.centre_count > 128 ? some : 0);
}

// Items and centres by which device and host may differ.
enum class Kind { kRandom, kClustered, kDuplicated };

std::vector<float> Items(Kind kind, int64_t items, int64_t wide) {
  std::mt19937 draw(2);
  std::normal_distribution<float> normal;
  std::vector<float> x(items * wide);
  for (int64_t i = 0; i < items; ++i) {
    for (int64_t j = 0; j < wide; ++j) {
      float& value = x[i * wide + j];
      value = normal(draw);
      if (kind == Kind::kClustered) value = 0.1f * value + 3 * static_cast<float>(i * i % 7);
      if (kind == Kind::kDuplicated) value = std::round(value);
    }
  }
  return x;
}

class KMeansOnDevice : public testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(Data, KMeansOnDevice,
                         testing::Values(Kind::kRandom, Kind::kClustered, Kind::kDuplicated));

TEST_P(KMeansOnDevice, APassListsWhatTheHostsDoes) {
  constexpr int64_t kItems = 500, kCentres = 180, kWide = 6;
  const std::vector<float> x = Items(GetParam(), kItems, kWide);
  const FloatRows rows{x.data(), kItems, kWide, kWide};
  BalancedKMeansOptions options;
  options.num_threads = 2;
  const KMeansKernels& kernels = CurrentKMeansKernels();
  const Nodes nodes = MakeNodes(x.data(), kCentres, kWide, options);
  const std::vector<double> mean = ColumnMeans(rows, 1);
  PackedCenters centers(nodes.centers.data(), nodes.count, kWide, mean, kernels);
  KMeansDevice device(rows, mean, 0);
  CandidatePass host_pass(rows, nodes, options, kernels, centers, nullptr);
  CandidatePass device_pass(rows, nodes, options, kernels, centers, &device, 192);
  std::vector<double> prices(nodes.count);
  for (size_t k = 0; k < prices.size(); ++k) prices[k] = 0.1 * std::sin(static_cast<double>(k));
  std::vector<int64_t> subset;
  for (int64_t i = 1; i < kItems; i += 3) subset.push_back(i);
  // Of the last some rows have too many for the device.
  for (const auto& [threshold, reach] : {std::make_pair(0.0, 0.0),
                                         {0.5, 4.0},
                                         {1.0, std::numeric_limits<double>::infinity()},
                                         {14.0, 14.0}}) {
    for (const bool all : {true, false}) {
      const auto count = all ? kItems : static_cast<int64_t>(subset.size());
      const auto run = [&](CandidatePass& pass) {
        std::vector<Candidates> found(count);
        std::vector<int64_t> chunk(count, -1);
        pass.Run(prices.data(), threshold, reach, all ? nullptr : subset.data(), count,
                 [&](int64_t c, int64_t i, Candidates& row) {
                   found[i] = row;
                   chunk[i] = c;
                 });
        return std::make_pair(found, chunk);
      };
      const auto [wanted, chunks] = run(host_pass);
      const auto [made, made_chunks] = run(device_pass);
      EXPECT_EQ(made_chunks, chunks);
      int64_t same = 0;
      for (size_t i = 0; i < made.size(); ++i) {
        const Candidates& host = wanted[i];
        const Candidates& own = made[i];
        const float error = host.error + own.error;
        EXPECT_NEAR(own.low, host.low, error);
        same += own.code == host.code;
        // One may list what the other leaves out only where an error decides.
        std::vector<int32_t> differ;
        std::set_symmetric_difference(host.code.begin(), host.code.end(), own.code.begin(),
                                      own.code.end(), std::back_inserter(differ));
        for (const int32_t k : differ) {
          const Candidates& of =
              std::binary_search(host.code.begin(), host.code.end(), k) ? host : own;
          const auto at = std::lower_bound(of.code.begin(), of.code.end(), k) - of.code.begin();
          const double above = static_cast<double>(of.value[at] - of.low);
          const bool edge = std::abs(above - threshold) <= 2 * static_cast<double>(error) ||
                            std::abs(above - reach) <= 2 * static_cast<double>(error);
          // Of two equal leaders either is one.
          EXPECT_TRUE(edge || GetParam() == Kind::kDuplicated) << i << " " << k;
        }
      }
      EXPECT_GT(same, GetParam() == Kind::kRandom ? count * 9 / 10 : count / 3);
    }
  }
}

// With so small a budget that not all costs are kept: all passes are the device's.
TEST_P(KMeansOnDevice, AnAssignmentIsTheHosts) {
  constexpr int64_t kItems = 700, kClusters = 120, kWide = 5;
  const std::vector<float> x = Items(GetParam(), kItems, kWide);
  const FloatRows rows{x.data(), kItems, kWide, kWide};
  std::vector<BalancedAssignment> steps[2];
  std::vector<std::vector<int32_t>> labels[2];
  for (const int device : {-1, 0}) {
    BalancedKMeansOptions options;
    options.num_threads = 2;
    options.memory_budget = 192 * kItems + 4096 * kClusters;
    options.cuda_device = device;
    std::vector<double> prices(kClusters);
    std::vector<int32_t> own(kItems);
    std::vector<float> centers(x.begin(), x.begin() + kClusters * kWide);
    for (const bool again : {false, true}) {
      steps[device + 1].push_back(BalancedAssign(rows, centers.data(), kClusters, options, again,
                                                 prices.data(), own.data(), again));
      labels[device + 1].push_back(own);
      for (float& value : centers) value *= 0.98f;
    }
    PricedArgmin(rows, x.data(), kClusters, nullptr, options, own.data(), nullptr);
    labels[device + 1].push_back(own);
  }
  for (size_t step = 0; step < 2; ++step) {
    EXPECT_NEAR(steps[1][step].cost, steps[0][step].cost, 1e-9 * steps[0][step].cost);
    EXPECT_LE(steps[1][step].gap, 1e-9);
    for (int32_t k = 0; k < kClusters; ++k) {
      const int64_t size = std::count(labels[1][step].begin(), labels[1][step].end(), k);
      EXPECT_TRUE(size == 5 || size == 6) << size;
    }
  }
  if (GetParam() != Kind::kDuplicated) {
    EXPECT_EQ(labels[1], labels[0]);
  }
}

}  // namespace
}  // namespace onerec
