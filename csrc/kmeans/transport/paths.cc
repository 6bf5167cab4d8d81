#include "kmeans/transport/paths.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "kmeans/options.h"
#include "kmeans/tiles/pass.h"
#include "support/thread_pool.h"

namespace onerec {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

ExactFinish::ExactFinish(const NodeCapacity& capacity, const FinishCosts& costs, int64_t items,
                         int32_t* labels, double* prices, int num_threads,
                         std::function<void()> on_step)
    : capacity_(capacity),
      costs_(costs),
      labels_(labels),
      prices_(prices),
      count_(static_cast<int32_t>(capacity.units.size())),
      num_threads_(num_threads),
      on_step_(std::move(on_step)),
      start_prices_(prices, prices + count_),
      sizes_(count_, 0),
      dummies_(count_, 0),
      nodes_(count_),
      member_offset_(count_ + 1, 0),
      members_(items),
      moved_(items, 0),
      own_(items, -kInfinity),
      distance_(count_ + 1, kInfinity),
      parent_(count_ + 1),
      parent_item_(count_ + 1),
      state_(count_ + 1, 0) {
  for (int64_t i = 0; i < items; ++i) ++sizes_[labels[i]];
  std::partial_sum(sizes_.begin(), sizes_.end(), member_offset_.begin() + 1);
  std::vector<int64_t> place(member_offset_.begin(), member_offset_.end() - 1);
  for (int64_t i = 0; i < items; ++i) {
    members_[place[labels[i]]++] = static_cast<int32_t>(i);
  }
  PlaceDummies();
}

// Dummies go where they are worth most, to the lowest prices; of equal prices to free places first.
void ExactFinish::PlaceDummies() {
  if (capacity_.dummies == 0) return;
  std::vector<int32_t> order(count_);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return prices_[a] != prices_[b] ? prices_[a] < prices_[b] : a < b;
  });
  int64_t left = capacity_.dummies;
  for (size_t first = 0, last = 0; first < order.size() && left > 0; first = last) {
    hub_price_ = prices_[order[first]];
    while (last < order.size() && prices_[order[last]] == hub_price_) ++last;
    for (const bool free_only : {true, false}) {
      for (size_t t = first; t < last; ++t) {
        const size_t k = order[t];
        int64_t room = capacity_.extra[k] - dummies_[k];
        if (free_only) {
          room = std::min(room, std::max<int64_t>(0, capacity_.units[k] - sizes_[k] - dummies_[k]));
        }
        const int64_t given = std::min(left, room);
        dummies_[k] += given;
        left -= given;
      }
    }
  }
}

// Exact cost of an item where it is.
double ExactFinish::OwnCost(int32_t item) {
  double& cost = own_[item];
  if (cost == -kInfinity) cost = costs_.Exact(item, labels_[item]);
  return cost;
}

// Items in the node now, ascending.
std::vector<int32_t> ExactFinish::Members(int32_t node) const {
  const size_t k = node;
  std::vector<int32_t> items;
  for (int64_t t = member_offset_[k]; t < member_offset_[k + 1]; ++t) {
    const int32_t item = members_[t];
    if (moved_[item] == 0) items.push_back(item);
  }
  if (nodes_[k].arrived.empty()) return items;
  for (const int32_t item : nodes_[k].arrived) {
    if (labels_[item] == node) items.push_back(item);
  }
  std::sort(items.begin(), items.end());
  items.erase(std::unique(items.begin(), items.end()), items.end());
  return items;
}

int64_t ExactFinish::FirstWidth() const { return std::max(kFirstWidth, kFirstArcs / count_); }

// The arcs of a node from the moves that are known; false if they do not help at its present price.
bool ExactFinish::TakeKnown(int32_t index) {
  Node& node = nodes_[index];
  const std::vector<int32_t> items = Members(index);
  if (items.empty()) return false;               // those that arrive later need arcs to everywhere
  std::vector<std::vector<Move>> found(count_);  // by where they go
  const double frontier = costs_.Known(
      items.data(), static_cast<int64_t>(items.size()), index,
      [&](int64_t i, int32_t to, double delta) { found[to].push_back({delta, items[i], false}); });
  if (!(frontier > prices_[index])) return false;
  node.expanded = true;
  node.frontier = frontier;
  for (int32_t to = 0; to < count_; ++to) {
    std::vector<Move>& heap = found[to];
    if (heap.empty()) continue;
    std::make_heap(heap.begin(), heap.end());
    const double rest = frontier - start_prices_[to];
    const double bound = std::min(heap.front().delta, rest);
    node.arcs.push_back({bound, bound, to});  // Sort adds the price
    node.moves.push_back({rest, std::move(heap)});
  }
  Sort(node);
  return true;
}

void ExactFinish::Expand(int32_t index) {
  Node& node = nodes_[index];
  if (!node.expanded && TakeKnown(index)) return;
  const KMeansKernels& kernels = CurrentKMeansKernels();
  const std::vector<int32_t> items = Members(index);
  const size_t count = count_;
  node.width = std::min<int64_t>(count_ - 1, node.width > 0 ? 4 * node.width : FirstWidth());
  node.expanded = true;
  struct Entry {
    float key;
    int32_t item;
  };
  const int64_t depth =
      std::clamp<int64_t>(std::min(4096 / count_, static_cast<int32_t>(items.size() / 16)), 4, 40);
  // The `depth` smallest keys of every column; worst is the largest of them.
  std::vector<float> worst(count, std::numeric_limits<float>::infinity());
  std::vector<Entry> best(count * depth, {std::numeric_limits<float>::infinity(), -1});
  std::vector<int32_t> where(count);
  costs_.Rows(items.data(), static_cast<int64_t>(items.size()),
              [&](int64_t i, const float* row, float error) {
                const float base = row[index] + error;
                const int64_t found =
                    kernels.collect_each(row, base, worst.data(), count_, where.data());
                for (int64_t t = 0; t < found; ++t) {
                  const size_t k = where[t];
                  Entry* entries = best.data() + k * depth;
                  int64_t place = depth - 1;  // sorted, the worst last
                  const float key = row[k] - base;
                  for (; place > 0 && entries[place - 1].key > key; --place) {
                    entries[place] = entries[place - 1];
                  }
                  entries[place] = {key, items[i]};
                  worst[k] = entries[depth - 1].key;
                }
              });
  std::vector<std::pair<double, int32_t>> order;
  for (int32_t k = 0; k < count_; ++k) {
    if (k == index) continue;
    order.emplace_back(static_cast<double>(best[k * depth].key) + prices_[k], k);
  }
  node.frontier = kInfinity;
  if (node.width < count_ - 1) {
    std::nth_element(order.begin(), order.begin() + node.width, order.end());
    node.frontier = order[node.width].first;
    cut_ = true;
    order.resize(node.width);
  }
  node.arcs.clear();
  node.moves.clear();
  node.fresh.clear();
  std::sort(order.begin(), order.end());
  for (const auto& [value, k] : order) {
    const Entry* entries = best.data() + k * depth;
    Moves moves;
    moves.rest = static_cast<int64_t>(items.size()) > depth
                     ? static_cast<double>(entries[depth - 1].key)
                     : kInfinity;
    for (int64_t t = 0; t < depth && entries[t].item >= 0; ++t) {
      moves.heap.push_back({static_cast<double>(entries[t].key), entries[t].item, false});
    }
    std::make_heap(moves.heap.begin(), moves.heap.end());
    node.arcs.push_back({static_cast<double>(entries[0].key), value, k});
    node.moves.push_back(std::move(moves));
  }
}

// Looks at every item of the node again for one arc.
void ExactFinish::Refill(int32_t index, size_t arc) {
  Node& node = nodes_[index];
  Moves& moves = node.moves[arc];
  const std::vector<int32_t> items = Members(index);
  const size_t keep = std::max<size_t>(32, items.size() / 4);
  moves.heap.clear();
  for (const int32_t item : items) {
    moves.heap.push_back({costs_.Exact(item, node.arcs[arc].to) - OwnCost(item), item, true});
  }
  moves.rest = kInfinity;
  if (moves.heap.size() > keep) {
    const auto nth = moves.heap.begin() + static_cast<int64_t>(keep);
    std::nth_element(moves.heap.begin(), nth, moves.heap.end(),
                     [](const Move& a, const Move& b) { return b < a; });
    moves.rest = nth->delta;
    moves.heap.resize(keep);
  }
  std::make_heap(moves.heap.begin(), moves.heap.end());
}

// Cheapest move of the arc, or null if there is none below `enough`.
const ExactFinish::Move* ExactFinish::Top(int32_t index, size_t arc, double enough) {
  Node& node = nodes_[index];
  Moves& moves = node.moves[arc];
  std::vector<Move>& heap = moves.heap;
  for (;;) {
    while (!heap.empty() && labels_[heap.front().item] != index) {
      std::pop_heap(heap.begin(), heap.end());
      heap.pop_back();
    }
    const double top = heap.empty() ? kInfinity : heap.front().delta;
    node.arcs[arc].bound = std::min(top, moves.rest);
    if (!(node.arcs[arc].bound < enough)) return nullptr;
    if (top > moves.rest) {
      Refill(index, arc);
    } else if (heap.front().exact) {
      return &heap.front();
    } else {
      std::pop_heap(heap.begin(), heap.end());
      Move& last = heap.back();
      last.delta = costs_.Exact(last.item, node.arcs[arc].to) - OwnCost(last.item);
      last.exact = true;
      std::push_heap(heap.begin(), heap.end());
    }
  }
}

// Puts the arcs in the order of the present prices: those have risen since, most by much.
void ExactFinish::Sort(Node& node) {
  std::vector<std::pair<double, size_t>> order;
  for (size_t arc = 0; arc < node.arcs.size(); ++arc) {
    order.emplace_back(node.arcs[arc].bound + prices_[node.arcs[arc].to], arc);
  }
  std::sort(order.begin(), order.end());
  std::vector<Arc> arcs;
  std::vector<Moves> moves;
  for (const auto& [least, arc] : order) {
    arcs.push_back({node.arcs[arc].bound, least, node.arcs[arc].to});
    moves.push_back(std::move(node.moves[arc]));
  }
  node.arcs = std::move(arcs);
  node.moves = std::move(moves);
  node.fresh.clear();
  node.looks = 0;
}

// Offers the moves of items that have just come to their nodes.
void ExactFinish::Arrive(const std::vector<int32_t>& items) {
  std::vector<int32_t> expanded;
  for (const int32_t item : items) {
    const size_t k = labels_[item];
    moved_[item] = 1;
    own_[item] = -kInfinity;
    nodes_[k].arrived.push_back(item);
    if (nodes_[k].expanded) expanded.push_back(item);
  }
  std::vector<uint8_t> listed;
  costs_.Rows(expanded.data(), static_cast<int64_t>(expanded.size()),
              [&](int64_t i, const float* row, float error) {
                const int32_t item = expanded[i];
                const int32_t index = labels_[item];
                Node& node = nodes_[index];
                const float base = row[index] + error;
                const auto push = [&](size_t arc, double delta) {
                  std::vector<Move>& heap = node.moves[arc].heap;
                  heap.push_back({delta, item, false});
                  std::push_heap(heap.begin(), heap.end());
                  node.arcs[arc].bound = std::min(node.arcs[arc].bound, delta);
                  if (delta + prices_[node.arcs[arc].to] < node.arcs[arc].least) {
                    node.arcs[arc].least = -kInfinity;  // said once
                    node.fresh.push_back(arc);
                  }
                };
                const bool partial = node.frontier < kInfinity;
                if (partial) listed.assign(count_, 0);
                for (size_t arc = 0; arc < node.arcs.size(); ++arc) {
                  const int32_t to = node.arcs[arc].to;
                  const auto delta = static_cast<double>(row[to] - base);
                  if (delta < node.moves[arc].rest) push(arc, delta);
                  if (partial) listed[to] = 1;
                }
                for (int32_t k = 0; partial && k < count_; ++k) {
                  const auto delta = static_cast<double>(row[k] - base);
                  const double price = node.width > 0 ? prices_[k] : start_prices_[k];
                  if (listed[k] != 0 || k == index || delta + price >= node.frontier) {
                    continue;
                  }
                  // The others were left out because they cost at least this much.
                  node.arcs.push_back({kInfinity, kInfinity, k});
                  node.moves.push_back({node.frontier - price, {}});
                  node.arcs.back().bound = node.moves.back().rest;
                  push(node.arcs.size() - 1, delta);
                }
              });
}

// One search from all of `sources` at once, until `wanted` nodes with room are reached, then a path
// to each of these that crosses no other one's moves. Every node must end full, so a path to any of
// them keeps the assignment optimal. Returns the number of paths.
int64_t ExactFinish::Augment(const std::vector<int32_t>& sources, int64_t wanted) {
  const int32_t hub = count_;
  const auto by_distance = std::greater<std::pair<double, int32_t>>();
  for (const int32_t node : touched_) {
    distance_[node] = kInfinity;
    state_[node] = 0;
  }
  touched_.clear();
  queue_.clear();
  const auto enqueue = [&](double reached, int32_t what) {
    queue_.emplace_back(reached, what);
    std::push_heap(queue_.begin(), queue_.end(), by_distance);
  };
  // With one wanted, the nearest node with room that has been reached: nothing beyond counts. At
  // first a guess after the last search.
  const bool guessed = wanted == 1 && guess_ < kInfinity;
  double nearest = guessed ? guess_ : kInfinity;
  const auto has_room = [&](size_t k) { return sizes_[k] + dummies_[k] < capacity_.units[k]; };
  const auto relax = [&](int32_t from, int32_t to, double length, int32_t item) {
    const double reached = distance_[from] + std::max(0.0, length);  // rounding goes below zero
    const size_t b = to;
    if (state_[b] == 2 || !(reached < distance_[b]) || !(reached < nearest)) return;
    if (wanted == 1 && to != hub && has_room(b)) nearest = reached;
    if (state_[b] == 0) {
      state_[b] = 1;
      touched_.push_back(to);
    }
    distance_[b] = reached;
    parent_[b] = from;
    parent_item_[b] = item;
    enqueue(reached, to);
  };
  const auto leave = [&](int32_t index) {
    Node& node = nodes_[index];
    const double reached = distance_[index];
    const auto look = [&](size_t arc) {
      const int32_t to = node.arcs[arc].to;
      const double rise = prices_[to] - prices_[index];
      const double enough = std::min(nearest, distance_[to]) - reached - rise;
      if (!(node.arcs[arc].bound < enough)) return;
      const Move* move = Top(index, arc, enough);
      if (move != nullptr) relax(index, to, move->delta + rise, move->item);
    };
    if (node.looks > 8 * static_cast<int64_t>(node.arcs.size())) Sort(node);
    for (const size_t arc : node.fresh) look(arc);
    size_t arc = 0;
    for (; arc < node.arcs.size(); ++arc) {
      if (node.arcs[arc].least - prices_[index] >= nearest - reached) break;
      look(arc);
    }
    node.looks += static_cast<int64_t>(arc + node.fresh.size());
    if (node.frontier < kInfinity) {  // beyond it, arcs that are not listed may be cheaper
      enqueue(reached + std::max(0.0, node.frontier - prices_[index]), hub + 1 + index);
    }
  };
  for (const int32_t source : sources) {
    distance_[source] = 0;
    parent_[source] = -1;
    state_[source] = 1;
    touched_.push_back(source);
    enqueue(0.0, source);
  }
  std::vector<int32_t> targets;
  while (!queue_.empty()) {
    const int32_t what = queue_.front().second;
    std::pop_heap(queue_.begin(), queue_.end(), by_distance);
    queue_.pop_back();
    if (what > hub) {
      const int32_t index = what - hub - 1;
      Expand(index);
      leave(index);
      continue;
    }
    const size_t a = what;
    if (state_[a] == 2) continue;
    state_[a] = 2;
    if (what == hub) {
      for (int32_t b = 0; b < count_; ++b) {
        const size_t k = b;
        if (dummies_[k] < capacity_.extra[k]) relax(hub, b, prices_[b] - hub_price_, -1);
      }
      continue;
    }
    if (has_room(a)) {
      targets.push_back(what);
      if (static_cast<int64_t>(targets.size()) == wanted) break;
    }
    if (!nodes_[a].expanded) Expand(what);
    leave(what);
    if (dummies_[a] > 0) relax(what, hub, hub_price_ - prices_[what], -1);
  }
  if (targets.empty() && guessed) {
    guess_ = guess_ > 0 && !far_ ? 16 * guess_ : kInfinity;
    far_ = true;
    return Augment(sources, wanted);
  }
  if (targets.empty()) throw std::logic_error("balanced k-means: no path to a cluster with room");
  const double length = distance_[targets.back()];
  guess_ = std::max(4 * length, far_ ? 0.0 : guess_ / 2);
  far_ = false;
  for (const int32_t node : touched_) {
    const size_t k = node;
    if (state_[k] == 2) (node == hub ? hub_price_ : prices_[node]) += length - distance_[k];
  }
  constexpr uint8_t kUsed = 3;  // state of a node to which a path has led
  std::vector<int32_t> travelled;
  int64_t paths = 0;
  for (const int32_t target : targets) {
    int32_t root = target;
    bool open = true;
    for (; open && parent_[root] >= 0; root = parent_[root]) {
      const size_t b = root;
      const bool dummy = root == hub || parent_[b] == hub;
      open = state_[b] != kUsed && (dummy || labels_[parent_item_[b]] == parent_[b]);
    }
    const size_t r = root;
    if (!open || sizes_[r] + dummies_[r] <= capacity_.units[r]) continue;
    for (int32_t node = target; node != root;) {
      const size_t b = node;
      const int32_t from = parent_[b];
      state_[b] = kUsed;
      if (from == hub) {
        ++dummies_[b];
      } else if (node == hub) {
        --dummies_[from];
      } else {
        labels_[parent_item_[b]] = node;
        --sizes_[from];
        ++sizes_[b];
        travelled.push_back(parent_item_[b]);
      }
      node = from;
    }
    ++paths;
  }
  Arrive(travelled);
  moves_ += paths;
  return paths;
}

void ExactFinish::Run() {
  // Nodes that shed items are expanded anyway: all at once, in parallel; where they are many, paths
  // soon leave the others too.
  std::vector<int32_t> sources;
  for (int32_t k = 0; k < count_; ++k) {
    const size_t node = k;
    if (sizes_[node] + dummies_[node] > capacity_.units[node]) sources.push_back(k);
  }
  std::vector<int32_t> first = sources;
  if (4 * first.size() >= sizes_.size()) {
    first.resize(sizes_.size());
    std::iota(first.begin(), first.end(), 0);
  }
  ParallelFor(static_cast<int64_t>(first.size()), num_threads_,
              [&](int64_t s) { Expand(first[s]); });
  // Many paths from one search, as long as there are many.
  for (;;) {
    std::vector<int32_t> over;
    int64_t free = 0;
    for (int32_t k = 0; k < count_; ++k) {
      const size_t node = k;
      const int64_t held = sizes_[node] + dummies_[node];
      if (held > capacity_.units[node]) over.push_back(k);
      free += held < capacity_.units[node] ? 1 : 0;
    }
    if (over.empty() || Augment(over, std::max<int64_t>(1, free / 2)) < kTogether) break;
    if (on_step_) on_step_();
  }
  for (const int32_t source : sources) {
    const size_t k = source;
    while (sizes_[k] + dummies_[k] > capacity_.units[k]) {
      Augment({source}, 1);
      if (on_step_ && moves_ % 256 == 0) on_step_();
    }
  }
}

void ExactFinish::CentrePrices(double reach) {
  // Only arcs that a price could reach; the others stay slack whatever happens here.
  struct Near {
    int32_t from;
    int32_t to;
    double delta;
  };
  std::vector<std::vector<Near>> found(count_);
  ParallelFor(count_, num_threads_, [&](int64_t k) {
    const auto a = static_cast<int32_t>(k);
    Node& node = nodes_[a];
    if (!node.expanded) Expand(a);
    for (size_t arc = 0; arc < node.arcs.size(); ++arc) {
      const int32_t to = node.arcs[arc].to;
      const double enough = 2 * reach + prices_[a] - prices_[to];
      if (!(node.arcs[arc].bound < enough)) continue;
      if (const Move* move = Top(a, arc, enough)) {
        found[a].push_back({a, to, move->delta});
      }
    }
    node.arcs = {};  // the moves of all nodes at once would be larger than the lists
    node.moves = {};
  });
  std::vector<Near> near;
  for (const auto& part : found) near.insert(near.end(), part.begin(), part.end());
  const std::vector<double> end(prices_, prices_ + count_);
  // Moves that are not listed bear that all prices fall by this much.
  double fall = reach;
  for (int32_t k = 0; k < count_; ++k) {
    fall = std::min(fall, nodes_[k].frontier - prices_[k]);
  }
  fall = std::max(0.0, fall);
  std::vector<double> low(count_);
  std::vector<double> high(count_);
  for (int sweep = 0; sweep < kCenteringSweeps; ++sweep) {
    for (int32_t k = 0; k < count_; ++k) {
      const Node& node = nodes_[k];
      const size_t at = k;
      // What is known of moves holds at starting prices, or at the present ones if some node's arcs
      // are not all known.
      high[at] = std::min(end[at] + reach, node.frontier - fall);
      low[at] = std::max(end[at] - reach, (cut_ ? end[at] : start_prices_[at]) - fall);
    }
    for (const Near& arc : near) {
      high[arc.from] = std::min(high[arc.from], prices_[arc.to] + arc.delta);
      low[arc.to] = std::max(low[arc.to], prices_[arc.from] - arc.delta);
    }
    if (capacity_.dummies > 0) {
      double hub_low = -kInfinity;
      double hub_high = kInfinity;
      for (int32_t k = 0; k < count_; ++k) {
        const size_t node = k;
        if (dummies_[node] > 0) hub_low = std::max(hub_low, prices_[k]);
        if (dummies_[node] < capacity_.extra[node]) hub_high = std::min(hub_high, prices_[k]);
      }
      if (hub_low < hub_high && hub_high < kInfinity && hub_low > -kInfinity) {
        hub_price_ = (hub_low + hub_high) / 2;
      }
      for (int32_t k = 0; k < count_; ++k) {
        const size_t node = k;
        if (dummies_[node] > 0) high[node] = std::min(high[node], hub_price_);
        if (dummies_[node] < capacity_.extra[node]) low[node] = std::max(low[node], hub_price_);
      }
    }
    // All at once: no price uses more than half of the slack between it and another.
    for (int32_t k = 0; k < count_; ++k) {
      const size_t node = k;
      const double up = std::max(0.0, high[node] - prices_[k]);
      const double down = std::max(0.0, prices_[k] - low[node]);
      prices_[k] += (up - down) / 2;
    }
  }
}

}  // namespace onerec
