#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "onerec/balanced_kmeans.h"
#include "onerec/runtime.h"

namespace onerec {
namespace {

struct Data {
  int64_t rows;
  int64_t columns;
  std::vector<float> values;

  FloatRows View() const { return {values.data(), rows, columns, columns}; }
};

Data Normal(int64_t rows, int64_t columns, uint64_t seed = 0) {
  Data x{rows, columns, std::vector<float>(rows * columns)};
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  for (float& value : x.values) value = normal(random);
  return x;
}

Data Blobs(int64_t rows, int64_t columns, float spread) {
  const Data means = Normal(5, columns, 7);
  Data x = Normal(rows, columns);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t blob = std::min<int64_t>(4, i % 11);  // most of the rows are in the last
    for (int64_t j = 0; j < columns; ++j) {
      float& value = x.values[i * columns + j];
      value = means.values[blob * columns + j] + spread * value;
    }
  }
  return x;
}

Data Duplicated(int64_t rows, int64_t columns) { return Blobs(rows, columns, 0); }

Data Collinear(int64_t rows, int64_t columns) {
  Data x{rows, columns, {}};
  for (int64_t i = 0; i < rows; ++i) {
    x.values.insert(x.values.end(), columns, static_cast<float>(i * 7 % 13));
  }
  return x;
}

Data FarAway(int64_t rows, int64_t columns) {
  Data x = Blobs(rows, columns, 0.5f);
  for (float& value : x.values) value += 1000;
  return x;
}

double Squared(const Data& x, int64_t i, const float* center) {
  double sum = 0;
  for (int64_t j = 0; j < x.columns; ++j) {
    const double difference =
        static_cast<double>(x.values[i * x.columns + j]) - static_cast<double>(center[j]);
    sum += difference * difference;
  }
  return sum;
}

// Cheapest assignment to sizes floor/ceil of N/K by the Hungarian method: one column for each
// place, dummy rows on the places that stay free.
double CheapestCost(const Data& x, const std::vector<float>& centers, int64_t clusters) {
  const int64_t low = x.rows / clusters;
  const int64_t rest = x.rows % clusters;
  const int64_t places = low + (rest > 0 ? 1 : 0);
  const int64_t n = places * clusters;
  std::vector<double> costs(n * n, 0.0);
  double most = 1;
  for (int64_t i = 0; i < x.rows; ++i) {
    for (int64_t c = 0; c < n; ++c) {
      double& cost = costs[i * n + c];
      cost = Squared(x, i, centers.data() + c / places * x.columns);
      most += cost;
    }
  }
  for (int64_t i = x.rows; i < n; ++i) {
    for (int64_t c = 0; c < n; ++c) {
      if (c % places != places - 1) costs[i * n + c] = most;
    }
  }
  std::vector<double> u(n + 1);
  std::vector<double> v(n + 1);
  std::vector<size_t> row_of(n + 1);
  for (int64_t i = 1; i <= n; ++i) {
    std::vector<double> least(n + 1, std::numeric_limits<double>::infinity());
    std::vector<size_t> before(n + 1);
    std::vector<bool> done(n + 1);
    size_t column = 0;
    row_of[0] = i;
    while (row_of[column] != 0) {
      done[column] = true;
      const size_t row = row_of[column];
      size_t next = 0;
      double step = std::numeric_limits<double>::infinity();
      for (int64_t c = 1; c <= n; ++c) {
        if (done[c]) continue;
        const double reduced = costs[(row - 1) * n + c - 1] - u[row] - v[c];
        if (reduced < least[c]) {
          least[c] = reduced;
          before[c] = column;
        }
        if (least[c] < step) {
          step = least[c];
          next = c;
        }
      }
      for (int64_t c = 0; c <= n; ++c) {
        if (done[c]) {
          u[row_of[c]] += step;
          v[c] -= step;
        } else {
          least[c] -= step;
        }
      }
      column = next;
    }
    for (; column != 0; column = before[column]) row_of[column] = row_of[before[column]];
  }
  double total = 0;
  for (int64_t c = 1; c <= n; ++c) {
    total += costs[(row_of[c] - 1) * n + c - 1];
  }
  return total;
}

struct Fit {
  std::vector<float> centers;
  std::vector<double> prices;
  std::vector<int32_t> labels;
  BalancedKMeansResult result;
};

Fit FitTo(const Data& x, int64_t clusters, const BalancedKMeansOptions& options) {
  Fit fit{std::vector<float>(clusters * x.columns),
          std::vector<double>(clusters),
          std::vector<int32_t>(x.rows),
          {}};
  fit.result = BalancedKMeansFit(x.View(), clusters, options, false, fit.centers.data(),
                                 fit.prices.data(), fit.labels.data());
  return fit;
}

std::vector<int64_t> Sizes(const std::vector<int32_t>& labels, int64_t clusters) {
  std::vector<int64_t> sizes(clusters);
  for (const int32_t label : labels) ++sizes.at(label);
  return sizes;
}

// Message of the std::invalid_argument that the call throws; empty if none.
std::string Refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

class OnEveryIsa : public testing::Test {
 protected:
  void Run(const std::function<void()>& body) {
    for (const Isa isa : kIsas) {
      if (!IsaAvailable(isa) || isa > Isa::kAvx512) continue;
      SCOPED_TRACE(IsaName(isa));
      SetIsa(isa);
      body();
    }
  }
  void TearDown() override { SetIsa(before_); }

 private:
  Isa before_ = CurrentIsa();
};

using BalancedKMeansExact = OnEveryIsa;

TEST_F(BalancedKMeansExact, CostsWhatTheCheapestAssignmentCosts) {
  const std::vector<std::pair<const char*, std::function<Data(int64_t, int64_t)>>> makers = {
      {"normal", [](int64_t n, int64_t d) { return Normal(n, d); }},
      {"blobs", [](int64_t n, int64_t d) { return Blobs(n, d, 0.3f); }},
      {"tight", [](int64_t n, int64_t d) { return Blobs(n, d, 1e-4f); }},
      {"duplicated", Duplicated},
      {"collinear", Collinear},
      {"far away", FarAway},
  };
  Run([&] {
    for (const auto& [name, make] : makers) {
      for (const auto& [rows, clusters] :
           std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {33, 1}, {33, 33}, {50, 7}, {60, 12}}) {
        SCOPED_TRACE(std::string(name) + " " + std::to_string(rows) + " " +
                     std::to_string(clusters));
        const Data x = make(rows, 5);
        BalancedKMeansOptions options;
        options.max_iter = 3;
        const Fit fit = FitTo(x, clusters, options);
        for (const int64_t size : Sizes(fit.labels, clusters)) {
          EXPECT_GE(size, rows / clusters);
          EXPECT_LE(size, (rows + clusters - 1) / clusters);
        }
        double cost = 0;
        double spread = 0;
        for (int64_t i = 0; i < rows; ++i) {
          const float* center = fit.centers.data() + fit.labels[i] * x.columns;
          cost += Squared(x, i, center);
          spread += Squared(x, i, fit.centers.data());
        }
        const double slack = 1e-6 * cost + 1e-9 * spread + 1e-12;
        EXPECT_NEAR(fit.result.inertia, cost, slack);
        EXPECT_NEAR(cost, CheapestCost(x, fit.centers, clusters), slack);
        EXPECT_LE(fit.result.work.cost - fit.result.work.dual, slack);
      }
    }
  });
}

TEST_F(BalancedKMeansExact, InstructionSetsAgreeAtGivenCenters) {
  const Data x = Blobs(1500, 24, 0.4f);
  const std::vector<float> centers = Normal(30, 24, 3).values;
  BalancedKMeansOptions options;
  std::vector<int32_t> first;
  double cost = 0;
  Run([&] {
    std::vector<double> prices(30);
    std::vector<int32_t> labels(1500);
    const BalancedAssignment found =
        BalancedAssign(x.View(), centers.data(), 30, options, false, prices.data(), labels.data());
    EXPECT_LE(found.gap, 1e-9);
    if (first.empty()) {
      first = labels;
      cost = found.cost;
    }
    EXPECT_EQ(labels, first);
    EXPECT_DOUBLE_EQ(found.cost, cost);
    // From the solution the solution comes back.
    std::vector<int32_t> again(1500);
    BalancedAssign(x.View(), centers.data(), 30, options, true, prices.data(), again.data());
    EXPECT_EQ(again, labels);
  });
}

TEST(BalancedKMeans, SameForEveryNumberOfThreads) {
  const Data x = Blobs(3001, 16, 0.4f);
  for (const auto method : {BalancedMethod::kPriced, BalancedMethod::kSequential}) {
    BalancedKMeansOptions options;
    options.method = method;
    options.seed = 5;
    options.max_iter = 3;
    const Fit one = FitTo(x, 40, options);
    for (const int num_threads : {1, 2, 5}) {
      options.num_threads = num_threads;
      const Fit other = FitTo(x, 40, options);
      EXPECT_EQ(other.labels, one.labels);
      EXPECT_EQ(other.centers, one.centers);
      EXPECT_EQ(other.prices, one.prices);
    }
  }
}

TEST(BalancedKMeans, SequentialTakesTheNearestLeft) {
  const Data x = Normal(101, 3);
  const int64_t clusters = 9;
  BalancedKMeansOptions options;
  options.method = BalancedMethod::kSequential;
  options.max_iter = 1;
  std::vector<float> centers(x.values.begin(), x.values.begin() + clusters * 3);
  const std::vector<float> start = centers;
  std::vector<double> prices(clusters);
  std::vector<int32_t> labels(101);
  BalancedKMeansFit(x.View(), clusters, options, true, centers.data(), prices.data(),
                    labels.data());
  std::vector<int32_t> wanted(101, -1);
  for (int64_t k = 0; k < clusters; ++k) {
    std::vector<std::pair<double, size_t>> left;
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i] < 0) {
        left.emplace_back(Squared(x, static_cast<int64_t>(i), start.data() + k * 3), i);
      }
    }
    std::sort(left.begin(), left.end());
    left.resize(101 / clusters + (k < 101 % clusters ? 1 : 0));
    for (const auto& [distance, i] : left) wanted[i] = static_cast<int32_t>(k);
  }
  EXPECT_EQ(labels, wanted);
}

TEST_F(OnEveryIsa, PricedArgminIsExact) {
  const Data x = Duplicated(77, 19);
  Data centers = Normal(45, 19, 4);
  std::copy(centers.values.begin(), centers.values.begin() + 19, centers.values.end() - 19);
  std::vector<double> prices(45);
  for (size_t k = 0; k < prices.size(); ++k) prices[k] = static_cast<double>(k % 7);
  prices[44] = prices[0];  // a tie: the smaller index wins
  Run([&] {
    std::vector<int32_t> labels(77);
    std::vector<double> distances(77);
    PricedArgmin(x.View(), centers.values.data(), 45, prices.data(), {}, labels.data(),
                 distances.data());
    for (int64_t i = 0; i < 77; ++i) {
      int32_t best = 0;
      const auto value = [&](int32_t k) {
        return Squared(x, i, centers.values.data() + k * 19) + prices[k];
      };
      for (int32_t k = 1; k < 45; ++k) {
        if (value(k) < value(best) - 1e-12) best = k;
      }
      EXPECT_EQ(labels[i], best);
      EXPECT_NEAR(distances[i], Squared(x, i, centers.values.data() + best * 19), 1e-9);
    }
  });
}

TEST(BalancedKMeans, CapsHoldInEveryGroup) {
  const Data x = Duplicated(120, 6);
  const std::vector<float> centers = Normal(8, 6, 2).values;
  std::vector<int64_t> groups(120);
  for (size_t i = 0; i < groups.size(); ++i) groups[i] = static_cast<int64_t>(i * i % 5);
  std::vector<int32_t> labels(120);
  CappedAssign(x.View(), centers.data(), 8, nullptr, groups.data(), 8, {}, labels.data());
  std::vector<int64_t> held(5 * 8);
  for (size_t i = 0; i < groups.size(); ++i) ++held[groups[i] * 8 + labels[i]];
  EXPECT_LE(*std::max_element(held.begin(), held.end()), 8);
  EXPECT_EQ(Refusal([&] {
              CappedAssign(x.View(), centers.data(), 8, nullptr, groups.data(), 2, {},
                           labels.data());
            }).substr(0, 56),
            "groups: wanted at most cap * clusters = 16 items in a gr");
}

TEST(BalancedKMeans, MistakesAreNamed) {
  const Data x = Normal(9, 3);
  Data broken = x;
  broken.values[5 * 3 + 1] = std::numeric_limits<float>::quiet_NaN();
  BalancedKMeansOptions small;
  small.memory_budget = 1000;
  BalancedKMeansOptions idle;
  idle.num_threads = 0;
  EXPECT_EQ(Refusal([&] { FitTo(x, 10, {}); }),
            "x: wanted at least as many rows as clusters (10), got 9");
  EXPECT_EQ(Refusal([&] { FitTo(x, 0, {}); }), "clusters: wanted at least 1, got 0");
  EXPECT_EQ(Refusal([&] { FitTo(broken, 2, {}); }),
            "x: wanted finite values, got nan in row 5, column 1");
  broken.values[5 * 3 + 1] = -0x1p64f;
  EXPECT_EQ(Refusal([&] { FitTo(broken, 2, {}); }),
            "x: wanted values of size 1e15 at most, got -18446744073709551616.000000 in row 5, "
            "column 1");
  EXPECT_NE(Refusal([&] { FitTo(x, 2, small); }).find("memory_budget: wanted at least"),
            std::string::npos);
  EXPECT_EQ(Refusal([&] { FitTo(x, 2, idle); }), "num_threads: wanted at least 1, got 0");
  EXPECT_EQ(Refusal([&] { FitTo(Data{0, 3, {}}, 1, {}); }),
            "x: wanted at least one row and one column, got shape [0, 3]");
}

TEST(BalancedKMeans, OnStepMayStopTheWork) {
  const Data x = Blobs(2000, 8, 0.4f);
  for (int after : {0, 1, 3}) {
    BalancedKMeansOptions options;
    int calls = 0;
    options.num_threads = 2;
    options.on_step = [&] {
      if (calls++ == after) throw std::runtime_error("stop");
    };
    EXPECT_THROW(FitTo(x, 20, options), std::runtime_error);
  }
}

}  // namespace
}  // namespace onerec
