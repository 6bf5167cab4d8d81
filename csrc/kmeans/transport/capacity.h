// The sizes of the transport problem.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace onerec {

// Every node k must end with exactly units[k] units. An item is one unit, and a node may hold up to
// extra[k] dummies, which cost nothing anywhere. `dummies` of them exist, so that
// sum(units) = items + dummies. For sizes floor/ceil, units = ceil(N/K) and extra = 1; for upper
// bounds only, extra = units.
struct NodeCapacity {
  std::vector<int64_t> units;
  std::vector<int64_t> extra;
  int64_t dummies = 0;
};

struct Dummies {
  std::vector<int64_t> held;  // [nodes]
  int32_t last = -1;          // node that was given the last dummies, -1 if there are none
};

// Gives the dummies to the nodes with the smallest `value`, as many as each may hold; of equal
// values to the smaller node first.
template <class Value>
Dummies PlaceDummies(const NodeCapacity& capacity, const std::vector<Value>& value) {
  std::vector<int32_t> order(value.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return value[a] < value[b]; });
  Dummies dummies{std::vector<int64_t>(value.size()), -1};
  int64_t left = capacity.dummies;
  for (const int32_t k : order) {
    if (left == 0) break;
    dummies.held[k] = std::min(left, capacity.extra[k]);
    dummies.last = k;
    left -= dummies.held[k];
  }
  return dummies;
}

}  // namespace onerec
