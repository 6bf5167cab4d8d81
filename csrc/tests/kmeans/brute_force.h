// The cheapest assignment by looking at all of them.
#pragma once

#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "kmeans/transport/annealer.h"
#include "kmeans/transport/capacity.h"

namespace onerec {

// costs [items, nodes] in whole numbers: sums are exact, and ties are many.
struct Problem {
  int64_t items;
  int64_t nodes;
  std::vector<double> costs;
  NodeCapacity capacity;

  double Cost(int64_t item, int64_t node) const { return costs[item * nodes + node]; }
  double Cost(const int32_t* labels) const {
    double sum = 0;
    for (int64_t i = 0; i < items; ++i) sum += Cost(i, labels[i]);
    return sum;
  }
  // Whether every node has its units, with dummies that it may hold.
  bool Holds(const int32_t* labels) const {
    std::vector<int64_t> missing(capacity.units);
    for (int64_t i = 0; i < items; ++i) --missing[labels[i]];
    for (int64_t k = 0; k < nodes; ++k) {
      if (missing[k] < 0 || missing[k] > capacity.extra[k]) return false;
    }
    return true;
  }
};

// Sizes floor / ceil of items / nodes.
inline Problem DrawProblem(int64_t items, int64_t nodes, uint32_t seed) {
  Problem problem{items, nodes, {}, {}};
  std::mt19937 draw(seed);
  for (int64_t t = 0; t < items * nodes; ++t) problem.costs.push_back(draw() % 10);
  const int64_t rest = items % nodes;
  problem.capacity.units.assign(nodes, items / nodes + (rest > 0 ? 1 : 0));
  problem.capacity.extra.assign(nodes, rest > 0 ? 1 : 0);
  problem.capacity.dummies = rest > 0 ? nodes - rest : 0;
  return problem;
}

inline double BruteForce(const Problem& problem) {
  double best = std::numeric_limits<double>::infinity();
  std::vector<int32_t> labels(problem.items, 0);
  for (;;) {
    if (problem.Holds(labels.data())) best = std::min(best, problem.Cost(labels.data()));
    int64_t i = 0;
    while (i < problem.items && ++labels[i] == problem.nodes) labels[i++] = 0;
    if (i == problem.items) return best;
  }
}

// What the prices prove: no assignment of these sizes is cheaper.
inline double DualValue(const Problem& problem, const double* prices) {
  double value = 0;
  for (int64_t i = 0; i < problem.items; ++i) {
    double least = std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < problem.nodes; ++k) {
      least = std::min(least, problem.Cost(i, k) + prices[k]);
    }
    value += least;
  }
  const std::vector<double> order(prices, prices + problem.nodes);
  const Dummies dummies = PlaceDummies(problem.capacity, order);
  for (int64_t k = 0; k < problem.nodes; ++k) {
    value -= static_cast<double>(problem.capacity.units[k] - dummies.held[k]) * prices[k];
  }
  return value;
}

// Every cluster of every row, at prices of zero, in chunks of three rows.
inline CandidateLists FullLists(const Problem& problem) {
  CandidateLists lists;
  lists.rows = problem.items;
  lists.chunk_rows = 3;
  lists.prices.assign(problem.nodes, 0.0);
  lists.group_offset = {0, static_cast<int32_t>(problem.nodes)};
  lists.threshold = lists.reach = std::numeric_limits<double>::infinity();
  lists.scale = 10;
  for (int64_t i = 0; i < problem.items; ++i) {
    if (i % 3 == 0) lists.chunks.emplace_back();
    double low = problem.Cost(i, 0);
    for (int64_t k = 1; k < problem.nodes; ++k) low = std::min(low, problem.Cost(i, k));
    for (int64_t k = 0; k < problem.nodes; ++k) {
      lists.chunks.back().code.push_back(static_cast<int32_t>(k));
      lists.chunks.back().rel.push_back(static_cast<float>(problem.Cost(i, k) - low));
    }
    EndRow(lists.chunks.back(), 0.0f, low);
  }
  return lists;
}

}  // namespace onerec
