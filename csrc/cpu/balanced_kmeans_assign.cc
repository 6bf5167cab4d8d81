// The priced assignment: dual sweeps, hard step, exact finish, certificate.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "cpu/balanced_kmeans_finish.h"
#include "cpu/balanced_kmeans_pass.h"
#include "cpu/balanced_kmeans_solver.h"
#include "cpu/thread_pool.h"

namespace onerec {
namespace {

constexpr int64_t kGroups = 32;           // parts of a sweep, each summed in order
constexpr int64_t kSampleRows = 32;       // rows for each centre in the first price search
constexpr int64_t kListTarget = 24;       // entries of an average candidate list
constexpr double kSweepTolerance = 0.01;  // share of the items off balance that ends a level
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

struct ListChunk {
  std::vector<int64_t> offset;
  std::vector<int32_t> code;
  std::vector<float> rel;      // cost + price above the row's smallest, at the prices of the pass
  std::vector<float> error;    // bound on the error of rel, a row
  std::vector<int32_t> found;  // scratch
};

// For each item, every centre whose cost + price is within `threshold` of the smallest.
struct Lists {
  int64_t chunk_rows = 0;
  std::vector<ListChunk> chunks;
  std::vector<double> prices;
  float threshold = 0;  // infinite: every centre
  float scale = 0;      // a finite measure of the width of the lists
};

class Search {
 public:
  Search(const FloatRows& x, const std::vector<double>& mean, const Nodes& nodes, int64_t clusters,
         const BalancedKMeansOptions& options, BalancedAssignment& report)
      : x_(x),
        nodes_(nodes),
        options_(options),
        report_(report),
        kernels_(CurrentKMeansKernels()),
        centers_(nodes.centers.data(), nodes.count, x.columns, mean, kernels_) {
    const int64_t low = x.rows / clusters;
    const int64_t rest = x.rows % clusters;
    for (const int64_t m : nodes.multiplicity) {
      target_.push_back(static_cast<double>(x.rows) * static_cast<double>(m) /
                        static_cast<double>(clusters));
      capacity_.units.push_back(m * (rest > 0 ? low + 1 : low));
      capacity_.extra.push_back(rest > 0 ? m : 0);
    }
    capacity_.dummies = rest > 0 ? clusters - rest : 0;
  }

  void Run(bool prices_given, double* prices, int32_t* labels) {
    if (!prices_given) SamplePrices(prices);
    int64_t target = kListTarget;
    bool finishing = false;
    for (int round = 0;; ++round) {
      BuildLists(prices, target);
      if (!finishing && !ListPrices(prices) && round < 8) continue;
      if (Finish(prices, labels, finishing)) return;
      finishing = true;
      target *= 2;
    }
  }

 private:
  // Annealed entropic sweeps over all centres for a sample of the items.
  void SamplePrices(double* prices) {
    const double begin = Seconds();
    const int64_t columns = centers_.columns();
    const int64_t affordable =
        options_.memory_budget / 3 / static_cast<int64_t>(sizeof(float)) / columns;
    const int64_t count = std::min({x_.rows, std::max<int64_t>(kSampleRows * nodes_.count, 4096),
                                    std::max<int64_t>(affordable, 1)});
    const std::vector<int64_t> rows = SampleRows(x_.rows, count, options_.seed ^ 0x5A3F);
    std::vector<float> costs(static_cast<size_t>(count * columns));
    centers_.SetPrices(nullptr);
    DensePass(x_, rows.data(), count, centers_, kernels_, options_,
              [&](int64_t, int64_t i, const float* row, double) {
                std::memcpy(costs.data() + i * columns, row,
                            sizeof(float) * static_cast<size_t>(columns));
              });
    std::vector<double> spread(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      const float* row = costs.data() + i * columns;
      double sum = 0;
      for (int64_t k = 0; k < nodes_.count; ++k) sum += row[k];
      spread[static_cast<size_t>(i)] =
          sum / static_cast<double>(nodes_.count) - kernels_.row_min(row, columns);
    }
    std::nth_element(spread.begin(), spread.begin() + count / 2, spread.end());
    double eps = 0.3 * spread[static_cast<size_t>(count / 2)];
    if (!(eps > 0)) return;
    const double scale = static_cast<double>(count) / static_cast<double>(x_.rows);
    std::vector<float> p(static_cast<size_t>(columns), 0.0f);
    const int64_t groups = std::min(kGroups, count);
    std::vector<float> partial(static_cast<size_t>(groups * columns));
    for (int level = 0; level < 9; ++level, eps /= 2) {
      for (int sweep = 0; sweep < 12; ++sweep) {
        for (int64_t k = 0; k < nodes_.count; ++k) {
          p[static_cast<size_t>(k)] = static_cast<float>(prices[k]);
        }
        std::fill(partial.begin(), partial.end(), 0.0f);
        ParallelFor(groups, options_.num_threads, [&](int64_t g) {
          std::vector<float> scratch(static_cast<size_t>(columns));
          for (int64_t i = g * count / groups; i < (g + 1) * count / groups; ++i) {
            kernels_.soft_row(costs.data() + i * columns, p.data(), columns,
                              static_cast<float>(1 / eps), scratch.data(),
                              partial.data() + g * columns);
          }
        });
        if (Raise(partial, groups, columns, eps, scale, prices) < kSweepTolerance) break;
      }
      if (options_.on_step) options_.on_step();
    }
    report_.price_seconds += Seconds() - begin;
  }

  // One update of the prices from the column sums; returns the share of the mass off balance.
  double Raise(const std::vector<float>& partial, int64_t groups, int64_t columns, double eps,
               double scale, double* prices) {
    ++report_.sweeps;
    double off = 0;
    for (int64_t k = 0; k < nodes_.count; ++k) {
      double sum = 0;
      for (int64_t g = 0; g < groups; ++g) sum += partial[static_cast<size_t>(g * columns + k)];
      const double want = scale * target_[static_cast<size_t>(k)];
      off += std::abs(sum - want);
      prices[k] += eps * std::clamp(std::log(std::max(sum, 1e-30) / want), -8.0, 8.0);
    }
    return off / (2 * scale * static_cast<double>(x_.rows));
  }

  // One pass over everything: candidate lists of about `target` entries on average.
  void BuildLists(const double* prices, int64_t target) {
    const double begin = Seconds();
    const int64_t columns = centers_.columns();
    centers_.SetPrices(prices);
    lists_.prices.assign(prices, prices + nodes_.count);
    {
      const int64_t count = std::min(x_.rows, std::max<int64_t>(256, (1 << 21) / columns));
      const std::vector<int64_t> rows = SampleRows(x_.rows, count, options_.seed ^ 0x1175);
      std::vector<float> above(static_cast<size_t>(count * nodes_.count));
      DensePass(x_, rows.data(), count, centers_, kernels_, options_,
                [&](int64_t, int64_t i, const float* row, double) {
                  const float low = kernels_.row_min(row, columns);
                  for (int64_t k = 0; k < nodes_.count; ++k) {
                    above[static_cast<size_t>(i * nodes_.count + k)] = row[k] - low;
                  }
                });
      const auto place = above.begin() + count * std::min(target, nodes_.count) - 1;
      std::nth_element(above.begin(), place, above.end());
      lists_.scale = *place;
      lists_.threshold = target < nodes_.count ? *place : kInfinity;
    }
    const PassPlan plan = PlanPass(x_.rows, columns, kernels_);
    lists_.chunk_rows = plan.chunk_rows;
    lists_.chunks.assign(static_cast<size_t>(plan.chunks), {});
    DensePass(x_, nullptr, x_.rows, centers_, kernels_, options_,
              [&](int64_t c, int64_t i, const float* row, double square) {
                ListRow(lists_.chunks[static_cast<size_t>(c)], i, row, square);
              });
    for (ListChunk& chunk : lists_.chunks) {
      chunk.found = {};
    }
    ++report_.passes;
    report_.pass_seconds += Seconds() - begin;
  }

  void ListRow(ListChunk& chunk, int64_t item, const float* row, double square) {
    const int64_t columns = centers_.columns();
    if (chunk.offset.empty()) {
      chunk.offset.push_back(0);
      chunk.found.resize(static_cast<size_t>(columns));
    }
    const float low = kernels_.row_min(row, columns);
    float error = 2 * centers_.Error(square);
    const float limit =
        std::min(kLargest, std::nextafter(low + lists_.threshold + error, kInfinity));
    const int64_t found = kernels_.collect(row, columns, limit, chunk.found.data());
    const size_t first = chunk.code.size();
    if (error > lists_.scale / 16) {  // the tile is too coarse here: costs again, in float64
      double least = std::numeric_limits<double>::infinity();
      std::vector<double> exact(static_cast<size_t>(found));
      for (int64_t t = 0; t < found; ++t) {
        const int32_t k = chunk.found[static_cast<size_t>(t)];
        exact[static_cast<size_t>(t)] = Value(item, k, lists_.prices.data());
        least = std::min(least, exact[static_cast<size_t>(t)]);
      }
      for (int64_t t = 0; t < found; ++t) {
        const double above = exact[static_cast<size_t>(t)] - least;
        if (above > lists_.threshold) continue;
        chunk.code.push_back(chunk.found[static_cast<size_t>(t)]);
        chunk.rel.push_back(static_cast<float>(above));
      }
      error = chunk.rel.empty() ? 0.0f : 1e-6f * lists_.scale;
    } else {
      for (int64_t t = 0; t < found; ++t) {
        const int32_t k = chunk.found[static_cast<size_t>(t)];
        chunk.code.push_back(k);
        chunk.rel.push_back(row[k] - low);
      }
    }
    while ((chunk.code.size() - first) % kListPad != 0) {
      chunk.code.push_back(chunk.code[first]);
      chunk.rel.push_back(kInfinity);
    }
    chunk.offset.push_back(static_cast<int64_t>(chunk.code.size()));
    chunk.error.push_back(error);
  }

  double Value(int64_t item, int32_t k, const double* prices) const {
    return Cost(x_, item, nodes_.centers.data(), k, kernels_) + prices[k];
  }

  // How far prices have moved since the lists were made; returns the smallest move.
  double Drift(const double* prices, std::vector<float>& moved) const {
    moved.assign(static_cast<size_t>(centers_.columns()), 0.0f);
    double least = std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < nodes_.count; ++k) {
      const double by = prices[k] - lists_.prices[static_cast<size_t>(k)];
      moved[static_cast<size_t>(k)] = static_cast<float>(by);
      least = std::min(least, by);
    }
    return least;
  }

  // Annealed entropic sweeps over the lists; false when prices have left the range of the lists.
  bool ListPrices(double* prices) {
    const double begin = Seconds();
    const int64_t columns = centers_.columns();
    const auto chunks = static_cast<int64_t>(lists_.chunks.size());
    const int64_t groups = std::min(kGroups, chunks);
    std::vector<float> partial(static_cast<size_t>(groups * columns));
    std::vector<int64_t> outside(static_cast<size_t>(groups));
    std::vector<float> moved;
    double eps = lists_.scale / 10;
    bool inside = eps > 0;
    int64_t before = x_.rows;
    for (int level = 0; inside && level < 8; ++level) {
      for (int sweep = 0; sweep < 10; ++sweep) {
        const double edge = lists_.threshold + Drift(prices, moved) - 4 * eps;
        std::fill(partial.begin(), partial.end(), 0.0f);
        ParallelFor(groups, options_.num_threads, [&](int64_t g) {
          std::vector<float> scratch;
          int64_t out = 0;
          for (int64_t c = g * chunks / groups; c < (g + 1) * chunks / groups; ++c) {
            const ListChunk& chunk = lists_.chunks[static_cast<size_t>(c)];
            for (size_t r = 0; r + 1 < chunk.offset.size(); ++r) {
              const int64_t first = chunk.offset[r];
              const int64_t n = chunk.offset[r + 1] - first;
              if (static_cast<int64_t>(scratch.size()) < n) scratch.resize(static_cast<size_t>(n));
              const float least = kernels_.soft_list(
                  chunk.rel.data() + first, chunk.code.data() + first, moved.data(), n,
                  static_cast<float>(1 / eps), scratch.data(), partial.data() + g * columns);
              out += least > edge ? 1 : 0;
            }
          }
          outside[static_cast<size_t>(g)] = out;
        });
        if (std::accumulate(outside.begin(), outside.end(), int64_t{0}) > x_.rows / 100) {
          inside = false;
          break;
        }
        if (Raise(partial, groups, columns, eps, 1.0, prices) < kSweepTolerance) break;
      }
      if (options_.on_step) options_.on_step();
      eps_ = eps;
      const int64_t over = inside ? OverFull(prices) : 0;
      if (level >= 3 && over * 10 > before * 9) break;
      before = over;
      eps /= 2;
    }
    report_.price_seconds += Seconds() - begin;
    return inside || !(lists_.scale > 0);
  }

  // Items above the capacities after the hard argmin over the lists.
  int64_t OverFull(const double* prices) {
    std::vector<float> moved;
    Drift(prices, moved);
    const auto chunks = static_cast<int64_t>(lists_.chunks.size());
    const int64_t groups = std::min(kGroups, chunks);
    const auto nodes = static_cast<size_t>(nodes_.count);
    std::vector<int64_t> sizes(static_cast<size_t>(groups) * nodes);
    ParallelFor(groups, options_.num_threads, [&](int64_t g) {
      for (int64_t c = g * chunks / groups; c < (g + 1) * chunks / groups; ++c) {
        const ListChunk& chunk = lists_.chunks[static_cast<size_t>(c)];
        for (size_t r = 0; r + 1 < chunk.offset.size(); ++r) {
          const int64_t first = chunk.offset[r];
          float least;
          const int64_t t =
              kernels_.list_argmin(chunk.rel.data() + first, chunk.code.data() + first,
                                   moved.data(), chunk.offset[r + 1] - first, &least);
          ++sizes[static_cast<size_t>(g) * nodes +
                  static_cast<size_t>(chunk.code[static_cast<size_t>(first + t)])];
        }
      }
    });
    int64_t over = 0;
    for (size_t k = 0; k < nodes; ++k) {
      int64_t size = 0;
      for (size_t g = 0; g < static_cast<size_t>(groups); ++g) size += sizes[g * nodes + k];
      over += std::max<int64_t>(0, size - capacity_.units[k]);
    }
    return over;
  }

  // How far prices may rise before a centre that is not listed could matter to some item.
  double Room(const double* prices) {
    if (lists_.threshold == kInfinity) return std::numeric_limits<double>::infinity();
    std::vector<float> moved;
    const double drift = Drift(prices, moved);
    const auto chunks = static_cast<int64_t>(lists_.chunks.size());
    std::vector<double> room(static_cast<size_t>(chunks));
    ParallelFor(chunks, options_.num_threads, [&](int64_t c) {
      const ListChunk& chunk = lists_.chunks[static_cast<size_t>(c)];
      double least = std::numeric_limits<double>::infinity();
      for (size_t r = 0; r + 1 < chunk.offset.size(); ++r) {
        float low;
        kernels_.list_argmin(chunk.rel.data() + chunk.offset[r],
                             chunk.code.data() + chunk.offset[r], moved.data(),
                             chunk.offset[r + 1] - chunk.offset[r], &low);
        least = std::min(least, lists_.threshold + drift - static_cast<double>(low) * (1 + 1e-6) -
                                    static_cast<double>(chunk.error[r]));
      }
      room[static_cast<size_t>(c)] = least;
    });
    return *std::min_element(room.begin(), room.end());
  }

  // Candidates within `reach` of the best, with float64 costs; labels of all items. With `keep` the
  // labels are already optimal for the prices and stay.
  Candidates Narrow(const double* prices, double reach, bool keep, int32_t* labels) {
    const auto chunks = static_cast<int64_t>(lists_.chunks.size());
    std::vector<Candidates> parts(static_cast<size_t>(chunks));
    ParallelFor(chunks, options_.num_threads, [&](int64_t c) {
      const ListChunk& chunk = lists_.chunks[static_cast<size_t>(c)];
      Candidates& part = parts[static_cast<size_t>(c)];
      std::vector<std::pair<int32_t, double>> close;
      for (size_t r = 0; r + 1 < chunk.offset.size(); ++r) {
        const int64_t item = c * lists_.chunk_rows + static_cast<int64_t>(r);
        double low = std::numeric_limits<double>::infinity();
        for (int64_t t = chunk.offset[r]; t < chunk.offset[r + 1]; ++t) {
          low = std::min(low, Listed(chunk, t, prices));
        }
        const double limit = low + reach + 2 * static_cast<double>(chunk.error[r]);
        close.clear();
        for (int64_t t = chunk.offset[r]; t < chunk.offset[r + 1]; ++t) {
          if (Listed(chunk, t, prices) <= limit) {
            close.emplace_back(chunk.code[static_cast<size_t>(t)], 0.0);
          }
        }
        if (close.size() == 1) {
          labels[item] = close.front().first;
          continue;
        }
        double least = std::numeric_limits<double>::infinity();
        int32_t best = 0;
        for (auto& [code, cost] : close) {
          cost = Cost(x_, item, nodes_.centers.data(), code, kernels_);
          if (cost + prices[code] < least) {
            least = cost + prices[code];
            best = code;
          }
        }
        if (!keep) labels[item] = best;
        size_t kept = 0;
        for (const auto& [code, cost] : close) {
          if (cost + prices[code] - least > reach && code != labels[item]) continue;
          part.code.push_back(code);
          part.cost.push_back(cost);
          ++kept;
        }
        part.item.push_back(static_cast<int32_t>(item));
        part.offset.push_back(static_cast<int64_t>(kept));
      }
    });
    Candidates all;
    all.offset.push_back(0);
    for (Candidates& part : parts) {
      all.item.insert(all.item.end(), part.item.begin(), part.item.end());
      all.code.insert(all.code.end(), part.code.begin(), part.code.end());
      all.cost.insert(all.cost.end(), part.cost.begin(), part.cost.end());
      for (const int64_t n : part.offset) all.offset.push_back(all.offset.back() + n);
      part = {};
    }
    return all;
  }

  double Listed(const ListChunk& chunk, int64_t t, const double* prices) const {
    const int32_t k = chunk.code[static_cast<size_t>(t)];
    return static_cast<double>(chunk.rel[static_cast<size_t>(t)]) +
           (prices[k] - lists_.prices[static_cast<size_t>(k)]);
  }

  // Exact sizes and certificate; false when the lists are too short to prove the next step.
  bool Finish(double* prices, int32_t* labels, bool keep) {
    const double begin = Seconds();
    double reach = std::max(8 * eps_, 1e-6 * static_cast<double>(lists_.scale));
    for (bool first = true;; first = false) {
      const double room = Room(prices);
      if (!(room > 0) || (!first && reach > room)) break;
      reach = std::min(reach, room);
      const Candidates candidates = Narrow(prices, reach, keep || !first, labels);
      std::vector<int64_t> sizes(static_cast<size_t>(nodes_.count));
      for (int64_t i = 0; i < x_.rows; ++i) ++sizes[static_cast<size_t>(labels[i])];
      ExactFinish finish(capacity_, candidates, std::move(sizes), labels, prices);
      const bool complete = finish.Run(reach, options_.on_step);
      report_.moves += finish.moves();
      if (complete) {
        finish.CentrePrices(reach);
        Certify(candidates, prices, labels);
        report_.finish_seconds += Seconds() - begin;
        return true;
      }
      reach *= 4;
    }
    report_.finish_seconds += Seconds() - begin;
    return false;
  }

  void Certify(const Candidates& candidates, const double* prices, const int32_t* labels) {
    const int64_t parts = (x_.rows + 4095) / 4096;
    std::vector<double> costs(static_cast<size_t>(parts));
    std::vector<double> duals(static_cast<size_t>(parts));
    ParallelFor(parts, options_.num_threads, [&](int64_t c) {
      double cost = 0;
      double dual = 0;
      const int64_t begin = c * 4096;
      const int64_t end = std::min(x_.rows, begin + 4096);
      auto next = static_cast<size_t>(
          std::lower_bound(candidates.item.begin(), candidates.item.end(), begin) -
          candidates.item.begin());
      for (int64_t i = begin; i < end; ++i) {
        if (next < candidates.item.size() && candidates.item[next] == i) {
          double least = std::numeric_limits<double>::infinity();
          for (int64_t t = candidates.offset[next]; t < candidates.offset[next + 1]; ++t) {
            const auto entry = static_cast<size_t>(t);
            const int32_t k = candidates.code[entry];
            if (k == labels[i]) cost += candidates.cost[entry];
            least = std::min(least, candidates.cost[entry] + prices[k]);
          }
          dual += least;
          ++next;
        } else {
          const double own = Cost(x_, i, nodes_.centers.data(), labels[i], kernels_);
          cost += own;
          dual += own + prices[labels[i]];
        }
      }
      costs[static_cast<size_t>(c)] = cost;
      duals[static_cast<size_t>(c)] = dual;
    });
    report_.cost = std::accumulate(costs.begin(), costs.end(), 0.0);
    report_.dual = std::accumulate(duals.begin(), duals.end(), 0.0);
    std::vector<size_t> order(static_cast<size_t>(nodes_.count));
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return prices[a] != prices[b] ? prices[a] < prices[b] : a < b;
    });
    int64_t left = capacity_.dummies;
    for (const size_t k : order) {
      const int64_t held = std::min(left, capacity_.extra[k]);
      left -= held;
      report_.dual -= static_cast<double>(capacity_.units[k] - held) * prices[k];
    }
    report_.gap = report_.cost > 0 ? (report_.cost - report_.dual) / report_.cost : 0;
  }

  const FloatRows& x_;
  const Nodes& nodes_;
  const BalancedKMeansOptions& options_;
  BalancedAssignment& report_;
  const KMeansKernels& kernels_;
  PackedCenters centers_;
  std::vector<double> target_;
  NodeCapacity capacity_;
  Lists lists_;
  double eps_ = 0;
};

}  // namespace

BalancedAssignment SolveAssignment(const FloatRows& x, const std::vector<double>& mean,
                                   const float* centers, int64_t clusters,
                                   const BalancedKMeansOptions& options, bool prices_given,
                                   double* prices, int32_t* labels) {
  BalancedAssignment report;
  const Nodes nodes = MergeEqual(centers, clusters, x.columns);
  std::vector<double> node_prices(static_cast<size_t>(nodes.count), 0.0);
  if (prices_given) {
    for (int64_t k = 0; k < clusters; ++k) {
      node_prices[static_cast<size_t>(nodes.node_of[static_cast<size_t>(k)])] = prices[k];
    }
  }
  Search search(x, mean, nodes, clusters, options, report);
  search.Run(prices_given, node_prices.data(), labels);
  // Equal centres share their node's items in item order.
  std::vector<int32_t> member(static_cast<size_t>(nodes.count), -1);
  std::vector<int32_t> next(static_cast<size_t>(clusters), -1);
  std::vector<int64_t> total(static_cast<size_t>(nodes.count));
  for (int64_t k = clusters - 1; k >= 0; --k) {
    const auto node = static_cast<size_t>(nodes.node_of[static_cast<size_t>(k)]);
    next[static_cast<size_t>(k)] = member[node];
    member[node] = static_cast<int32_t>(k);
  }
  for (int64_t i = 0; i < x.rows; ++i) ++total[static_cast<size_t>(labels[i])];
  std::vector<int64_t> left(static_cast<size_t>(nodes.count));
  std::vector<int64_t> members(nodes.multiplicity);
  for (size_t g = 0; g < left.size(); ++g) left[g] = (total[g] + members[g] - 1) / members[g];
  for (int64_t i = 0; i < x.rows; ++i) {
    const auto node = static_cast<size_t>(labels[i]);
    if (left[node] == 0) {
      member[node] = next[static_cast<size_t>(member[node])];
      --members[node];
      left[node] = (total[node] + members[node] - 1) / members[node];
    }
    --left[node];
    --total[node];
    labels[i] = member[node];
  }
  double sum = 0;
  for (int64_t k = 0; k < clusters; ++k) {
    prices[k] = node_prices[static_cast<size_t>(nodes.node_of[static_cast<size_t>(k)])];
    sum += prices[k];
  }
  for (int64_t k = 0; k < clusters; ++k) prices[k] -= sum / static_cast<double>(clusters);
  return report;
}

}  // namespace onerec
