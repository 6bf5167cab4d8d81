// The exact finish: shortest augmenting paths over the clusters.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "kmeans/transport/capacity.h"

namespace onerec {

// What it costs to put an item in a node.
class FinishCosts {
 public:
  // body(i, row, error): row[k] is the cost of items[i] in node k, up to a constant of the item; a
  // difference of two is within `error` of the exact one.
  using Body = std::function<void(int64_t i, const float* row, float error)>;
  // body(i, node, delta): moving items[i] to `node` costs at least delta more than where it is.
  using MoveBody = std::function<void(int64_t i, int32_t node, double delta)>;

  virtual ~FinishCosts() = default;
  // Calls body for each of `count` items, in order, on the calling thread.
  virtual void Rows(const int32_t* items, int64_t count, const Body& body) const = 0;
  virtual double Exact(int32_t item, int32_t node) const = 0;
  // Calls body for the cheap moves out of `from`, where all of `items` are, as far as they are
  // known without a tile. Returns a value that the cost of every other move, with the starting
  // price of where it goes, is not below; -infinity if nothing is known.
  virtual double Known(const int32_t*, int64_t, int32_t /*from*/, const MoveBody&) const {
    return -std::numeric_limits<double>::infinity();
  }
};

// Min-cost flow on the node graph. An arc a -> b is the cheapest move of one item from a to b; a
// hub node exchanges dummies. Starts from labels that are optimal for `prices` (every item sits at
// its smallest cost + price) and keeps that true, so that the end is optimal.
//
// Prices only rise, and only those of nodes that a search has left, so the moves out of a node are
// not looked at before. Then come the moves that the costs know of; if these do not suffice, one
// tile of costs gives, for each of the nearest nodes, the few cheapest moves. What is left out is
// covered by bounds that say when more has to be computed.
// Moves are ranked by lower bounds from the float32 tile and decided on exact costs.
class ExactFinish {
 public:
  // labels [items] and prices [nodes] are read and written.
  ExactFinish(const NodeCapacity& capacity, const FinishCosts& costs, int64_t items,
              int32_t* labels, double* prices, int num_threads, std::function<void()> on_step);

  // Moves items until every node is full.
  void Run();

  // Moves prices, by up to `reach`, towards the middle of what keeps the assignment optimal, so
  // that items prefer their own cluster strictly wherever some optimal prices do. Drops all arcs.
  void CentrePrices(double reach);

  int64_t moves() const { return moves_; }

 private:
  struct Move {
    double delta;  // cost after less cost before
    int32_t item;
    bool exact;                                // else delta is a lower bound
    bool operator<(const Move& other) const {  // for a heap with the smallest on top
      return delta != other.delta ? delta > other.delta : item > other.item;
    }
  };
  struct Arc {
    double bound;  // no move of the arc is cheaper
    double least;  // nor, with the price of `to`, than this; -infinity: the arc is among the fresh
    int32_t to;
  };
  struct Moves {
    double rest;             // no move that is not in the heap is cheaper
    std::vector<Move> heap;  // entries of items that have left are dropped when they surface
  };
  struct Node {
    bool expanded = false;
    int64_t width = 0;      // arcs asked of a tile, 0 before the first
    double frontier = 0;    // price of this node up to which arcs that are not listed do not matter
    std::vector<Arc> arcs;  // by `least`, but for the fresh ones
    std::vector<size_t> fresh;  // arcs that have got cheaper
    std::vector<Moves> moves;   // of each arc
    int64_t looks = 0;          // at arcs, since they were sorted
    std::vector<int32_t> arrived;
  };

  void PlaceDummies();
  std::vector<int32_t> Members(int32_t node) const;
  double OwnCost(int32_t item);
  int64_t FirstWidth() const;
  bool TakeKnown(int32_t node);
  void Expand(int32_t node);
  void Sort(Node& node);
  void Refill(int32_t node, size_t arc);
  const Move* Top(int32_t node, size_t arc, double enough);
  int64_t Augment(const std::vector<int32_t>& sources, int64_t wanted);
  void Arrive(const std::vector<int32_t>& items);

  const NodeCapacity& capacity_;
  const FinishCosts& costs_;
  int32_t* labels_;
  double* prices_;
  int32_t count_;
  int num_threads_;
  std::function<void()> on_step_;
  std::vector<double> start_prices_;
  std::vector<int64_t> sizes_;
  std::vector<int64_t> dummies_;
  double hub_price_ = 0;
  std::vector<Node> nodes_;
  std::vector<int64_t> member_offset_;
  std::vector<int32_t> members_;  // items by first label
  std::vector<uint8_t> moved_;    // items that have left it
  std::vector<double> own_;       // exact cost of each item where it is, once asked for
  // Dijkstra; the hub is node count_.
  std::vector<double> distance_;
  std::vector<int32_t> parent_;
  std::vector<int32_t> parent_item_;
  std::vector<uint8_t> state_;
  std::vector<int32_t> touched_;
  std::vector<std::pair<double, int32_t>> queue_;
  double guess_ = std::numeric_limits<double>::infinity();  // at the length of the next path
  bool far_ = false;                                        // the guess was too short
  std::atomic<bool> cut_{false};  // some node has arcs that a tile left out
  int64_t moves_ = 0;
};

}  // namespace onerec
