#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "kmeans/assign.h"
#include "kmeans/check.h"
#include "kmeans/rounding.h"
#include "kmeans/tiles/device.h"
#include "kmeans/tiles/pass.h"
#include "kmeans/transport/paths.h"
#include "onerec/balanced_kmeans.h"
#include "support/error.h"
#include "support/thread_pool.h"

namespace onerec {
namespace {

// Costs of a group's items in the clusters that it may use, prices included.
class GroupCosts : public FinishCosts {
 public:
  GroupCosts(const FloatRows& x, const float* centers, const double* prices,
             const std::vector<int64_t>& items, const std::vector<int32_t>& clusters,
             const KMeansKernels& kernels)
      : clusters_(clusters.size()) {
    for (const int64_t item : items) {
      for (const int32_t k : clusters) {
        costs_.push_back(Cost(x, item, centers, k, kernels) + (prices != nullptr ? prices[k] : 0));
      }
    }
  }

  void Rows(const int32_t* items, int64_t count, const Body& body) const override {
    std::vector<float> row(clusters_);
    for (int64_t i = 0; i < count; ++i) {
      const double* exact = costs_.data() + items[i] * clusters_;
      float largest = 0;
      for (size_t k = 0; k < clusters_; ++k) {
        row[k] = static_cast<float>(exact[k] - exact[0]);
        largest = std::max(largest, std::abs(row[k]));
      }
      body(i, row.data(), static_cast<float>(kListRounding) * largest);
    }
  }

  double Exact(int32_t item, int32_t node) const override {
    return costs_[item * clusters_ + node];
  }

 private:
  size_t clusters_;
  std::vector<double> costs_;
};

}  // namespace

void PricedArgmin(const FloatRows& x, const float* centers, int64_t clusters, const double* prices,
                  const BalancedKMeansOptions& options, int32_t* labels, double* distances) {
  if (x.rows == 0) return;
  CheckShape(x, clusters, options);
  CheckCenters(centers, clusters, x.columns, prices);
  CheckValues(x, options.num_threads);
  const KMeansKernels& kernels = CurrentKMeansKernels();
  FloatRows rows{centers, clusters, x.columns, x.columns};
  const std::vector<double> mean = ColumnMeans(rows, 1);
  PackedCenters packed(centers, clusters, x.columns, mean, kernels);
  packed.SetPrices(prices);
  const int64_t columns = packed.columns();
  std::vector<int64_t> open;
  const std::unique_ptr<KMeansDevice> device = OpenDevice(x, mean, options);
  if (device != nullptr) {
    device->SetCenters(centers, clusters, {});
    device->SetPrices(prices);
    device->Argmin(labels);
    for (int64_t i = 0; i < x.rows; ++i) {
      if (labels[i] < 0) {
        open.push_back(i);
      } else if (distances != nullptr) {
        distances[i] = Cost(x, i, centers, labels[i], kernels);
      }
    }
  }
  DensePass(x, device != nullptr ? open.data() : nullptr,
            device != nullptr ? static_cast<int64_t>(open.size()) : x.rows, packed, kernels,
            options, [&](int64_t, int64_t position, const float* row, double square) {
              const int64_t i = device != nullptr ? open[position] : position;
              const float limit =
                  std::nextafter(kernels.row_min(row, columns) + 2 * packed.Error(square),
                                 std::numeric_limits<float>::infinity());
              int32_t best = -1;
              double least = 0;
              double distance = 0;
              int32_t found[64];
              for (int64_t k = 0; k < columns; k += 64) {
                const int64_t width = std::min<int64_t>(64, columns - k);
                const int64_t n = kernels.collect(row + k, width, limit, found);
                for (int64_t t = 0; t < n; ++t) {
                  const auto code = static_cast<int32_t>(k + found[t]);
                  const double cost = Cost(x, i, centers, code, kernels);
                  const double value = cost + (prices != nullptr ? prices[code] : 0.0);
                  if (best >= 0 && !(value < least)) continue;
                  best = code;
                  least = value;
                  distance = cost;
                }
              }
              labels[i] = best;
              if (distances != nullptr) distances[i] = distance;
            });
}

void CappedAssign(const FloatRows& x, const float* centers, int64_t clusters, const double* prices,
                  const int64_t* groups, int64_t cap, const BalancedKMeansOptions& options,
                  int32_t* labels) {
  if (cap < 1) throw std::invalid_argument(WantedGot("cap", "at least 1", cap));
  PricedArgmin(x, centers, clusters, prices, options, labels, nullptr);
  // Items by group, in item order.
  int64_t count = 0;
  for (int64_t i = 0; i < x.rows; ++i) {
    if (groups[i] < 0 || groups[i] >= x.rows) {
      throw std::invalid_argument(
          WantedGot("groups", Text("numbers in 0..", x.rows - 1), groups[i], " at ", i));
    }
    count = std::max(count, groups[i] + 1);
  }
  std::vector<int64_t> offset(count + 1);
  for (int64_t i = 0; i < x.rows; ++i) ++offset[groups[i] + 1];
  std::partial_sum(offset.begin(), offset.end(), offset.begin());
  std::vector<int64_t> members(x.rows);
  std::vector<int64_t> place(offset.begin(), offset.end() - 1);
  for (int64_t i = 0; i < x.rows; ++i) members[place[groups[i]]++] = i;
  // Only groups in which a cluster is over-full have anything to decide.
  std::vector<int64_t> crowded;
  std::vector<int64_t> rows;
  std::vector<int64_t> wanted;
  std::vector<int32_t> codes;
  for (int64_t g = 0; g < count; ++g) {
    const int64_t n = offset[g + 1] - offset[g];
    if (n > cap * clusters) {
      throw std::invalid_argument(WantedGot(
          "groups", Text("at most cap * clusters = ", cap * clusters, " items in a group"), n,
          " in group ", g));
    }
    codes.clear();
    for (int64_t t = offset[g]; t < offset[g + 1]; ++t) {
      codes.push_back(labels[members[t]]);
    }
    std::sort(codes.begin(), codes.end());
    bool over = false;
    for (size_t t = cap; t < codes.size(); ++t) {
      over = over || codes[t] == codes[t - cap];
    }
    if (!over) continue;
    crowded.push_back(g);
    // The others of its group fill at most (n - 1) / cap clusters, so an item never needs more than
    // its (n - 1) / cap + 1 best.
    for (int64_t t = offset[g]; t < offset[g + 1]; ++t) {
      rows.push_back(members[t]);
      wanted.push_back(std::min(clusters, (n - 1) / cap + 1));
    }
  }
  if (crowded.empty()) return;
  const KMeansKernels& kernels = CurrentKMeansKernels();
  FloatRows center_rows{centers, clusters, x.columns, x.columns};
  PackedCenters packed(centers, clusters, x.columns, ColumnMeans(center_rows, 1), kernels);
  packed.SetPrices(prices);
  const int64_t columns = packed.columns();
  std::vector<std::vector<int32_t>> choices(rows.size());
  DensePass(x, rows.data(), static_cast<int64_t>(rows.size()), packed, kernels, options,
            [&](int64_t, int64_t position, const float* row, double square) {
              std::vector<float> sorted(row, row + clusters);
              const auto nth = sorted.begin() + wanted[position] - 1;
              std::nth_element(sorted.begin(), nth, sorted.end());
              const float limit = std::nextafter(*nth + 2 * packed.Error(square),
                                                 std::numeric_limits<float>::infinity());
              std::vector<int32_t> codes(columns);
              codes.resize(kernels.collect(row, columns, limit, codes.data()));
              choices[position].assign(codes.begin(), codes.end());
            });
  std::vector<int64_t> start(crowded.size() + 1);
  for (size_t g = 0; g < crowded.size(); ++g) {
    const size_t group = crowded[g];
    start[g + 1] = start[g] + offset[group + 1] - offset[group];
  }
  ParallelFor(static_cast<int64_t>(crowded.size()), options.num_threads, [&](int64_t g) {
    const size_t begin = start[g];
    const size_t end = start[g + 1];
    // Number the clusters that anyone here may take.
    std::vector<int32_t> used;
    for (size_t t = begin; t < end; ++t) {
      used.insert(used.end(), choices[t].begin(), choices[t].end());
    }
    std::sort(used.begin(), used.end());
    used.erase(std::unique(used.begin(), used.end()), used.end());
    const auto index = [&](int32_t code) {
      return static_cast<int32_t>(std::lower_bound(used.begin(), used.end(), code) - used.begin());
    };
    NodeCapacity capacity;
    capacity.units.assign(used.size(), cap);
    capacity.extra.assign(used.size(), cap);
    capacity.dummies = cap * static_cast<int64_t>(used.size()) - static_cast<int64_t>(end - begin);
    std::vector<int32_t> chosen;
    std::vector<int64_t> items;
    for (size_t t = begin; t < end; ++t) {
      chosen.push_back(index(labels[rows[t]]));
      items.push_back(rows[t]);
    }
    const GroupCosts costs(x, centers, prices, items, used, kernels);
    std::vector<double> zero(used.size(), 0.0);
    ExactFinish finish(capacity, costs, static_cast<int64_t>(end - begin), chosen.data(),
                       zero.data(), 1, nullptr);
    finish.Run();
    for (size_t t = begin; t < end; ++t) labels[rows[t]] = used[chosen[t - begin]];
  });
}

void AssignWithin(const FloatRows& x, const float* centers, int64_t clusters, const double* prices,
                  const int64_t* room, const BalancedKMeansOptions& options, int32_t* labels) {
  NodeCapacity capacity;
  capacity.dummies = -x.rows;
  for (int64_t k = 0; k < clusters; ++k) {
    if (room[k] < 0) {
      throw std::invalid_argument(WantedGot("room", "at least 0", room[k], " at " + Text(k)));
    }
    capacity.units.push_back(room[k]);
    capacity.extra.push_back(room[k]);
    capacity.dummies += room[k];
  }
  if (capacity.dummies < 0) {
    throw std::invalid_argument(
        WantedGot("room", Text("at least ", x.rows, " in all"), x.rows + capacity.dummies));
  }
  if (x.rows == 0) return;
  PricedArgmin(x, centers, clusters, prices, options, labels, nullptr);
  const KMeansKernels& kernels = CurrentKMeansKernels();
  const FloatRows center_rows{centers, clusters, x.columns, x.columns};
  PackedCenters packed(centers, clusters, x.columns, ColumnMeans(center_rows, 1), kernels);
  packed.SetPrices(prices);
  const TileCosts costs(x, centers, prices, packed, kernels);
  std::vector<double> zero(clusters, 0.0);
  ExactFinish finish(capacity, costs, x.rows, labels, zero.data(), options.num_threads,
                     options.on_step);
  finish.Run();
}

}  // namespace onerec
