#include "cpu/balanced_kmeans_finish.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

namespace onerec {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr uint64_t kEmpty = ~uint64_t{0};

uint64_t Mix(uint64_t key) {
  key *= 0x9E3779B97F4A7C15ull;
  return key ^ (key >> 29);
}

}  // namespace

ExactFinish::ExactFinish(const NodeCapacity& capacity, const Candidates& candidates,
                         std::vector<int64_t> sizes, int32_t* labels, double* prices)
    : capacity_(capacity),
      candidates_(candidates),
      labels_(labels),
      prices_(prices),
      nodes_(static_cast<int32_t>(capacity.units.size())),
      start_prices_(prices, prices + nodes_),
      sizes_(std::move(sizes)),
      dummies_(static_cast<size_t>(nodes_), 0),
      out_(static_cast<size_t>(nodes_)),
      in_(static_cast<size_t>(nodes_)),
      table_key_(1024, kEmpty),
      table_arc_(1024),
      distance_(static_cast<size_t>(nodes_) + 1, kInfinity),
      parent_(static_cast<size_t>(nodes_) + 1),
      parent_item_(static_cast<size_t>(nodes_) + 1),
      state_(static_cast<size_t>(nodes_) + 1, 0) {
  for (size_t i = 0; i < candidates_.item.size(); ++i) PushMoves(static_cast<int64_t>(i));
  // Dummies go where they are worth most, to the lowest prices; of equal prices to free places
  // first.
  if (capacity_.dummies == 0) return;
  std::vector<int32_t> order(static_cast<size_t>(nodes_));
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
        const auto k = static_cast<size_t>(order[t]);
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

ExactFinish::Arc& ExactFinish::ArcOf(int32_t from, int32_t to) {
  const uint64_t key =
      static_cast<uint64_t>(from) * static_cast<uint64_t>(nodes_) + static_cast<uint64_t>(to);
  size_t mask = table_key_.size() - 1;
  size_t slot = Mix(key) & mask;
  while (table_key_[slot] != kEmpty) {
    if (table_key_[slot] == key) return arcs_[static_cast<size_t>(table_arc_[slot])];
    slot = (slot + 1) & mask;
  }
  const auto arc = static_cast<int32_t>(arcs_.size());
  arcs_.push_back({from, to, {}});
  out_[static_cast<size_t>(from)].push_back(arc);
  in_[static_cast<size_t>(to)].push_back(arc);
  table_key_[slot] = key;
  table_arc_[slot] = arc;
  if (2 * arcs_.size() > table_key_.size()) {
    table_key_.assign(2 * table_key_.size(), kEmpty);
    table_arc_.resize(table_key_.size());
    mask = table_key_.size() - 1;
    for (size_t a = 0; a < arcs_.size(); ++a) {
      const uint64_t again = static_cast<uint64_t>(arcs_[a].from) * static_cast<uint64_t>(nodes_) +
                             static_cast<uint64_t>(arcs_[a].to);
      size_t place = Mix(again) & mask;
      while (table_key_[place] != kEmpty) place = (place + 1) & mask;
      table_key_[place] = again;
      table_arc_[place] = static_cast<int32_t>(a);
    }
  }
  return arcs_.back();
}

void ExactFinish::PushMoves(int64_t position) {
  const auto i = static_cast<size_t>(position);
  const int32_t item = candidates_.item[i];
  const int32_t from = labels_[item];
  const auto begin = static_cast<size_t>(candidates_.offset[i]);
  const auto end = static_cast<size_t>(candidates_.offset[i + 1]);
  double own = 0;
  for (size_t t = begin; t < end; ++t) {
    if (candidates_.code[t] == from) own = candidates_.cost[t];
  }
  for (size_t t = begin; t < end; ++t) {
    if (candidates_.code[t] == from) continue;
    Arc& arc = ArcOf(from, candidates_.code[t]);
    arc.heap.push_back({candidates_.cost[t] - own, item});
    std::push_heap(arc.heap.begin(), arc.heap.end());
  }
}

const ExactFinish::Move* ExactFinish::Top(Arc& arc) {
  while (!arc.heap.empty() && labels_[arc.heap.front().item] != arc.from) {
    std::pop_heap(arc.heap.begin(), arc.heap.end());
    arc.heap.pop_back();
  }
  return arc.heap.empty() ? nullptr : &arc.heap.front();
}

bool ExactFinish::Augment(int32_t source, double reach) {
  const int32_t hub = nodes_;
  const auto by_distance = std::greater<std::pair<double, int32_t>>();
  for (const int32_t node : touched_) {
    distance_[static_cast<size_t>(node)] = kInfinity;
    state_[static_cast<size_t>(node)] = 0;
  }
  touched_.clear();
  queue_.clear();
  const auto relax = [&](int32_t from, int32_t to, double length, int32_t item) {
    const double reached =
        distance_[static_cast<size_t>(from)] + std::max(0.0, length);  // rounding may go below zero
    const auto b = static_cast<size_t>(to);
    if (state_[b] == 2 || !(reached < distance_[b])) return;
    if (state_[b] == 0) {
      state_[b] = 1;
      touched_.push_back(to);
    }
    distance_[b] = reached;
    parent_[b] = from;
    parent_item_[b] = item;
    queue_.emplace_back(reached, to);
    std::push_heap(queue_.begin(), queue_.end(), by_distance);
  };
  distance_[static_cast<size_t>(source)] = 0;
  state_[static_cast<size_t>(source)] = 1;
  touched_.push_back(source);
  queue_.emplace_back(0.0, source);
  int32_t target = -1;
  while (!queue_.empty()) {
    const auto [reached, node] = queue_.front();
    std::pop_heap(queue_.begin(), queue_.end(), by_distance);
    queue_.pop_back();
    const auto a = static_cast<size_t>(node);
    if (state_[a] == 2) continue;
    state_[a] = 2;
    if (node == hub) {
      for (int32_t b = 0; b < nodes_; ++b) {
        const auto k = static_cast<size_t>(b);
        if (dummies_[k] < capacity_.extra[k]) relax(hub, b, prices_[b] - hub_price_, -1);
      }
      continue;
    }
    if (sizes_[a] + dummies_[a] < capacity_.units[a]) {
      target = node;
      break;
    }
    if (reached > reach) return false;
    for (const int32_t index : out_[a]) {
      Arc& arc = arcs_[static_cast<size_t>(index)];
      if (state_[static_cast<size_t>(arc.to)] == 2) continue;
      const Move* move = Top(arc);
      if (move == nullptr) continue;
      relax(node, arc.to, move->delta + prices_[arc.to] - prices_[node], move->item);
    }
    if (dummies_[a] > 0) relax(node, hub, hub_price_ - prices_[node], -1);
  }
  if (target < 0) return false;
  const double length = distance_[static_cast<size_t>(target)];
  for (const int32_t node : touched_) {
    const auto k = static_cast<size_t>(node);
    if (state_[k] != 2 || node == hub) continue;
    if (prices_[node] + (length - distance_[k]) - start_prices_[k] > reach) return false;
  }
  for (const int32_t node : touched_) {
    const auto k = static_cast<size_t>(node);
    if (state_[k] != 2) continue;
    (node == hub ? hub_price_ : prices_[node]) += length - distance_[k];
  }
  for (int32_t node = target; node != source;) {
    const auto b = static_cast<size_t>(node);
    const int32_t from = parent_[b];
    if (from == hub) {
      ++dummies_[b];
    } else if (node == hub) {
      --dummies_[static_cast<size_t>(from)];
    } else {
      const int32_t item = parent_item_[b];
      labels_[item] = node;
      --sizes_[static_cast<size_t>(from)];
      ++sizes_[b];
      PushMoves(std::lower_bound(candidates_.item.begin(), candidates_.item.end(), item) -
                candidates_.item.begin());
    }
    node = from;
  }
  ++moves_;
  return true;
}

bool ExactFinish::Run(double reach, const std::function<void()>& on_step) {
  bool complete = true;
  for (int32_t source = 0; source < nodes_; ++source) {
    const auto k = static_cast<size_t>(source);
    while (sizes_[k] + dummies_[k] > capacity_.units[k]) {
      if (!Augment(source, reach)) {
        complete = false;
        break;
      }
      if (on_step && moves_ % 1024 == 0) on_step();
    }
  }
  return complete;
}

void ExactFinish::CentrePrices(double reach) {
  double most = 0;
  for (int32_t k = 0; k < nodes_; ++k) {
    most = std::max(most, prices_[k] - start_prices_[static_cast<size_t>(k)]);
  }
  const double room = (reach - most) / 2;
  if (!(room > 0)) return;
  for (int sweep = 0; sweep < 16; ++sweep) {
    if (capacity_.dummies > 0) {
      double low = -kInfinity;
      double high = kInfinity;
      for (int32_t k = 0; k < nodes_; ++k) {
        const auto node = static_cast<size_t>(k);
        if (dummies_[node] > 0) low = std::max(low, prices_[k]);
        if (dummies_[node] < capacity_.extra[node]) high = std::min(high, prices_[k]);
      }
      if (low < high && high < kInfinity && low > -kInfinity) hub_price_ = (low + high) / 2;
    }
    for (int32_t k = 0; k < nodes_; ++k) {
      const auto node = static_cast<size_t>(k);
      double low = start_prices_[node] - room;
      double high = start_prices_[node] + most + room;
      for (const int32_t index : out_[node]) {
        Arc& arc = arcs_[static_cast<size_t>(index)];
        if (const Move* move = Top(arc)) high = std::min(high, prices_[arc.to] + move->delta);
      }
      for (const int32_t index : in_[node]) {
        Arc& arc = arcs_[static_cast<size_t>(index)];
        if (const Move* move = Top(arc)) low = std::max(low, prices_[arc.from] - move->delta);
      }
      if (capacity_.dummies > 0) {
        if (dummies_[node] > 0) high = std::min(high, hub_price_);
        if (dummies_[node] < capacity_.extra[node]) low = std::max(low, hub_price_);
      }
      if (low < high) prices_[k] = (low + high) / 2;
    }
  }
}

}  // namespace onerec
