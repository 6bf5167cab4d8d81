// The network simplex on candidate lists: an assignment of the right sizes, and its prices.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "kmeans/rounding.h"
#include "kmeans/tiles/kernels.h"
#include "kmeans/transport/annealer.h"
#include "kmeans/transport/capacity.h"

namespace onerec {

// Primal network simplex (Ahuja, Magnanti, Orlin, "Network Flows", chapter 11) for the cheapest
// assignment of the rows of candidate lists to clusters, each to one that it lists. The basis is a
// tree of the clusters, of the items that hang between two of them or more, and of a root that
// exchanges dummies; all other items are leaves, which take no place in it. Lists screen moves in
// float32, what they leave open is decided on exact costs.
class ListSimplex {
 public:
  using Exact = std::function<double(int64_t item, int32_t node)>;

  // Starts from prices [nodes] and from `labels`, which have the right sizes and are listed; if
  // they are null from the hard argmin over the lists.
  ListSimplex(const NodeCapacity& capacity, const CandidateLists& lists, int num_threads,
              Exact exact, const double* prices, const int32_t* labels);

  // From the hard argmin: pivots until the assignment is the cheapest where a cluster may hold too
  // many or too few for a penalty. That bounds how far its price goes from where it starts; a
  // penalty that grows mends near by what can be mended near by. Returns the number of items that
  // are above their cluster's size.
  int64_t Solve(double penalty);

  // From labels of the right sizes: pivots until no listed move makes the assignment cheaper.
  void Solve();

  // The lists were made again; each row lists what Basic() says.
  void TakeLists();

  // Calls body for the clusters that an item's list must keep.
  template <class Body>
  void Basic(int64_t item, const Body& body) const {
    body(labels_[item]);
    const int32_t node = node_of_[item];
    if (node < 0) return;
    body(At(node).parent);
    for (int32_t c = At(node).child; c >= 0; c = At(c).next) body(c);
  }

  // Prices at which the items of the tree are exactly as well off in all of their clusters.
  const std::vector<double>& prices() const { return prices_; }

  // The cluster of each row.
  const std::vector<int32_t>& labels() const { return labels_; }

  // Gain below which a move is a matter of rounding.
  double rounding() const { return kDoubleGain * lists_.scale; }

  int64_t pivots() const { return pivots_; }

 private:
  // What connects a node with its parent: an item with a cluster, or a cluster with the root.
  enum class Link : uint8_t { kItem, kExcess, kShortage, kDummies };
  struct Node {
    int32_t parent = -1;
    int32_t child = -1;  // the first
    int32_t next = -1;   // child of the parent
    int32_t before = -1;
    Link link = Link::kExcess;
    float rel = 0;    // cost + price of an item's link, as listed
    double cost = 0;  // of the link
  };
  struct Entering {
    int32_t first;   // the flow goes from this node
    int32_t second;  // to this one
    Link link;
    float rel;
    double cost;
    double gain;  // for each unit of flow
  };
  struct Offer {
    int32_t code;
    float rel;
    double gain;
  };

  Node& At(int32_t node) { return tree_[node]; }
  const Node& At(int32_t node) const { return tree_[node]; }
  size_t ItemAt(int32_t node) const { return item_of_[node - root_ - 1]; }

  Offer Best(int64_t item) const;
  double ExactGain(int64_t item, int32_t to) const;
  void Count();
  void Search(double penalty);
  void Pivots(double penalty);
  void CostTree(bool exactly);
  double CostOf(int64_t item, int32_t node, float rel) const;
  void Reprice();
  void Put(size_t item, int32_t cluster, float rel);
  int32_t NodeOf(int64_t item);
  void Attach(int32_t node, int32_t parent);
  void Detach(int32_t node);
  void Prune(int32_t node);
  void Shift(int32_t node, double by);
  int64_t Slack(int32_t node, bool down) const;
  void Push(int32_t node, bool down, int64_t units);
  void Pivot(const Entering& entering);
  bool RootPivots(double penalty);
  void FindOffers(int64_t begin, int64_t end, double tolerance);

  const NodeCapacity& capacity_;
  const CandidateLists& lists_;
  const KMeansKernels& kernels_;
  int num_threads_;
  Exact exact_;
  bool sizes_hold_;           // links of excess and shortage carry nothing
  bool exact_costs_ = false;  // in the tree; else those of the lists, up to a constant of the item
  int32_t root_;              // clusters come before, items after
  std::vector<Node> tree_;
  std::vector<int64_t> item_of_;  // of the nodes after the root
  std::vector<int32_t> free_;     // nodes without an item
  std::vector<int32_t> node_of_;  // [rows] -1: a leaf
  std::vector<int32_t> labels_;
  std::vector<float> own_;      // [rows] listed cost in the row's cluster
  std::vector<double> start_;   // prices at first
  std::vector<double> prices_;  // and now
  std::vector<float> moved_;    // now, less those of the lists
  std::vector<int64_t> excess_;
  std::vector<int64_t> shortage_;
  std::vector<int64_t> dummies_;
  double hub_ = 0;             // price at which dummies are indifferent
  std::vector<int64_t> seen_;  // pivot in which a node was on the first side
  int64_t pivots_ = 0;
  std::vector<int32_t> stack_;
  std::vector<std::pair<double, int64_t>> offers_;  // less the gain, item; ascending
};

}  // namespace onerec
