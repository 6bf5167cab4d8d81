#include "kmeans/lists/maker.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "tests/each_isa.h"

namespace onerec {
namespace {

constexpr int64_t kItems = 3000;
constexpr int64_t kClusters = 64;  // more groups than a list has entries: some are not listed
constexpr int64_t kColumns = 6;

class ListMakerTest : public EachIsa {
 protected:
  void SetUp() override {
    EachIsa::SetUp();
    if (IsSkipped()) return;
    x_ = Normal(kItems * kColumns, 1);
    centers_ = Normal(kClusters * kColumns, 2);
    for (const float value : Normal(kClusters, 3)) {
      prices_.push_back(static_cast<double>(value));
    }
    rows_ = {x_.data(), kItems, kColumns, kColumns};
  }

  double Exact(const Nodes& nodes, int64_t item, int64_t node, const std::vector<double>& prices) {
    const float* const center = nodes.centers.data() + node * kColumns;
    return CurrentKMeansKernels().exact_cost(x_.data() + item * kColumns, center, kColumns) +
           prices[node];
  }

  // Every listed value is what it says, and no centre that is not listed is below Edge().
  void Check(const Nodes& nodes, const CandidateLists& lists, const std::vector<double>& now) {
    const MovedLists moved(lists, now.data());
    std::vector<int32_t> suspects;
    for (int64_t i = 0; i < kItems; ++i) {
      const CandidateLists::Chunk& chunk = lists.chunks[i / lists.chunk_rows];
      const int64_t row = i % lists.chunk_rows;
      std::vector<double> exact;
      for (int64_t k = 0; k < kClusters; ++k) exact.push_back(Exact(nodes, i, k, now));
      // What rel is counted from: the same for all entries of the row.
      const int32_t first = chunk.code[chunk.offset[row]];
      const double base =
          exact[first] - static_cast<double>(chunk.rel[chunk.offset[row]] + moved.moved()[first]);
      std::vector<uint8_t> listed(kClusters);
      const double error = static_cast<double>(chunk.error[row]) + 1e-5;
      for (int64_t t = chunk.offset[row]; t < chunk.offset[row + 1]; ++t) {
        if (chunk.rel[t] == std::numeric_limits<float>::infinity()) continue;
        const int32_t k = chunk.code[t];
        listed[k] = 1;
        EXPECT_NEAR(base + static_cast<double>(chunk.rel[t] + moved.moved()[k]), exact[k], error);
      }
      const double edge = base + moved.Edge(chunk, row);
      const double limit = *std::min_element(exact.begin(), exact.end()) + 0.5;
      moved.Suspects(chunk, row, limit - base, suspects);
      for (int64_t k = 0; k < kClusters; ++k) {
        if (listed[k] != 0) continue;
        EXPECT_GE(exact[k], edge - error) << i << ' ' << k;
        if (exact[k] < limit - error) {
          EXPECT_NE(std::find(suspects.begin(), suspects.end(), k), suspects.end())
              << i << ' ' << k;
        }
      }
    }
  }

  std::vector<float> x_, centers_;
  std::vector<double> prices_;
  FloatRows rows_;
};

TEST_P(ListMakerTest, ListsKnowTheirRangeAtTheirPricesAndAtOthers) {
  BalancedKMeansOptions options;
  const KMeansKernels& kernels = CurrentKMeansKernels();
  const Nodes nodes = MakeNodes(centers_.data(), kClusters, kColumns, options);
  ASSERT_EQ(nodes.count, kClusters);
  const std::vector<double> mean = ColumnMeans(rows_, 1);
  PackedCenters packed(nodes.centers.data(), kClusters, kColumns, mean, kernels);
  CandidatePass pass(rows_, nodes, options, kernels, packed, nullptr);
  BalancedAssignment report;
  ListMaker maker(rows_, mean, nodes, options, kernels, packed, pass, report);
  maker.Build(prices_.data());
  EXPECT_EQ(report.passes, 1);
  const CandidateLists& lists = maker.lists();
  ASSERT_EQ(lists.rows, kItems);
  EXPECT_LT(lists.entries(), kItems * kClusters / 2);
  EXPECT_LT(lists.reach, std::numeric_limits<double>::infinity());
  Check(nodes, lists, prices_);
  std::vector<double> moved(prices_);
  for (int64_t k = 0; k < kClusters; ++k) moved[k] += k % 7 == 0 ? -0.4 : 0.1;
  Check(nodes, lists, moved);
  // A few prices have fallen far: lists are extended by these centres.
  std::vector<double> fallen(prices_);
  for (const int64_t k : {3, 40, 61}) fallen[k] -= 3;
  ASSERT_TRUE(maker.Extend(fallen.data()));
  Check(nodes, lists, fallen);
  // A label is listed, however far it is.
  std::vector<int32_t> labels(kItems);
  for (int64_t i = 0; i < kItems; ++i) labels[i] = static_cast<int32_t>(i % kClusters);
  maker.AddLabels(labels.data());
  for (int64_t i = 0; i < kItems; ++i) {
    const CandidateLists::Chunk& chunk = lists.chunks[i / lists.chunk_rows];
    const int64_t row = i % lists.chunk_rows;
    const auto begin = chunk.code.begin() + chunk.offset[row];
    const auto end = chunk.code.begin() + chunk.offset[row + 1];
    EXPECT_NE(std::find(begin, end, labels[i]), end) << i;
  }
  Check(nodes, lists, fallen);
}

INSTANTIATE_TEST_SUITE_P(Isas, ListMakerTest, ::testing::ValuesIn(kIsas),
                         [](const auto& info) { return std::string(IsaName(info.param)); });

}  // namespace
}  // namespace onerec
