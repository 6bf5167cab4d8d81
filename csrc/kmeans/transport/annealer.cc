#include "kmeans/transport/annealer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "kmeans/options.h"
#include "support/int_math.h"
#include "support/thread_pool.h"

namespace onerec {
namespace {

constexpr uint64_t kEmpty = ~uint64_t{0};
constexpr double kFixedPoint = 1 << 30;  // units of a coupling
constexpr size_t kPad = 16;              // that a kernel may read beyond the end

// Items that the rows stand for.
template <class Rows>
double Mass(const Rows& rows) {
  if (rows.weights.empty()) return static_cast<double>(rows.rows);
  return std::accumulate(rows.weights.begin(), rows.weights.end(), 0.0);
}

template <class Rows>
float WeightOf(const Rows& rows, int64_t row) {
  return rows.weights.empty() ? 1.0f : rows.weights[row];
}

}  // namespace

// What one part of the rows adds up.
struct Annealer::Part {
  float* columns;
  float* ground;
  int64_t outside;  // of the rows looked at
  int64_t looked;
  double least;  // sum of the rows' smallest values
  double logs;   // sum of the logarithms of their sums, less that of product
  double product;

  void Add(float low, float sum, float weight) {
    least += static_cast<double>(low) * static_cast<double>(weight);
    if (weight != 1.0f) {
      logs += static_cast<double>(weight) * std::log(static_cast<double>(sum));
      return;
    }
    product *= static_cast<double>(sum);
    if (product > 1e250) {
      logs += std::log(product);
      product = 1;
    }
  }
};

int64_t CandidateLists::entries() const {
  int64_t count = 0;
  for (const Chunk& chunk : chunks) count += static_cast<int64_t>(chunk.code.size());
  return count;
}

MovedLists::MovedLists(const CandidateLists& lists, const double* now)
    : lists_(lists), kernels_(CurrentKMeansKernels()), group_(lists.prices.size()) {
  for (size_t g = 0; g + 1 < lists.group_offset.size(); ++g) {
    std::fill(group_.begin() + lists.group_offset[g], group_.begin() + lists.group_offset[g + 1],
              static_cast<int32_t>(g));
  }
  const auto since = [&](const std::vector<double>& prices) {
    Since found;
    for (size_t k = 0; k < prices.size(); ++k) {
      found.moved.push_back(static_cast<float>(now[k] - prices[k]));
      found.between.push_back(static_cast<float>(prices[k] - lists.prices[k]));
    }
    const std::vector<float>& moved = found.moved;
    found.fallen.resize(prices.size());
    for (size_t g = 0; g + 1 < lists.group_offset.size(); ++g) {
      const int32_t begin = lists.group_offset[g];
      const int32_t end = lists.group_offset[g + 1];
      std::fill(found.fallen.begin() + begin, found.fallen.begin() + end,
                *std::min_element(moved.begin() + begin, moved.begin() + end));
    }
    found.drift = static_cast<double>(*std::min_element(moved.begin(), moved.end()));
    found.moved.resize(prices.size() + kPad, std::numeric_limits<float>::infinity());
    return found;
  };
  since_.push_back(since(lists.prices));
  moved_.assign(since_.front().moved.begin(), since_.front().moved.end() - kPad);
  for (const std::vector<double>& prices : lists.again) since_.push_back(since(prices));
}

// The smallest listed value at the prices that `since` counts from.
double MovedLists::Least(const Since& since, const CandidateLists::Chunk& chunk, size_t row) const {
  const int64_t begin = chunk.offset[row];
  float least;
  kernels_.list_other(chunk.rel.data() + begin, chunk.code.data() + begin, since.between.data(),
                      chunk.offset[row + 1] - begin, -1, &least);
  return static_cast<double>(least);
}

// What was not listed was no better than the threshold, nor than the best of its group.
double MovedLists::Edge(const CandidateLists::Chunk& chunk, size_t row, double enough) const {
  const Since& since = since_[chunk.age[row]];
  const double least = lists_.threshold + since.drift;
  if (chunk.age[row] == 0 && least >= enough) return least;
  const size_t begin = chunk.offset[row];
  const size_t end = chunk.offset[row + 1];
  // What rel was counted from, when the row was listed.
  const double low = chunk.age[row] > 0 ? Least(since, chunk, row) : 0;
  double edge = lists_.reach + since.drift;
  for (size_t t = begin; t < end; ++t) {
    const size_t k = chunk.code[t];
    const double then = static_cast<double>(chunk.rel[t] + since.between[k]);
    edge = std::min(edge,
                    std::max(lists_.threshold, then - low) + static_cast<double>(since.fallen[k]));
  }
  return low + edge;
}

// As in Edge, but each centre by itself.
void MovedLists::Suspects(const CandidateLists::Chunk& chunk, size_t row, double limit,
                          std::vector<int32_t>& found) const {
  found.clear();
  const Since& since = since_[chunk.age[row]];
  const size_t begin = chunk.offset[row];
  const size_t end = chunk.offset[row + 1];
  // All rows were looked at for the first of `again`: how far prices must have fallen since then.
  const bool looked = since_.size() > 1 && chunk.age[row] <= 1;
  double fall = 0;
  if (looked) {
    fall = limit - Least(since_[1], chunk, row) - lists_.margin;
    if (since_[1].drift >= fall) return;
  }
  if (Edge(chunk, row, limit) >= limit) return;
  const double low = chunk.age[row] > 0 ? Least(since, chunk, row) : 0;
  thread_local std::vector<double> least;  // that an unlisted centre of each group was above low
  thread_local std::vector<uint8_t> listed;
  thread_local std::vector<int32_t> where;
  least.assign(lists_.group_offset.size() - 1, lists_.reach);
  listed.resize(std::max(listed.size(), group_.size()));
  for (size_t t = begin; t < end; ++t) {
    const size_t k = chunk.code[t];
    const double then = static_cast<double>(chunk.rel[t] + since.between[k]);
    double& of_group = least[group_[k]];
    of_group = std::min(of_group, std::max(lists_.threshold, then - low));
    listed[k] = 1;
  }
  for (size_t g = 0; g < least.size(); ++g) {
    const auto below = static_cast<float>(limit - low - least[g]);
    const int32_t first = lists_.group_offset[g];
    const int32_t last = lists_.group_offset[g + 1];
    if (since.fallen[first] >= below) continue;
    where.resize(last - first + kPad);
    const int64_t n =
        kernels_.collect(since.moved.data() + first, last - first, below, where.data());
    for (int64_t t = 0; t < n; ++t) {
      const int32_t k = first + where[t];
      const size_t node = k;
      if (k >= last || listed[node] != 0) continue;
      if (!looked || static_cast<double>(since_[1].moved[node]) < fall) found.push_back(k);
    }
  }
  for (size_t t = begin; t < end; ++t) listed[chunk.code[t]] = 0;
}

void EndRow(CandidateLists::Chunk& chunk, float error, double low, uint8_t age) {
  const size_t first = chunk.offset.back();
  while ((chunk.code.size() - first) % kListPad != 0) {
    chunk.code.push_back(chunk.code[first]);
    chunk.rel.push_back(std::numeric_limits<float>::infinity());
  }
  chunk.offset.push_back(static_cast<int64_t>(chunk.code.size()));
  chunk.error.push_back(error);
  chunk.low.push_back(low);
  chunk.age.push_back(age);
}

Annealer::Annealer(std::vector<double> share, const BalancedKMeansOptions& options,
                   const KMeansKernels& kernels)
    : share_(std::move(share)), options_(options), kernels_(kernels) {
  while (slots_ < 64 * share_.size()) slots_ *= 2;
}

// Adds an item's couplings, of codes in ascending order; what is not visible couples to the ground.
// A full table loses couplings; the caller sees that and starts again with a larger one.
void Annealer::Couple(const std::vector<std::pair<int32_t, float>>& visible, double weight,
                      float* ground) {
  const auto full = static_cast<int64_t>(slots_ / 4 * 3);
  float hidden = 1;
  for (const auto& [code, share] : visible) hidden -= share;
  for (const auto& [code, share] : visible) {
    ground[code] += share * std::max(0.0f, hidden) * static_cast<float>(weight);
  }
  for (size_t a = 0; a < visible.size(); ++a) {
    for (size_t b = a + 1; b < visible.size(); ++b) {
      const uint64_t key =
          static_cast<uint64_t>(visible[a].first) << 32 | static_cast<uint32_t>(visible[b].first);
      const auto units =
          static_cast<int64_t>(static_cast<double>(visible[a].second) *
                               static_cast<double>(visible[b].second) * weight * kFixedPoint);
      uint64_t hash = key * 0x9E3779B97F4A7C15ull;
      hash ^= hash >> 29;
      for (size_t slot = hash & (slots_ - 1);; slot = (slot + 1) & (slots_ - 1)) {
        uint64_t found = keys_[slot].load(std::memory_order_relaxed);
        if (found == kEmpty) {
          if (used_.load(std::memory_order_relaxed) > full) return;
          if (keys_[slot].compare_exchange_strong(found, key, std::memory_order_relaxed)) {
            used_.fetch_add(1, std::memory_order_relaxed);
            found = key;
          }
        }
        if (found != key) continue;
        values_[slot].fetch_add(units, std::memory_order_relaxed);
        break;
      }
    }
  }
}

// Takes the couplings out of the table.
void Annealer::CollectEdges() {
  edges_.clear();
  for (size_t slot = 0; slot < slots_; ++slot) {
    const uint64_t key = keys_[slot].load(std::memory_order_relaxed);
    if (key == kEmpty) continue;
    edges_.push_back({key, values_[slot].load(std::memory_order_relaxed)});
  }
  std::sort(edges_.begin(), edges_.end(),
            [](const Edge& left, const Edge& right) { return left.key < right.key; });
}

// Runs body(chunk, column sums, log-sum and smallest values, outside) over chunks in parts, each
// summed in order.
template <class Body>
Annealer::Sums Annealer::Sum(double mass, int64_t chunks, int64_t columns, double eps,
                             const double* prices, const Body& body) {
  const size_t nodes = share_.size();
  const int64_t groups = std::min(kParts, chunks);
  std::vector<float> partial(groups * columns);
  std::vector<float> ground(groups * columns);
  std::vector<double> value(groups);
  std::vector<int64_t> outside(groups);
  std::vector<int64_t> looked(groups);
  for (;;) {
    if (!keys_) {
      keys_ = std::make_unique<std::atomic<uint64_t>[]>(slots_);
      values_ = std::make_unique<std::atomic<int64_t>[]>(slots_);
    }
    for (size_t slot = 0; slot < slots_; ++slot) {
      keys_[slot].store(kEmpty, std::memory_order_relaxed);
      values_[slot].store(0, std::memory_order_relaxed);
    }
    used_.store(0);
    std::fill(partial.begin(), partial.end(), 0.0f);
    std::fill(ground.begin(), ground.end(), 0.0f);
    ParallelFor(groups, options_.num_threads, [&](int64_t g) {
      Part part{partial.data() + g * columns, ground.data() + g * columns, 0, 0, 0, 0, 1};
      for (int64_t c = g * chunks / groups; c < (g + 1) * chunks / groups; ++c) body(c, part);
      value[g] = part.least - eps * (part.logs + std::log(part.product));
      outside[g] = part.outside;
      looked[g] = part.looked;
    });
    if (used_.load() <= static_cast<int64_t>(slots_ / 4 * 3)) break;
    slots_ *= 2;
    keys_.reset();
  }
  ++sweeps_;
  CollectEdges();
  Sums sums;
  sums.value = std::accumulate(value.begin(), value.end(), 0.0);
  for (size_t k = 0; k < nodes; ++k) {
    double sum = 0;
    double grounded = 0;
    for (int64_t g = 0; g < groups; ++g) {
      sum += static_cast<double>(partial[g * columns + k]);
      grounded += static_cast<double>(ground[g * columns + k]);
    }
    sums.columns.push_back(sum);
    sums.ground.push_back(grounded);
    sums.off += std::abs(sum - mass * share_[k]) / (2 * mass);
    sums.value -= mass * share_[k] * prices[k];
  }
  const auto seen = std::accumulate(looked.begin(), looked.end(), int64_t{0});
  const auto out = std::accumulate(outside.begin(), outside.end(), int64_t{0});
  sums.outside = seen > 0 ? static_cast<double>(out) / static_cast<double>(seen) : 0;
  return sums;
}

Annealer::Sums Annealer::Evaluate(const CandidateLists& lists, double eps, const double* prices) {
  const MovedLists moved(lists, prices);
  // A part of the rows is enough to tell how clusters hang together, and how far lists reach.
  const double width = static_cast<double>(lists.entries()) / static_cast<double>(lists.rows);
  const auto stride = std::max<int64_t>(
      1, static_cast<int64_t>(static_cast<double>(lists.rows) * std::min(1.0, width * width / 500) /
                              static_cast<double>(16 * share_.size())));
  const auto chunks = static_cast<int64_t>(lists.chunks.size());
  return Sum(Mass(lists), chunks, static_cast<int64_t>(share_.size()), eps, prices,
             [&](int64_t c, Part& part) {
               const CandidateLists::Chunk& chunk = lists.chunks[c];
               std::vector<float> shares;
               std::vector<std::pair<int32_t, float>> visible;
               for (size_t r = 0; r + 1 < chunk.offset.size(); ++r) {
                 const int64_t first = chunk.offset[r];
                 const int64_t n = chunk.offset[r + 1] - first;
                 if (static_cast<int64_t>(shares.size()) < n) shares.resize(n);
                 const int64_t row = c * lists.chunk_rows + static_cast<int64_t>(r);
                 const float weight = WeightOf(lists, row);
                 float sum;
                 const float least = kernels_.soft_list(
                     chunk.rel.data() + first, chunk.code.data() + first, moved.moved().data(), n,
                     static_cast<float>(1 / eps), weight, shares.data(), part.columns, &sum);
                 part.Add(least, sum, weight);
                 if (row % stride != 0) continue;
                 ++part.looked;
                 const double edge = moved.Edge(chunk, r);
                 part.outside += static_cast<double>(least) > edge - 4 * eps ? 1 : 0;
                 visible.clear();
                 for (int64_t t = 0; t < n; ++t) {
                   const float p = shares[t];
                   if (p > 1e-2f) visible.emplace_back(chunk.code[first + t], p);
                 }
                 Couple(visible, static_cast<double>(stride) * static_cast<double>(weight),
                        part.ground);
               }
             });
}

Annealer::Sums Annealer::Evaluate(const CostMatrix& matrix, double eps, const double* prices) {
  std::vector<float> p(matrix.columns, 0.0f);
  for (size_t k = 0; k < share_.size(); ++k) p[k] = static_cast<float>(prices[k]);
  const auto stride = std::max<int64_t>(1, matrix.rows / static_cast<int64_t>(4 * share_.size()));
  constexpr int64_t kChunk = 64;
  return Sum(Mass(matrix), DivideUp(matrix.rows, kChunk), matrix.columns, eps, prices,
             [&](int64_t c, Part& part) {
               std::vector<float> shares(matrix.columns);
               std::vector<std::pair<int32_t, float>> visible;
               for (int64_t i = c * kChunk; i < std::min(matrix.rows, (c + 1) * kChunk); ++i) {
                 const float weight = WeightOf(matrix, i);
                 float sum;
                 const float* row = matrix.costs.data() + i * matrix.columns;
                 const float least =
                     kernels_.soft_row(row, p.data(), matrix.columns, static_cast<float>(1 / eps),
                                       weight, shares.data(), part.columns, &sum);
                 part.Add(least, sum, weight);
                 if (i % stride != 0) continue;
                 visible.clear();
                 for (size_t k = 0; k < share_.size(); ++k) {
                   if (shares[k] > 1e-2f) {
                     visible.emplace_back(static_cast<int32_t>(k), shares[k]);
                   } else {
                     part.ground[k] += shares[k] * static_cast<float>(stride) * weight;
                   }
                 }
                 Couple(visible, static_cast<double>(stride) * static_cast<double>(weight),
                        part.ground);
               }
             });
}

// Conjugate gradients on the Laplacian of the couplings, slightly lifted: excess = (L + mu D) x.
std::vector<double> Annealer::Solve(const std::vector<double>& excess,
                                    const std::vector<double>& ground, double rows) {
  struct Link {
    int32_t a;
    int32_t b;
    double weight;
  };
  const size_t nodes = share_.size();
  std::vector<Link> edges;
  for (const Edge& edge : edges_) {
    edges.push_back({static_cast<int32_t>(edge.key >> 32),
                     static_cast<int32_t>(edge.key & 0xFFFFFFFF),
                     static_cast<double>(edge.units) / kFixedPoint});
  }
  std::vector<double> diagonal(nodes);
  for (size_t k = 0; k < nodes; ++k) diagonal[k] = ground[k] + 1e-6 * rows * share_[k];
  for (const Link& edge : edges) {
    diagonal[edge.a] += edge.weight;
    diagonal[edge.b] += edge.weight;
  }
  std::vector<double> x(nodes), residual(excess), direction(nodes), product(nodes);
  double before = 0;
  double start = 0;
  for (int step = 0; step < 300; ++step) {
    double now = 0;
    for (size_t k = 0; k < nodes; ++k) now += residual[k] * residual[k] / diagonal[k];
    if (step == 0) start = now;
    if (!(now > 1e-8 * start)) break;
    for (size_t k = 0; k < nodes; ++k) {
      direction[k] = residual[k] / diagonal[k] + (step > 0 ? now / before * direction[k] : 0);
      product[k] = diagonal[k] * direction[k];
    }
    for (const Link& edge : edges) {
      product[edge.a] -= edge.weight * direction[edge.b];
      product[edge.b] -= edge.weight * direction[edge.a];
    }
    double curvature = 0;
    for (size_t k = 0; k < nodes; ++k) curvature += direction[k] * product[k];
    if (!(curvature > 0)) break;
    const double length = now / curvature;
    for (size_t k = 0; k < nodes; ++k) {
      x[k] += length * direction[k];
      residual[k] -= length * product[k];
    }
    before = now;
  }
  return x;
}

template <class Rows>
Annealer::State Annealer::Newton(const Rows& rows, double eps, double tolerance, double* prices) {
  const size_t nodes = share_.size();
  const double count = Mass(rows);
  Sums sums = Evaluate(rows, eps, prices);
  std::vector<double> trial(nodes);
  for (int step = 0; step < kNewtonSteps; ++step) {
    if (sums.off < tolerance || sums.outside > kOutsideRows) break;
    std::vector<double> rise(nodes);
    for (size_t k = 0; k < nodes; ++k) rise[k] = sums.columns[k] - count * share_[k];
    rise = Solve(rise, sums.ground, count);
    double mean = 0;
    for (size_t k = 0; k < nodes; ++k) mean += share_[k] * rise[k];
    const double off = sums.off;
    bool better = false;
    for (double length = 1; length > 0.1 && !better; length /= 3) {
      for (size_t k = 0; k < nodes; ++k) {
        trial[k] = prices[k] + length * eps * std::clamp(rise[k] - mean, -kNewtonStep, kNewtonStep);
      }
      Sums next = Evaluate(rows, eps, trial.data());
      better = next.value > sums.value + 1e-9 * std::abs(sums.value);
      if (better) {
        std::copy(trial.begin(), trial.end(), prices);
        sums = std::move(next);
      }
    }
    if (!better) {
      // A step that is clipped or goes too far where the dual is nearly flat; a sweep always helps.
      for (size_t k = 0; k < nodes; ++k) {
        const double ratio = std::max(sums.columns[k], 1e-30) / (count * share_[k]);
        trial[k] = prices[k] + eps * std::clamp(std::log(ratio), -kNewtonStep, kNewtonStep);
      }
      Sums next = Evaluate(rows, eps, trial.data());
      better = next.value > sums.value + 1e-9 * std::abs(sums.value);
      if (better) {
        std::copy(trial.begin(), trial.end(), prices);
        sums = std::move(next);
      }
    }
    // Small eps leaves some to the finish, which moves them faster than many short steps would.
    if (!better || (off < kNearlyBalanced && sums.off > 0.7 * off)) break;
  }
  return {sums.off, sums.outside};
}

Annealer::State Annealer::Balance(const CandidateLists& lists, double eps, double tolerance,
                                  double* prices) {
  return Newton(lists, eps, tolerance, prices);
}

Annealer::State Annealer::Balance(const CostMatrix& matrix, double eps, double tolerance,
                                  double* prices) {
  return Newton(matrix, eps, tolerance, prices);
}

double Annealer::Sweep(const CostMatrix& matrix, double eps, double* prices) {
  const Sums sums = Evaluate(matrix, eps, prices);
  for (size_t k = 0; k < share_.size(); ++k) {
    const double want = Mass(matrix) * share_[k];
    prices[k] += eps * std::clamp(std::log(std::max(sums.columns[k], 1e-30) / want), -8.0, 8.0);
  }
  return sums.off;
}

void Annealer::ListLabels(const CandidateLists& lists, const double* prices,
                          int32_t* labels) const {
  const MovedLists lists_now(lists, prices);
  const std::vector<float>& moved = lists_now.moved();
  const auto chunks = static_cast<int64_t>(lists.chunks.size());
  ParallelFor(chunks, options_.num_threads, [&](int64_t c) {
    const CandidateLists::Chunk& chunk = lists.chunks[c];
    for (size_t r = 0; r + 1 < chunk.offset.size(); ++r) {
      const int64_t first = chunk.offset[r];
      float least;
      const int64_t t = kernels_.list_argmin(chunk.rel.data() + first, chunk.code.data() + first,
                                             moved.data(), chunk.offset[r + 1] - first, &least);
      labels[c * lists.chunk_rows + static_cast<int64_t>(r)] = chunk.code[first + t];
    }
  });
}

double Annealer::OverFull(const CandidateLists& lists, const double* prices) const {
  std::vector<int32_t> labels(lists.rows);
  ListLabels(lists, prices, labels.data());
  std::vector<int64_t> sizes(share_.size());
  for (const int32_t k : labels) ++sizes[k];
  const auto rows = static_cast<double>(lists.rows);
  double over = 0;
  for (size_t k = 0; k < share_.size(); ++k) {
    over += std::max(0.0, static_cast<double>(sizes[k]) / rows - share_[k]);
  }
  return over;
}

}  // namespace onerec
