#include "kmeans/transport/simplex.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kmeans/options.h"
#include "kmeans/rounding.h"
#include "support/int_math.h"
#include "support/thread_pool.h"

namespace onerec {
namespace {

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();
constexpr int64_t kPart = 128;  // of a block, that a thread looks at

}  // namespace

ListSimplex::ListSimplex(const NodeCapacity& capacity, const CandidateLists& lists, int num_threads,
                         Exact exact, const double* prices, const int32_t* labels)
    : capacity_(capacity),
      lists_(lists),
      kernels_(CurrentKMeansKernels()),
      num_threads_(num_threads),
      exact_(std::move(exact)),
      sizes_hold_(labels != nullptr),
      root_(static_cast<int32_t>(capacity.units.size())),
      tree_(2 * root_ + 3),
      item_of_(root_ + 2, -1),
      node_of_(lists.rows, -1),
      labels_(lists.rows),
      own_(lists.rows),
      start_(prices, prices + root_),
      prices_(start_),
      excess_(root_, 0),
      shortage_(root_, 0),
      dummies_(root_, 0),
      seen_(tree_.size(), 0) {
  for (auto node = static_cast<int32_t>(tree_.size()) - 1; node > root_; --node) {
    free_.push_back(node);
  }
  if (sizes_hold_) {
    labels_.assign(labels, labels + lists.rows);
  } else {
    for (size_t i = 0; i < labels_.size(); ++i) {  // Best looks for what is better than this
      labels_[i] = -1;
      own_[i] = std::numeric_limits<float>::infinity();
    }
  }
  TakeLists();
  for (int64_t i = 0; !sizes_hold_ && i < lists.rows; ++i) {
    const Offer best = Best(i);
    Put(i, best.code, best.rel);
  }
  Count();
  for (int32_t k = 0; k < root_; ++k) {
    const size_t node = k;
    At(k).link = shortage_[node] > 0 ? Link::kShortage : Link::kExcess;
    if (dummies_[node] > 0 && dummies_[node] < capacity_.extra[node]) {  // some of equal centres
      At(k).link = Link::kDummies;
      Shift(k, hub_ - prices_[node]);
    }
    Attach(k, root_);
  }
}

// Places the dummies, and counts what clusters have too many or too few.
void ListSimplex::Count() {
  std::vector<int64_t> sizes(root_, 0);
  for (const int32_t k : labels_) ++sizes[k];
  // Dummies are worth most where prices are lowest.
  const Dummies placed = PlaceDummies(capacity_, prices_);
  if (placed.last >= 0) hub_ = prices_[placed.last];
  for (int32_t k = 0; k < root_; ++k) {
    dummies_[k] = placed.held[k];
    if (sizes_hold_) {
      dummies_[k] = capacity_.units[k] - sizes[k];
      continue;
    }
    const int64_t missing = capacity_.units[k] - sizes[k] - dummies_[k];
    excess_[k] = std::max<int64_t>(0, -missing);
    shortage_[k] = std::max<int64_t>(0, missing);
  }
}

void ListSimplex::TakeLists() {
  moved_.resize(prices_.size());
  for (size_t k = 0; k < moved_.size(); ++k) {
    moved_[k] = static_cast<float>(prices_[k] - lists_.prices[k]);
  }
  const auto listed = [&](int64_t item, int32_t cluster) {
    const CandidateLists::Chunk& chunk = lists_.chunks[item / lists_.chunk_rows];
    size_t t = chunk.offset[item % lists_.chunk_rows];
    while (chunk.code[t] != cluster) ++t;
    return chunk.rel[t];
  };
  constexpr int64_t kRows = 1 << 12;
  ParallelFor(DivideUp(lists_.rows, kRows), num_threads_, [&](int64_t part) {
    for (int64_t i = part * kRows; i < std::min(lists_.rows, (part + 1) * kRows); ++i) {
      const size_t item = i;
      if (labels_[item] >= 0) own_[item] = listed(i, labels_[item]);
      const int32_t node = node_of_[item];
      if (node < 0) continue;
      At(node).rel = listed(i, At(node).parent);
      for (int32_t c = At(node).child; c >= 0; c = At(c).next) At(c).rel = listed(i, c);
    }
  });
}

double ListSimplex::CostOf(int64_t item, int32_t node, float rel) const {
  return exact_costs_ ? exact_(item, node) : static_cast<double>(rel) - lists_.prices[node];
}

// Takes the costs of the tree exactly or from the lists.
void ListSimplex::CostTree(bool exactly) {
  exact_costs_ = exactly;
  const auto nodes = static_cast<int32_t>(tree_.size());
  for (int32_t node = root_ + 1; node < nodes; ++node) {
    const int64_t item = item_of_[node - root_ - 1];
    if (item < 0 || node_of_[item] != node) continue;
    At(node).cost = CostOf(item, At(node).parent, At(node).rel);
    for (int32_t c = At(node).child; c >= 0; c = At(c).next) {
      At(c).cost = CostOf(item, c, At(c).rel);
    }
  }
  Reprice();
}

// What going to another cluster gains, exactly.
double ListSimplex::ExactGain(int64_t item, int32_t to) const {
  const int32_t own = labels_[item];
  return exact_(item, own) + prices_[own] - exact_(item, to) - prices_[to];
}

// The cheapest other cluster of the item's list, and what going there gains.
ListSimplex::Offer ListSimplex::Best(int64_t item) const {
  const CandidateLists::Chunk& chunk = lists_.chunks[item / lists_.chunk_rows];
  const size_t row = item % lists_.chunk_rows;
  const size_t i = item;
  const int32_t label = labels_[i];
  const size_t end = chunk.offset[row + 1];
  const size_t begin = chunk.offset[row];
  float least;
  const int64_t t =
      kernels_.list_other(chunk.rel.data() + begin, chunk.code.data() + begin, moved_.data(),
                          static_cast<int64_t>(end - begin), label, &least);
  if (t < 0) return {-1, 0, -std::numeric_limits<double>::infinity()};
  const size_t place = begin + t;
  Offer best{chunk.code[place], chunk.rel[place], 0};
  if (label < 0) return best;
  const float own = own_[i] + moved_[label];
  best.gain = static_cast<double>(own) - static_cast<double>(least);
  const double error = static_cast<double>(chunk.error[row]) +
                       kListRounding * (std::abs(static_cast<double>(own)) + lists_.scale +
                                        std::abs(static_cast<double>(moved_[label])) +
                                        std::abs(static_cast<double>(moved_[best.code])));
  if (!exact_costs_ || std::abs(best.gain) > error) return best;
  // Too close to say: all that may be the cheapest, exactly.
  best.gain = -std::numeric_limits<double>::infinity();
  for (size_t t = chunk.offset[row]; t < end; ++t) {
    const float value = chunk.rel[t] + moved_[chunk.code[t]];
    if (static_cast<double>(value) > static_cast<double>(own) + error || chunk.code[t] == label) {
      continue;
    }
    const double gain = ExactGain(item, chunk.code[t]);
    if (gain > best.gain) best = {chunk.code[t], chunk.rel[t], gain};
  }
  return best;
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
  int32_t& node = node_of_[item];
  if (node >= 0) return node;
  node = free_.back();
  free_.pop_back();
  item_of_[node - root_ - 1] = item;
  At(node) = {};
  At(node).link = Link::kItem;
  At(node).rel = own_[item];
  At(node).cost = CostOf(item, labels_[item], At(node).rel);
  Attach(node, labels_[item]);
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
      const size_t k = at;
      prices_[k] += by;
      moved_[k] = static_cast<float>(prices_[k] - lists_.prices[k]);
    }
    for (int32_t c = At(at).child; c >= 0; c = At(c).next) stack_.push_back(c);
  }
}

// Units of flow that can still be pushed over the link of `node`, from its parent (down) or to it.
int64_t ListSimplex::Slack(int32_t node, bool down) const {
  const size_t k = node;
  const Node& at = At(node);
  switch (at.link) {
    case Link::kItem:  // flow goes from the item to the cluster
      if ((node < root_) == down) return kUnlimited;
      return down ? labels_[ItemAt(node)] == at.parent : labels_[ItemAt(at.parent)] == node;
    case Link::kExcess:
      return down ? excess_[k] : sizes_hold_ ? 0 : kUnlimited;
    case Link::kShortage:
      return down ? kUnlimited : shortage_[k];
    case Link::kDummies:
      return down ? capacity_.extra[k] - dummies_[k] : dummies_[k];
  }
  return 0;
}

void ListSimplex::Push(int32_t node, bool down, int64_t units) {
  const size_t k = node;
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
    seen_[u] = pivots_;
  }
  int32_t top = entering.second;
  while (seen_[top] != pivots_) top = At(top).parent;
  const auto cluster =  // of a link to the root
      (entering.first == root_ ? entering.second : entering.first);
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
  double cost = entering.cost;
  Link link = entering.link;
  for (int32_t node = begin;;) {
    const int32_t parent = At(node).parent;
    Detach(node);
    Attach(node, above);
    std::swap(At(node).rel, rel);
    std::swap(At(node).cost, cost);
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
  const double tolerance = kPivotGain * lists_.scale;
  for (int32_t node = 0; node < root_; ++node) {
    const size_t k = node;
    const double rise = prices_[k] - start_[k];
    const double above = prices_[k] - hub_;
    const int64_t extra = capacity_.extra[k];
    if (!sizes_hold_ && rise - penalty > tolerance) {
      Pivot({node, root_, Link::kExcess, 0, 0, rise - penalty});
    } else if (!sizes_hold_ && -rise - penalty > tolerance) {
      Pivot({root_, node, Link::kShortage, 0, 0, -rise - penalty});
    } else if (extra > 0 && dummies_[k] == 0 && -above > rounding()) {
      Pivot({root_, node, Link::kDummies, 0, 0, -above});
    } else if (extra > 0 && dummies_[k] == extra && above > rounding()) {
      Pivot({node, root_, Link::kDummies, 0, 0, above});
    } else {
      continue;
    }
    any = true;
  }
  return any;
}

// The items of a range that gain by a move, those first that gain most.
void ListSimplex::FindOffers(int64_t begin, int64_t end, double tolerance) {
  const int64_t parts = DivideUp(end - begin, kPart);
  std::vector<std::vector<std::pair<double, int64_t>>> found(parts);
  double most = 0;
  for (size_t k = 0; exact_costs_ && k < moved_.size(); ++k) {
    most = std::max(most, std::abs(static_cast<double>(moved_[k])));
  }
  ParallelFor(parts, parts < 4 ? 1 : num_threads_, [&](int64_t part) {
    auto& own = found[part];
    const int64_t last = std::min(end, begin + (part + 1) * kPart);
    for (int64_t first = begin + part * kPart; first < last;) {
      const int64_t number = first / lists_.chunk_rows;
      const CandidateLists::Chunk& chunk = lists_.chunks[number];
      const int64_t row = first - number * lists_.chunk_rows;
      const int64_t rows = std::min(last - first, lists_.chunk_rows - row);
      float limits[kPart];
      for (int64_t r = 0; r < rows; ++r) {
        const size_t i = first + r;
        const float moved = moved_[labels_[i]];
        limits[r] = own_[i] + moved;
        if (!exact_costs_) continue;
        // Above what Best() takes for too close to say.
        limits[r] +=
            chunk.error[row + r] +
            static_cast<float>(kScreenRounding *
                               (std::abs(static_cast<double>(limits[r])) +
                                std::abs(static_cast<double>(moved)) + lists_.scale + most));
      }
      int32_t where[kPart];
      const int64_t count =
          kernels_.lists_below(chunk.rel.data(), chunk.code.data(), chunk.offset.data() + row,
                               moved_.data(), labels_.data() + first, limits, rows, where);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t i = first + where[t];
        const double gain = Best(i).gain;
        if (gain > tolerance) own.emplace_back(-gain, i);
      }
      first += rows;
    }
  });
  offers_.clear();
  for (const auto& own : found) offers_.insert(offers_.end(), own.begin(), own.end());
  std::sort(offers_.begin(), offers_.end());
}

int64_t ListSimplex::Solve(double penalty) {
  for (int32_t node = At(root_).child; node >= 0; node = At(node).next) {
    const size_t k = node;
    const double to = At(node).link == Link::kExcess     ? start_[k] + penalty
                      : At(node).link == Link::kShortage ? start_[k] - penalty
                                                         : hub_;
    Shift(node, to - prices_[k]);
  }
  Search(penalty);
  return std::accumulate(excess_.begin(), excess_.end(), int64_t{0});
}

void ListSimplex::Solve() { Search(0); }

// First as the lists say, then exactly.
void ListSimplex::Search(double penalty) {
  CostTree(false);
  Pivots(penalty);
  CostTree(true);
  Pivots(penalty);
  Reprice();
}

// Pivots until nothing gains by a move.
void ListSimplex::Pivots(double penalty) {
  const double tolerance = exact_costs_ ? rounding() : kPivotGain * lists_.scale;
  int64_t idle = 0;  // items looked at since the last pivot
  int64_t block = kBlock;
  for (int64_t begin = 0, end = 0; idle < lists_.rows; begin = end < lists_.rows ? end : 0) {
    const int64_t before = pivots_;
    RootPivots(penalty);
    end = std::min(begin + block, lists_.rows);
    FindOffers(begin, end, tolerance);
    block = offers_.size() < kFewOffers ? std::min(kLargestBlock, 2 * block)
                                        : std::max(kBlock, block / 2);
    for (int again = 0; again < kOfferRounds && !offers_.empty(); ++again) {
      size_t kept = 0;
      for (const auto& [loss, item] : offers_) {
        Offer offer = Best(item);
        if (!(offer.gain > tolerance)) continue;
        if (!(offer.gain > -kStaleOffer * loss)) {
          offers_[kept++] = {-offer.gain, item};
          continue;
        }
        if (exact_costs_) offer.gain = ExactGain(item, offer.code);
        if (!(offer.gain > tolerance)) continue;
        Pivot({NodeOf(item), offer.code, Link::kItem, offer.rel,
               CostOf(item, offer.code, offer.rel), offer.gain});
      }
      offers_.resize(kept);
      std::sort(offers_.begin(), offers_.end());
    }
    idle = pivots_ > before ? 0 : idle + end - begin;
  }
}

// Prices again from the root, without the rounding of many shifts.
void ListSimplex::Reprice() {
  stack_.clear();
  for (int32_t node = At(root_).child; node >= 0; node = At(node).next) {
    if (At(node).link == Link::kDummies) prices_[node] = hub_;
    stack_.push_back(node);
  }
  while (!stack_.empty()) {
    const int32_t node = stack_.back();
    stack_.pop_back();
    for (int32_t item = At(node).child; item >= 0; item = At(item).next) {
      const double value = At(item).cost + prices_[node];
      for (int32_t c = At(item).child; c >= 0; c = At(c).next) {
        prices_[c] = value - At(c).cost;
        stack_.push_back(c);
      }
    }
  }
}

}  // namespace onerec
