// The network simplex on candidate lists: an assignment of the right sizes, and its prices.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "cpu/balanced_kmeans_finish.h"
#include "cpu/balanced_kmeans_kernels.h"
#include "cpu/balanced_kmeans_prices.h"

namespace onerec {

// Primal network simplex (Ahuja, Magnanti, Orlin, "Network Flows", chapter 11) for the cheapest
// assignment of the rows of candidate lists to clusters, each to one that it lists. The basis is a
// tree of the clusters, of the items that hang between two of them or more, and of a root that
// exchanges dummies; all other items are leaves, which take no place in it. For a penalty a cluster
// may hold too many or too few: that bounds how far its price goes from where it starts. A penalty
// that grows mends near by what can be mended near by.
class ListSimplex {
 public:
  // Starts from the hard argmin over the lists at prices [nodes].
  ListSimplex(const NodeCapacity& capacity, const CandidateLists& lists,
              const KMeansKernels& kernels, int num_threads, const double* prices);

  // Pivots until the assignment is the cheapest at this penalty. Returns the number of items that
  // are above their cluster's size.
  int64_t Solve(double penalty);

  // What every price is now.
  void Prices(double* prices) const;

  // The same with exact(item, node) instead of the listed costs for the items in the tree, so that
  // they are exactly as well off in all of their clusters.
  void ExactPrices(const std::function<double(int64_t, int32_t)>& exact, double* prices) const;

  // The cluster of each row.
  const std::vector<int32_t>& labels() const { return labels_; }

 private:
  // What connects a node with its parent: an item with a cluster, or a cluster with the root.
  enum class Link : uint8_t { kItem, kExcess, kShortage, kDummies };
  struct Node {
    int32_t parent = -1;
    int32_t child = -1;  // the first
    int32_t next = -1;   // child of the parent
    int32_t before = -1;
    float rel = 0;  // cost of an item's link, as listed
    Link link = Link::kExcess;
  };
  struct Entering {
    int32_t first;   // the flow goes from this node
    int32_t second;  // to this one
    Link link;
    float rel;
    double gain;  // for each unit of flow
  };
  struct Offer {
    int32_t code;
    float rel;
    double gain;
  };

  Node& At(int32_t node) { return tree_[static_cast<size_t>(node)]; }
  const Node& At(int32_t node) const { return tree_[static_cast<size_t>(node)]; }
  size_t ItemAt(int32_t node) const {
    return static_cast<size_t>(item_of_[static_cast<size_t>(node - root_ - 1)]);
  }
  Offer Best(int64_t item) const;
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
  void FindOffers(int64_t begin, int64_t end);

  const NodeCapacity& capacity_;
  const CandidateLists& lists_;
  const KMeansKernels& kernels_;
  int num_threads_;
  int32_t root_;  // clusters come before, items after
  std::vector<Node> tree_;
  std::vector<int64_t> item_of_;  // of the nodes after the root
  std::vector<int32_t> free_;     // nodes without an item
  std::vector<int32_t> node_of_;  // [rows] -1: a leaf
  std::vector<int32_t> labels_;
  std::vector<float> own_;     // [rows] listed cost in the row's cluster
  std::vector<double> start_;  // prices less those of the lists, at first
  std::vector<double> moved_;  // and now
  std::vector<float> moved_float_;
  std::vector<int64_t> excess_;
  std::vector<int64_t> shortage_;
  std::vector<int64_t> dummies_;
  double hub_ = 0;  // price at which dummies are indifferent
  double tolerance_;
  std::vector<int64_t> seen_;  // pivot in which a node was on the first side
  int64_t pivots_ = 0;
  std::vector<int32_t> stack_;
  std::vector<std::pair<double, int64_t>> offers_;  // less the gain, item; ascending
};

}  // namespace onerec
