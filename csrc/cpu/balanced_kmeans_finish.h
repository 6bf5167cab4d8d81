// The exact finish: shortest augmenting paths over the clusters.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace onerec {

// Every node k must end with exactly units[k] units; an item is one unit, and a node may hold up to
// extra[k] dummies, which cost nothing anywhere. `dummies` of them exist, so that sum(units) =
// items
// + dummies. Sizes floor/ceil: units = ceil(N/K), extra = 1. Upper bounds alone: extra = units.
struct NodeCapacity {
  std::vector<int64_t> units;
  std::vector<int64_t> extra;
  int64_t dummies = 0;
};

// Items that may move, each with the clusters that it may go to. An item that is not here stays.
struct Candidates {
  std::vector<int32_t> item;    // [n] ascending
  std::vector<int64_t> offset;  // [n + 1] into code and cost
  std::vector<int32_t> code;
  std::vector<double> cost;
};

// Min-cost flow on the node graph. An arc a -> b is the cheapest move of one item from a to b; a
// hub node exchanges dummies. Starts from labels that are optimal for `prices` (every item sits at
// its smallest cost + price) and keeps that true, so that the end is optimal. Prices only rise.
class ExactFinish {
 public:
  // sizes: items now in each node. labels [all items] is read and written at the candidates.
  ExactFinish(const NodeCapacity& capacity, const Candidates& candidates,
              std::vector<int64_t> sizes, int32_t* labels, double* prices);

  // Moves items until every node is full. A candidate list says nothing of moves that cost more
  // than `reach` above the cheapest, so no price may rise by more than that: false when one would
  // have to (labels and prices are consistent then too, but nodes are still over-full).
  bool Run(double reach, const std::function<void()>& on_step);

  // Moves the prices towards the middle of what keeps the assignment optimal, so that items prefer
  // their own cluster strictly wherever some optimal prices do. `reach` as in Run.
  void CentrePrices(double reach);

  int64_t moves() const { return moves_; }

 private:
  struct Move {
    double delta;
    int32_t item;
    bool operator<(const Move& other) const {  // for a heap with the smallest on top
      return delta != other.delta ? delta > other.delta : item > other.item;
    }
  };
  struct Arc {
    int32_t from;
    int32_t to;
    std::vector<Move> heap;  // entries of items that have left are dropped when they surface
  };

  Arc& ArcOf(int32_t from, int32_t to);
  void PushMoves(int64_t position);
  const Move* Top(Arc& arc);
  bool Augment(int32_t source, double reach);

  const NodeCapacity& capacity_;
  const Candidates& candidates_;
  int32_t* labels_;
  double* prices_;
  int32_t nodes_;
  std::vector<double> start_prices_;
  std::vector<int64_t> sizes_;
  std::vector<int64_t> dummies_;
  double hub_price_ = 0;
  std::vector<Arc> arcs_;
  std::vector<std::vector<int32_t>> out_;  // arcs leaving a node
  std::vector<std::vector<int32_t>> in_;
  std::vector<uint64_t> table_key_;  // open addressing: (from, to) -> arc
  std::vector<int32_t> table_arc_;
  // Dijkstra
  std::vector<double> distance_;
  std::vector<int32_t> parent_;
  std::vector<int32_t> parent_item_;
  std::vector<uint8_t> state_;
  std::vector<int32_t> touched_;
  std::vector<std::pair<double, int32_t>> queue_;
  int64_t moves_ = 0;
};

}  // namespace onerec
