#include "cpu/balanced_kmeans_simplex.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/thread_pool.h"

namespace onerec {
namespace {

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();
constexpr int64_t kBlock = 512;  // items that offer moves at a time, at least
constexpr int64_t kLargestBlock = 1 << 14;
constexpr size_t kFewOffers = 32;    // of a block, below which the next is larger
constexpr double kStale = 0.3;       // share of its gain that an offer may lose before its turn
constexpr double kTolerance = 1e-6;  // gain worth a pivot, in the lists' scale

}  // namespace

ListSimplex::ListSimplex(const NodeCapacity& capacity, const CandidateLists& lists,
                         const KMeansKernels& kernels, int num_threads, const double* prices)
    : capacity_(capacity),
      lists_(lists),
      kernels_(kernels),
      num_threads_(num_threads),
      root_(static_cast<int32_t>(capacity.units.size())),
      tree_(static_cast<size_t>(2 * root_) + 3),
      item_of_(static_cast<size_t>(root_) + 2, -1),
      node_of_(static_cast<size_t>(lists.rows), -1),
      labels_(static_cast<size_t>(lists.rows)),
      own_(static_cast<size_t>(lists.rows)),
      excess_(static_cast<size_t>(root_), 0),
      shortage_(static_cast<size_t>(root_), 0),
      dummies_(static_cast<size_t>(root_), 0),
      tolerance_(kTolerance * lists.scale),
      seen_(tree_.size(), 0) {
  for (auto node = static_cast<int32_t>(tree_.size()) - 1; node > root_; --node) {
    free_.push_back(node);
  }
  for (size_t k = 0; k < lists.prices.size(); ++k) start_.push_back(prices[k] - lists.prices[k]);
  moved_ = start_;
  moved_float_.assign(start_.begin(), start_.end());
  std::vector<int64_t> sizes(static_cast<size_t>(root_), 0);
  for (int64_t i = 0; i < lists.rows; ++i) {
    const Offer best = Best(i);
    Put(static_cast<size_t>(i), best.code, best.rel);
    ++sizes[static_cast<size_t>(best.code)];
  }
  // Dummies are worth most where prices are lowest.
  std::vector<int32_t> order(static_cast<size_t>(root_));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return prices[a] != prices[b] ? prices[a] < prices[b] : a < b;
  });
  int64_t left = capacity.dummies;
  for (const int32_t node : order) {
    const auto k = static_cast<size_t>(node);
    if (left > 0) {
      hub_ = prices[k];
      dummies_[k] = capacity.extra[k];
      left -= dummies_[k];
    }
    const int64_t missing = capacity.units[k] - sizes[k] - dummies_[k];
    excess_[k] = std::max<int64_t>(0, -missing);
    shortage_[k] = std::max<int64_t>(0, missing);
  }
  for (int32_t k = 0; k < root_; ++k) {
    At(k).link = shortage_[static_cast<size_t>(k)] > 0 ? Link::kShortage : Link::kExcess;
    Attach(k, root_);
  }
}

// The cheapest of the item's list, and what going there gains.
ListSimplex::Offer ListSimplex::Best(int64_t item) const {
  const CandidateLists::Chunk& chunk = lists_.chunks[static_cast<size_t>(item / lists_.chunk_rows)];
  const auto row = static_cast<size_t>(item % lists_.chunk_rows);
  const int64_t first = chunk.offset[row];
  const float* rel = chunk.rel.data() + first;
  const int32_t* code = chunk.code.data() + first;
  float least;
  const int64_t t =
      kernels_.list_argmin(rel, code, moved_float_.data(), chunk.offset[row + 1] - first, &least);
  const auto i = static_cast<size_t>(item);
  const double own = static_cast<double>(own_[i]) + moved_[static_cast<size_t>(labels_[i])];
  return {code[t], rel[t],
          own - (static_cast<double>(rel[t]) + moved_[static_cast<size_t>(code[t])])};
}

void ListSimplex::Put(size_t item, int32_t cluster, float rel) {
  labels_[item] = cluster;
  own_[item] = rel;
}

void ListSimplex::Attach(int32_t node, int32_t parent) {
  Node& own = At(node);
  Node& above = At(parent);
  own.parent = parent;
  own.before = -1;
  own.next = above.child;
  if (above.child >= 0) At(above.child).before = node;
  above.child = node;
}

void ListSimplex::Detach(int32_t node) {
  const Node& own = At(node);
  (own.before >= 0 ? At(own.before).next : At(own.parent).child) = own.next;
  if (own.next >= 0) At(own.next).before = own.before;
}

// The item's node in the tree; if it has none, one below its cluster.
int32_t ListSimplex::NodeOf(int64_t item) {
  int32_t& node = node_of_[static_cast<size_t>(item)];
  if (node >= 0) return node;
  node = free_.back();
  free_.pop_back();
  item_of_[static_cast<size_t>(node - root_ - 1)] = item;
  At(node) = {};
  At(node).link = Link::kItem;
  At(node).rel = own_[static_cast<size_t>(item)];
  Attach(node, labels_[static_cast<size_t>(item)]);
  return node;
}

// Takes an item out of the tree that hangs on one cluster alone.
void ListSimplex::Prune(int32_t node) {
  if (node <= root_ || At(node).child >= 0) return;
  Detach(node);
  node_of_[ItemAt(node)] = -1;
  free_.push_back(node);
}

// Moves the prices of a subtree.
void ListSimplex::Shift(int32_t node, double by) {
  stack_.assign(1, node);
  while (!stack_.empty()) {
    const int32_t at = stack_.back();
    stack_.pop_back();
    if (at < root_) {
      const auto k = static_cast<size_t>(at);
      moved_[k] += by;
      moved_float_[k] = static_cast<float>(moved_[k]);
    }
    for (int32_t c = At(at).child; c >= 0; c = At(c).next) stack_.push_back(c);
  }
}

// Units of flow that can still be pushed over the link of `node`, from its parent (down) or to it.
int64_t ListSimplex::Slack(int32_t node, bool down) const {
  const auto k = static_cast<size_t>(node);
  const Node& at = At(node);
  switch (at.link) {
    case Link::kItem:  // flow goes from the item to the cluster
      if ((node < root_) == down) return kUnlimited;
      return down ? labels_[ItemAt(node)] == at.parent : labels_[ItemAt(at.parent)] == node;
    case Link::kExcess:
      return down ? excess_[k] : kUnlimited;
    case Link::kShortage:
      return down ? kUnlimited : shortage_[k];
    case Link::kDummies:
      return down ? capacity_.extra[k] - dummies_[k] : dummies_[k];
  }
  return 0;
}

void ListSimplex::Push(int32_t node, bool down, int64_t units) {
  const auto k = static_cast<size_t>(node);
  const Node& at = At(node);
  const int64_t more = down ? units : -units;
  switch (at.link) {
    case Link::kItem:  // the item's other link on the way loses what this one gains
      if (down && node < root_) Put(ItemAt(at.parent), node, at.rel);
      if (!down && node > root_) Put(ItemAt(node), at.parent, at.rel);
      break;
    case Link::kExcess:
      excess_[k] -= more;
      break;
    case Link::kShortage:
      shortage_[k] += more;
      break;
    case Link::kDummies:
      dummies_[k] += more;
      break;
  }
}

// Sends as much flow as possible around the cycle that the entering link closes, and takes out the
// link that stops it: of several the last on the way from the top of the cycle, which keeps the
// basis strongly feasible, so that pivots that move nothing do not repeat.
void ListSimplex::Pivot(const Entering& entering) {
  ++pivots_;
  for (int32_t u = entering.first; u >= 0; u = At(u).parent) {
    seen_[static_cast<size_t>(u)] = pivots_;
  }
  int32_t top = entering.second;
  while (seen_[static_cast<size_t>(top)] != pivots_) top = At(top).parent;
  const auto cluster =  // of a link to the root
      static_cast<size_t>(entering.first == root_ ? entering.second : entering.first);
  int64_t units = entering.link == Link::kDummies ? capacity_.extra[cluster] : kUnlimited;
  int32_t out = -1;
  bool first_side = false;
  for (int32_t u = entering.first; u != top; u = At(u).parent) {
    const int64_t slack = Slack(u, true);
    if (slack >= units) continue;
    units = slack;
    out = u;
    first_side = true;
  }
  for (int32_t u = entering.second; u != top; u = At(u).parent) {
    const int64_t slack = Slack(u, false);
    if (slack > units || slack == kUnlimited) continue;
    units = slack;
    out = u;
    first_side = false;
  }
  if (units > 0) {
    for (int32_t u = entering.first; u != top; u = At(u).parent) Push(u, true, units);
    for (int32_t u = entering.second; u != top; u = At(u).parent) Push(u, false, units);
    if (entering.link == Link::kItem) {
      Put(ItemAt(entering.first), entering.second, entering.rel);
    } else if (entering.link == Link::kExcess) {
      excess_[cluster] += units;
    } else if (entering.link == Link::kShortage) {
      shortage_[cluster] += units;
    } else {
      dummies_[cluster] += entering.first == root_ ? units : -units;
    }
  }
  if (out < 0) return;  // dummies have gone from one bound to the other
  // The part below `out` turns around and hangs on the entering link.
  const int32_t left = At(out).parent;
  const int32_t begin = first_side ? entering.first : entering.second;
  int32_t above = first_side ? entering.second : entering.first;
  float rel = entering.rel;
  Link link = entering.link;
  for (int32_t node = begin;;) {
    const int32_t parent = At(node).parent;
    Detach(node);
    Attach(node, above);
    std::swap(At(node).rel, rel);
    std::swap(At(node).link, link);
    if (node == out) break;
    above = node;
    node = parent;
  }
  Shift(begin, first_side ? -entering.gain : entering.gain);
  Prune(out);
  Prune(left);
}

// Brings in the links to the root that gain; false if there were none.
bool ListSimplex::RootPivots(double penalty) {
  bool any = false;
  for (int32_t node = 0; node < root_; ++node) {
    const auto k = static_cast<size_t>(node);
    const double rise = moved_[k] - start_[k];
    const double above = lists_.prices[k] + moved_[k] - hub_;
    const int64_t extra = capacity_.extra[k];
    if (rise - penalty > tolerance_) {
      Pivot({node, root_, Link::kExcess, 0, rise - penalty});
    } else if (-rise - penalty > tolerance_) {
      Pivot({root_, node, Link::kShortage, 0, -rise - penalty});
    } else if (extra > 0 && dummies_[k] == 0 && -above > tolerance_) {
      Pivot({root_, node, Link::kDummies, 0, -above});
    } else if (extra > 0 && dummies_[k] == extra && above > tolerance_) {
      Pivot({node, root_, Link::kDummies, 0, above});
    } else {
      continue;
    }
    any = true;
  }
  return any;
}

// The items of a range that gain by a move, those first that gain most.
void ListSimplex::FindOffers(int64_t begin, int64_t end) {
  const int64_t parts = (end - begin + kBlock - 1) / kBlock;
  std::vector<std::vector<std::pair<double, int64_t>>> found(static_cast<size_t>(parts));
  ParallelFor(parts, parts < 4 ? 1 : num_threads_, [&](int64_t part) {
    auto& own = found[static_cast<size_t>(part)];
    const int64_t last = std::min(end, begin + (part + 1) * kBlock);
    for (int64_t i = begin + part * kBlock; i < last; ++i) {
      const double gain = Best(i).gain;
      if (gain > tolerance_) own.emplace_back(-gain, i);
    }
  });
  offers_.clear();
  for (const auto& own : found) offers_.insert(offers_.end(), own.begin(), own.end());
  std::sort(offers_.begin(), offers_.end());
}

int64_t ListSimplex::Solve(double penalty) {
  for (int32_t node = At(root_).child; node >= 0; node = At(node).next) {
    const auto k = static_cast<size_t>(node);
    const double to = At(node).link == Link::kExcess     ? start_[k] + penalty
                      : At(node).link == Link::kShortage ? start_[k] - penalty
                                                         : hub_ - lists_.prices[k];
    Shift(node, to - moved_[k]);
  }
  int64_t idle = 0;  // items looked at since the last pivot
  int64_t block = kBlock;
  for (int64_t begin = 0, end = 0; idle < lists_.rows; begin = end < lists_.rows ? end : 0) {
    const bool any = RootPivots(penalty);
    end = std::min(begin + block, lists_.rows);
    FindOffers(begin, end);
    idle = any || !offers_.empty() ? 0 : idle + end - begin;
    block = offers_.size() < kFewOffers ? std::min(kLargestBlock, 2 * block)
                                        : std::max(kBlock, block / 2);
    for (const auto& [loss, item] : offers_) {
      const Offer offer = Best(item);
      if (!(offer.gain > std::max(tolerance_, -kStale * loss))) continue;
      Pivot({NodeOf(item), offer.code, Link::kItem, offer.rel, offer.gain});
    }
  }
  return std::accumulate(excess_.begin(), excess_.end(), int64_t{0});
}

void ListSimplex::Prices(double* prices) const {
  for (size_t k = 0; k < moved_.size(); ++k) prices[k] = lists_.prices[k] + moved_[k];
}

void ListSimplex::ExactPrices(const std::function<double(int64_t, int32_t)>& exact,
                              double* prices) const {
  Prices(prices);
  std::vector<int32_t> open;
  for (int32_t node = At(root_).child; node >= 0; node = At(node).next) open.push_back(node);
  while (!open.empty()) {
    const int32_t node = open.back();
    open.pop_back();
    for (int32_t item = At(node).child; item >= 0; item = At(item).next) {
      const auto row = static_cast<int64_t>(ItemAt(item));
      const double value = exact(row, node) + prices[node];
      for (int32_t c = At(item).child; c >= 0; c = At(c).next) {
        prices[c] = value - exact(row, c);
        open.push_back(c);
      }
    }
  }
}

}  // namespace onerec
