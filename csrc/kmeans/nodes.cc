#include "kmeans/nodes.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kmeans/tiles/pass.h"

namespace onerec {

Nodes MakeNodes(const float* centers, int64_t clusters, int64_t d,
                const BalancedKMeansOptions& options) {
  std::vector<int32_t> order(clusters);
  std::iota(order.begin(), order.end(), 0);
  const auto compare = [&](int32_t a, int32_t b) {
    const float* left = centers + a * d;
    const float* right = centers + b * d;
    for (int64_t j = 0; j < d; ++j) {
      if (left[j] != right[j]) return left[j] < right[j] ? -1 : 1;
    }
    return 0;
  };
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const int difference = compare(a, b);
    return difference != 0 ? difference < 0 : a < b;
  });
  std::vector<int32_t> first(clusters);
  std::vector<int32_t> distinct;
  for (size_t t = 0; t < order.size(); ++t) {
    const bool same = t > 0 && compare(order[t - 1], order[t]) == 0;
    first[order[t]] = same ? first[order[t - 1]] : order[t];
    if (!same) distinct.push_back(order[t]);
  }
  std::sort(distinct.begin(), distinct.end());
  const auto count = static_cast<int64_t>(distinct.size());
  std::vector<float> rows;
  for (const int32_t k : distinct) {
    rows.insert(rows.end(), centers + k * d, centers + (k + 1) * d);
  }
  // Groups: a few rounds of plain k-means on the centres.
  const auto groups = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(count))));
  std::vector<float> means;
  for (int64_t g = 0; g < groups; ++g) {
    const auto row = rows.begin() + g * count / groups * d;
    means.insert(means.end(), row, row + d);
  }
  const FloatRows view{rows.data(), count, d, d};
  std::vector<int32_t> group(count);
  BalancedKMeansOptions alone;
  alone.num_threads = options.num_threads;
  alone.on_step = options.on_step;
  for (int round = 0; round < 4; ++round) {
    PricedArgmin(view, means.data(), groups, nullptr, alone, group.data(), nullptr);
    ClusterMeans(view, group.data(), groups, alone, means.data());
  }
  std::vector<int32_t> place(count);
  std::iota(place.begin(), place.end(), 0);
  std::stable_sort(place.begin(), place.end(),
                   [&](int32_t a, int32_t b) { return group[a] < group[b]; });
  Nodes nodes;
  nodes.count = count;
  nodes.multiplicity.assign(count, 0);
  nodes.node_of.resize(clusters);
  for (int64_t t = 0; t < count; ++t) {
    const size_t from = place[t];
    const int32_t k = distinct[from];
    if (t == 0 || group[from] != group[place[t - 1]]) {
      nodes.group_offset.push_back(static_cast<int32_t>(t));
    }
    nodes.first.push_back(k);
    nodes.node_of[k] = static_cast<int32_t>(t);
    nodes.centers.insert(nodes.centers.end(), centers + k * d, centers + (k + 1) * d);
  }
  nodes.group_offset.push_back(static_cast<int32_t>(count));
  for (int64_t k = 0; k < clusters; ++k) {
    const int32_t node = nodes.node_of[first[k]];
    nodes.node_of[k] = node;
    ++nodes.multiplicity[node];
  }
  return nodes;
}

}  // namespace onerec
