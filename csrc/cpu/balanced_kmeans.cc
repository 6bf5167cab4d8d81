#include "onerec/balanced_kmeans.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

#include "cpu/balanced_kmeans_device.h"
#include "cpu/balanced_kmeans_finish.h"
#include "cpu/balanced_kmeans_pass.h"
#include "cpu/balanced_kmeans_solver.h"
#include "cpu/thread_pool.h"
#include "onerec/runtime.h"

namespace onerec {
namespace {

constexpr double kUnit = 5.9604644775390625e-08;  // 2^-24, half the spacing of float32 at 1

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  int64_t Below(int64_t n) { return static_cast<int64_t>(Next() % static_cast<uint64_t>(n)); }

 private:
  uint64_t state_;
};

std::string Text(int64_t value) { return std::to_string(value); }

void CheckShape(const FloatRows& x, int64_t clusters, const BalancedKMeansOptions& options) {
  if (x.rows < 1 || x.columns < 1) {
    throw std::invalid_argument("x: wanted at least one row and one column, got shape [" +
                                Text(x.rows) + ", " + Text(x.columns) + "]");
  }
  if (x.rows > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("x: wanted at most 2147483647 rows, got " + Text(x.rows));
  }
  if (x.stride < x.columns) {
    throw std::invalid_argument("x: wanted a stride of at least " + Text(x.columns) + ", got " +
                                Text(x.stride));
  }
  if (clusters < 1) {
    throw std::invalid_argument("clusters: wanted at least 1, got " + Text(clusters));
  }
  const Processes& processes = options.processes;
  if (processes.count < 1 || processes.rank < 0 || processes.rank >= processes.count ||
      (processes.count > 1 && !processes.exchange)) {
    throw std::invalid_argument("processes: wanted a rank in 0.." + Text(processes.count - 1) +
                                " and an exchange, got rank " + Text(processes.rank));
  }
  if (options.num_threads < 1) {
    throw std::invalid_argument("num_threads: wanted at least 1, got " + Text(options.num_threads));
  }
  if (options.cuda_device >= 0) {
    const CudaInfo cuda = GetCudaInfo();
    if (options.cuda_device >= cuda.devices) {
      throw std::invalid_argument("cuda_device: wanted one of " + Text(cuda.devices) +
                                  " devices, got " + Text(options.cuda_device) +
                                  (cuda.problem.empty() ? "" : ": " + cuda.problem));
    }
    if (processes.count > 1) {
      throw std::invalid_argument("cuda_device: wanted -1 with several processes, got " +
                                  Text(options.cuda_device));
    }
  }
}

void CheckBalanced(const FloatRows& x, int64_t clusters, const BalancedKMeansOptions& options) {
  CheckShape(x, clusters, options);
  if (x.rows < clusters) {
    throw std::invalid_argument("x: wanted at least as many rows as clusters (" + Text(clusters) +
                                "), got " + Text(x.rows));
  }
  if (options.max_iter < 1) {
    throw std::invalid_argument("max_iter: wanted at least 1, got " + Text(options.max_iter));
  }
  // What the first price search, the shortest lists and the exact finish cannot do without.
  const int64_t least = 192 * x.rows + 4096 * clusters;
  if (options.memory_budget < least) {
    throw std::invalid_argument("memory_budget: wanted at least " + Text(least) + " bytes for " +
                                Text(x.rows) + " rows and " + Text(clusters) + " clusters, got " +
                                Text(options.memory_budget));
  }
}

void CheckCenters(const float* centers, int64_t clusters, int64_t d, const double* prices) {
  for (int64_t i = 0; i < clusters * d; ++i) {
    if (!std::isfinite(centers[i])) {
      throw std::invalid_argument("centers: wanted finite values, got " +
                                  std::to_string(centers[i]) + " in row " + Text(i / d) +
                                  ", column " + Text(i % d));
    }
  }
  for (int64_t k = 0; prices != nullptr && k < clusters; ++k) {
    if (!std::isfinite(prices[k])) {
      throw std::invalid_argument("prices: wanted finite values, got " + std::to_string(prices[k]) +
                                  " at " + Text(k));
    }
  }
}

// Labels of a step that another goes on from.
void CheckSizes(int64_t rows, int64_t clusters, const int32_t* labels) {
  std::vector<int64_t> sizes(static_cast<size_t>(clusters));
  for (int64_t i = 0; i < rows; ++i) {
    if (labels[i] < 0 || labels[i] >= clusters) {
      throw std::invalid_argument("labels: wanted 0.." + Text(clusters - 1) + ", got " +
                                  Text(labels[i]) + " at " + Text(i));
    }
    ++sizes[static_cast<size_t>(labels[i])];
  }
  const auto [low, high] = std::minmax_element(sizes.begin(), sizes.end());
  if (*low < rows / clusters || *high > (rows + clusters - 1) / clusters) {
    throw std::invalid_argument("labels: wanted clusters of equal size, got sizes from " +
                                Text(*low) + " to " + Text(*high));
  }
}

// The device that the options name, with x on it; null if they name none.
std::unique_ptr<KMeansDevice> OpenDevice(const FloatRows& x, const std::vector<double>& mean,
                                         const BalancedKMeansOptions& options) {
  if (options.cuda_device < 0 || options.method == BalancedMethod::kSequential) return nullptr;
  return std::make_unique<KMeansDevice>(x, mean, options.cuda_device);
}

// Distinct rows drawn with the seed; repeats only when there are too few distinct ones.
void DrawCenters(const FloatRows& x, int64_t clusters, uint64_t seed, float* centers) {
  const std::vector<int64_t> order = DrawRows(x.rows, x.rows, seed);
  const auto bytes = sizeof(float) * static_cast<size_t>(x.columns);
  std::vector<int64_t> table(16, -1);
  while (static_cast<int64_t>(table.size()) < 4 * clusters) table.resize(2 * table.size(), -1);
  std::vector<int64_t> repeats;
  int64_t drawn = 0;
  for (int64_t i = 0; i < x.rows && drawn < clusters; ++i) {
    const float* row = x.data + order[static_cast<size_t>(i)] * x.stride;
    uint64_t hash = 0;
    for (int64_t j = 0; j < x.columns; ++j) {
      const float value = row[j] + 0.0f;  // -0 and 0 are one value
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      hash = (hash ^ bits) * 0x9E3779B97F4A7C15ull;
      hash ^= hash >> 32;
    }
    size_t slot = hash & (table.size() - 1);
    bool known = false;
    for (; table[slot] >= 0 && !known; slot = (slot + 1) & (table.size() - 1)) {
      known = std::equal(row, row + x.columns, x.data + table[slot] * x.stride);
    }
    if (known) {
      repeats.push_back(order[static_cast<size_t>(i)]);
      continue;
    }
    table[slot] = order[static_cast<size_t>(i)];
    std::memcpy(centers + drawn++ * x.columns, row, bytes);
  }
  for (size_t t = 0; drawn < clusters; ++t) {
    std::memcpy(centers + drawn++ * x.columns, x.data + repeats[t] * x.stride, bytes);
  }
}

double Inertia(const FloatRows& x, const float* centers, const int32_t* labels,
               const BalancedKMeansOptions& options) {
  const KMeansKernels& kernels = CurrentKMeansKernels();
  const int64_t parts = (x.rows + 4095) / 4096;
  std::vector<double> sums(static_cast<size_t>(parts));
  const std::vector<int64_t> bounds = Bounds(parts, options.processes);
  const auto rank = static_cast<size_t>(options.processes.rank);
  ParallelFor(bounds[rank + 1] - bounds[rank], options.num_threads, [&](int64_t own) {
    const int64_t c = bounds[rank] + own;
    double sum = 0;
    for (int64_t i = c * 4096; i < std::min(x.rows, (c + 1) * 4096); ++i) {
      sum += Cost(x, i, centers, labels[i], kernels);
    }
    sums[static_cast<size_t>(c)] = sum;
  });
  Share(options.processes, bounds, 1, sums.data());
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// Algorithm 1 of arXiv 2502.18965, one round: cluster 0, 1, ... takes the nearest of the items that
// are left, N mod K clusters first with one item more. Distances of a block of clusters come from
// one pass; items whose float32 distance leaves the choice open are decided in float64.
void SequentialRound(const FloatRows& x, const std::vector<double>& mean, const float* centers,
                     int64_t clusters, const BalancedKMeansOptions& options, int32_t* labels) {
  const KMeansKernels& kernels = CurrentKMeansKernels();
  const int64_t block = std::min<int64_t>(clusters, 32);
  std::vector<int64_t> left(static_cast<size_t>(x.rows));
  std::iota(left.begin(), left.end(), int64_t{0});
  std::vector<float> distances(static_cast<size_t>(block * x.rows));
  std::vector<int32_t> open;
  std::vector<std::pair<double, int32_t>> doubtful;
  std::vector<float> values;
  std::fill(labels, labels + x.rows, -1);
  for (int64_t first = 0; first < clusters; first += block) {
    const int64_t width = std::min(block, clusters - first);
    const PackedCenters packed(centers + first * x.columns, width, x.columns, mean, kernels);
    const auto count = static_cast<int64_t>(left.size());
    std::vector<float> error(static_cast<size_t>((count + 63) / 64));
    DensePass(x, left.data(), count, packed, kernels, options,
              [&](int64_t, int64_t i, const float* row, double square) {
                for (int64_t k = 0; k < width; ++k) {
                  distances[static_cast<size_t>(k * count + i)] =
                      static_cast<float>(static_cast<double>(row[k]) + square);
                }
              });
    double longest = 0;
    for (const int64_t item : left) {
      longest =
          std::max(longest, kernels.exact_cost(x.data + item * x.stride, packed.mean(), x.columns));
    }
    for (int64_t k = 0; k < width; ++k) {
      const int64_t size = x.rows / clusters + (first + k < x.rows % clusters ? 1 : 0);
      const float* column = distances.data() + k * count;
      values.clear();
      for (int64_t i = 0; i < count; ++i) {
        if (labels[left[static_cast<size_t>(i)]] < 0) values.push_back(column[i]);
      }
      std::nth_element(values.begin(), values.begin() + size - 1, values.end());
      const float edge = values[static_cast<size_t>(size - 1)];
      const float error = packed.Error(longest) + 4e-7f * std::abs(edge);
      int64_t taken = 0;
      doubtful.clear();
      for (int64_t i = 0; i < count; ++i) {
        const auto item = static_cast<int32_t>(left[static_cast<size_t>(i)]);
        if (labels[item] >= 0 || column[i] > edge + 2 * error) continue;
        if (column[i] < edge - 2 * error) {
          labels[item] = static_cast<int32_t>(first + k);
          ++taken;
        } else {
          doubtful.emplace_back(Cost(x, item, centers, first + k, kernels), item);
        }
      }
      std::sort(doubtful.begin(), doubtful.end());
      for (int64_t t = 0; taken < size; ++t, ++taken) {
        labels[doubtful[static_cast<size_t>(t)].second] = static_cast<int32_t>(first + k);
      }
    }
    left.erase(
        std::remove_if(left.begin(), left.end(), [&](int64_t item) { return labels[item] >= 0; }),
        left.end());
  }
}

// Costs of a group's items in the clusters that it may use, prices included.
class GroupCosts : public FinishCosts {
 public:
  GroupCosts(const FloatRows& x, const float* centers, const double* prices,
             const std::vector<int64_t>& items, const std::vector<int32_t>& clusters,
             const KMeansKernels& kernels)
      : clusters_(clusters.size()) {
    for (const int64_t item : items) {
      for (const int32_t k : clusters) {
        costs_.push_back(Cost(x, item, centers, k, kernels) + (prices != nullptr ? prices[k] : 0));
      }
    }
  }

  void Rows(const int32_t* items, int64_t count, const Body& body) const override {
    std::vector<float> row(clusters_);
    for (int64_t i = 0; i < count; ++i) {
      const double* exact = costs_.data() + static_cast<size_t>(items[i]) * clusters_;
      float largest = 0;
      for (size_t k = 0; k < clusters_; ++k) {
        row[k] = static_cast<float>(exact[k] - exact[0]);
        largest = std::max(largest, std::abs(row[k]));
      }
      body(i, row.data(), 4e-7f * largest);
    }
  }

  double Exact(int32_t item, int32_t node) const override {
    return costs_[static_cast<size_t>(item) * clusters_ + static_cast<size_t>(node)];
  }

 private:
  size_t clusters_;
  std::vector<double> costs_;
};

}  // namespace

#ifndef ONEREC_CUDA
struct KMeansDevice::State {};
KMeansDevice::KMeansDevice(const FloatRows&, const std::vector<double>&, int) {
  throw std::runtime_error(GetCudaInfo().problem);
}
KMeansDevice::~KMeansDevice() = default;
void KMeansDevice::SetCenters(const float*, int64_t, const std::vector<int32_t>&) {}
void KMeansDevice::SetPrices(const double*) {}
float KMeansDevice::Error(int64_t) const { return 0; }
void KMeansDevice::Argmin(int32_t*) {}
const KMeansDevice::Lists& KMeansDevice::Candidates(const int64_t*, int64_t, int64_t, double,
                                                    double) {
  static const Lists none;
  return none;
}
#endif

const KMeansKernels& CurrentKMeansKernels() {
#ifdef ONEREC_X86
  if (CurrentIsa() >= Isa::kAvx512) return avx512::kKMeansKernels;
  if (CurrentIsa() == Isa::kAvx2) return avx2::kKMeansKernels;
#endif
  return baseline::kKMeansKernels;
}

std::vector<int64_t> DrawRows(int64_t total, int64_t count, uint64_t seed) {
  std::vector<int64_t> order(static_cast<size_t>(total));
  std::iota(order.begin(), order.end(), int64_t{0});
  Random random(seed);
  for (int64_t i = 0; i < count && i + 1 < total; ++i) {
    std::swap(order[static_cast<size_t>(i)],
              order[static_cast<size_t>(i + random.Below(total - i))]);
  }
  order.resize(static_cast<size_t>(count));
  return order;
}

std::vector<int64_t> SampleRows(int64_t total, int64_t count, uint64_t seed) {
  std::vector<int64_t> rows = DrawRows(total, count, seed);
  std::sort(rows.begin(), rows.end());
  return rows;
}

std::vector<double> ColumnMeans(const FloatRows& x, int num_threads) {
  const int64_t parts = std::min<int64_t>(x.rows, 64);
  const int64_t d = x.columns;
  std::vector<double> partial(static_cast<size_t>(parts * d));
  ParallelFor(parts, num_threads, [&](int64_t c) {
    double* sum = partial.data() + c * d;
    for (int64_t i = c * x.rows / parts; i < (c + 1) * x.rows / parts; ++i) {
      const float* row = x.data + i * x.stride;
      for (int64_t j = 0; j < d; ++j) sum[j] += static_cast<double>(row[j]);
    }
  });
  std::vector<double> mean(static_cast<size_t>(d));
  for (int64_t c = 0; c < parts; ++c) {
    for (int64_t j = 0; j < d; ++j)
      mean[static_cast<size_t>(j)] += partial[static_cast<size_t>(c * d + j)];
  }
  for (double& value : mean) value /= static_cast<double>(x.rows);
  return mean;
}

void CheckFinite(const FloatRows& x, int num_threads) {
  const int64_t parts = (x.rows + 1023) / 1024;
  std::vector<int64_t> bad(static_cast<size_t>(parts), -1);
  ParallelFor(parts, num_threads, [&](int64_t c) {
    for (int64_t i = c * 1024; i < std::min(x.rows, (c + 1) * 1024); ++i) {
      const float* row = x.data + i * x.stride;
      float sum = 0;  // NaN or infinity times zero is NaN
      for (int64_t j = 0; j < x.columns; ++j) sum += row[j] * 0.0f;
      if (sum != 0.0f) {
        bad[static_cast<size_t>(c)] = i;
        return;
      }
    }
  });
  for (const int64_t i : bad) {
    if (i < 0) continue;
    for (int64_t j = 0; j < x.columns; ++j) {
      const float value = x.data[i * x.stride + j];
      if (std::isfinite(value)) continue;
      throw std::invalid_argument("x: wanted finite values, got " + std::to_string(value) +
                                  " in row " + Text(i) + ", column " + Text(j));
    }
  }
}

PackedCenters::PackedCenters(const float* centers, int64_t count, int64_t d,
                             const std::vector<double>& mean, const KMeansKernels& kernels)
    : count_(count),
      columns_((count + kernels.nr - 1) / kernels.nr * kernels.nr),
      d_(d),
      packed_(static_cast<size_t>(columns_ * d), 0.0f),
      bias_(static_cast<size_t>(columns_), std::numeric_limits<float>::infinity()),
      mean_(mean.begin(), mean.end()),
      squares_(static_cast<size_t>(count)) {
  const int64_t nr = kernels.nr;
  double most = 0;
  for (int64_t k = 0; k < count; ++k) {
    float* panel = packed_.data() + k / nr * nr * d + k % nr;
    double square = 0;
    for (int64_t j = 0; j < d; ++j) {
      const double difference =
          static_cast<double>(centers[k * d + j]) - mean_[static_cast<size_t>(j)];
      square += difference * difference;
      panel[j * nr] = static_cast<float>(-2 * difference);
    }
    squares_[static_cast<size_t>(k)] = square;
    most = std::max(most, square);
  }
  largest_ = std::sqrt(most);
  SetPrices(nullptr);
}

void PackedCenters::SetPrices(const double* prices) {
  double bias = 0;
  for (int64_t k = 0; k < count_; ++k) {
    const double value = squares_[static_cast<size_t>(k)] + (prices != nullptr ? prices[k] : 0.0);
    bias_[static_cast<size_t>(k)] = static_cast<float>(value);
    bias = std::max(bias, std::abs(value));
  }
  // d products and sums, both operands rounded once, the bias rounded and added.
  slope_ = kUnit * (2.0 * static_cast<double>(d_) + 16) * largest_ * 1.001;
  offset_ = kUnit * 4 * bias;
}

std::vector<int64_t> Bounds(int64_t n, const Processes& processes) {
  std::vector<int64_t> bounds;
  for (int64_t r = 0; r <= processes.count; ++r) bounds.push_back(n * r / processes.count);
  return bounds;
}

std::vector<int64_t> ChunkBounds(int64_t chunks, const Processes& processes) {
  const int64_t parts = std::min(kParts, chunks);
  std::vector<int64_t> bounds = Bounds(parts, processes);
  for (int64_t& bound : bounds) bound = parts > 0 ? bound * chunks / parts : 0;
  return bounds;
}

PassPlan PlanPass(int64_t rows, int64_t columns, const KMeansKernels& kernels) {
  const int64_t mr = kernels.mr;
  PassPlan plan;
  plan.block_rows = std::clamp<int64_t>((192 << 10) / 4 / columns, mr, 96) / mr * mr;
  const int64_t share = std::clamp<int64_t>(rows / 16, 1, 1024);
  plan.chunk_rows = (share + plan.block_rows - 1) / plan.block_rows * plan.block_rows;
  plan.chunks = (rows + plan.chunk_rows - 1) / plan.chunk_rows;
  return plan;
}

void ClusterMeans(const FloatRows& x, const int32_t* labels, int64_t clusters,
                  const BalancedKMeansOptions& options, float* centers) {
  std::vector<int64_t> offset(static_cast<size_t>(clusters) + 1);
  for (int64_t i = 0; i < x.rows; ++i) ++offset[static_cast<size_t>(labels[i]) + 1];
  std::partial_sum(offset.begin(), offset.end(), offset.begin());
  std::vector<int32_t> members(static_cast<size_t>(x.rows));
  std::vector<int64_t> place(offset.begin(), offset.end() - 1);
  for (int64_t i = 0; i < x.rows; ++i) {
    members[static_cast<size_t>(place[static_cast<size_t>(labels[i])]++)] = static_cast<int32_t>(i);
  }
  const std::vector<int64_t> bounds = Bounds(clusters, options.processes);
  const auto rank = static_cast<size_t>(options.processes.rank);
  ParallelFor(bounds[rank + 1] - bounds[rank], options.num_threads, [&](int64_t own) {
    const int64_t k = bounds[rank] + own;
    const int64_t begin = offset[static_cast<size_t>(k)];
    const int64_t end = offset[static_cast<size_t>(k) + 1];
    if (begin == end) return;
    std::vector<double> sum(static_cast<size_t>(x.columns));
    for (int64_t t = begin; t < end; ++t) {
      const float* row = x.data + members[static_cast<size_t>(t)] * x.stride;
      for (int64_t j = 0; j < x.columns; ++j)
        sum[static_cast<size_t>(j)] += static_cast<double>(row[j]);
    }
    for (int64_t j = 0; j < x.columns; ++j) {
      centers[k * x.columns + j] =
          static_cast<float>(sum[static_cast<size_t>(j)] / static_cast<double>(end - begin));
    }
  });
  Share(options.processes, bounds, x.columns, centers);
}

Nodes MakeNodes(const float* centers, int64_t clusters, int64_t d,
                const BalancedKMeansOptions& options) {
  std::vector<int32_t> order(static_cast<size_t>(clusters));
  std::iota(order.begin(), order.end(), 0);
  const auto compare = [&](int32_t a, int32_t b) {
    const float* left = centers + a * d;
    const float* right = centers + b * d;
    for (int64_t j = 0; j < d; ++j) {
      if (left[j] != right[j]) return left[j] < right[j] ? -1 : 1;
    }
    return 0;
  };
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const int difference = compare(a, b);
    return difference != 0 ? difference < 0 : a < b;
  });
  std::vector<int32_t> first(static_cast<size_t>(clusters));
  std::vector<int32_t> distinct;
  for (size_t t = 0; t < order.size(); ++t) {
    const bool same = t > 0 && compare(order[t - 1], order[t]) == 0;
    first[static_cast<size_t>(order[t])] =
        same ? first[static_cast<size_t>(order[t - 1])] : order[t];
    if (!same) distinct.push_back(order[t]);
  }
  std::sort(distinct.begin(), distinct.end());
  const auto count = static_cast<int64_t>(distinct.size());
  std::vector<float> rows;
  for (const int32_t k : distinct) {
    rows.insert(rows.end(), centers + k * d, centers + (k + 1) * d);
  }
  // Groups: a few rounds of plain k-means on the centres.
  const auto groups = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(count))));
  std::vector<float> means;
  for (int64_t g = 0; g < groups; ++g) {
    const auto row = rows.begin() + g * count / groups * d;
    means.insert(means.end(), row, row + d);
  }
  const FloatRows view{rows.data(), count, d, d};
  std::vector<int32_t> group(static_cast<size_t>(count));
  BalancedKMeansOptions alone;
  alone.num_threads = options.num_threads;
  alone.on_step = options.on_step;
  for (int round = 0; round < 4; ++round) {
    PricedArgmin(view, means.data(), groups, nullptr, alone, group.data(), nullptr);
    ClusterMeans(view, group.data(), groups, alone, means.data());
  }
  std::vector<int32_t> place(static_cast<size_t>(count));
  std::iota(place.begin(), place.end(), 0);
  std::stable_sort(place.begin(), place.end(), [&](int32_t a, int32_t b) {
    return group[static_cast<size_t>(a)] < group[static_cast<size_t>(b)];
  });
  Nodes nodes;
  nodes.count = count;
  nodes.multiplicity.assign(static_cast<size_t>(count), 0);
  nodes.node_of.resize(static_cast<size_t>(clusters));
  for (int64_t t = 0; t < count; ++t) {
    const auto from = static_cast<size_t>(place[static_cast<size_t>(t)]);
    const int32_t k = distinct[from];
    if (t == 0 || group[from] != group[static_cast<size_t>(place[static_cast<size_t>(t - 1)])]) {
      nodes.group_offset.push_back(static_cast<int32_t>(t));
    }
    nodes.first.push_back(k);
    nodes.node_of[static_cast<size_t>(k)] = static_cast<int32_t>(t);
    nodes.centers.insert(nodes.centers.end(), centers + k * d, centers + (k + 1) * d);
  }
  nodes.group_offset.push_back(static_cast<int32_t>(count));
  for (int64_t k = 0; k < clusters; ++k) {
    const int32_t node = nodes.node_of[static_cast<size_t>(first[static_cast<size_t>(k)])];
    nodes.node_of[static_cast<size_t>(k)] = node;
    ++nodes.multiplicity[static_cast<size_t>(node)];
  }
  return nodes;
}

BalancedAssignment BalancedAssign(const FloatRows& x, const float* centers, int64_t clusters,
                                  const BalancedKMeansOptions& options, bool prices_given,
                                  double* prices, int32_t* labels, bool labels_given) {
  CheckBalanced(x, clusters, options);
  if (labels_given) CheckSizes(x.rows, clusters, labels);
  CheckCenters(centers, clusters, x.columns, prices_given ? prices : nullptr);
  CheckFinite(x, options.num_threads);
  const std::vector<double> mean = ColumnMeans(x, options.num_threads);
  const std::unique_ptr<KMeansDevice> device = OpenDevice(x, mean, options);
  return SolveAssignment(x, mean, centers, clusters, options, device.get(), prices_given,
                         labels_given, true, prices, labels);
}

BalancedKMeansResult BalancedKMeansFit(const FloatRows& x, int64_t clusters,
                                       const BalancedKMeansOptions& options, bool centers_given,
                                       float* centers, double* prices, int32_t* labels) {
  CheckBalanced(x, clusters, options);
  CheckFinite(x, options.num_threads);
  if (centers_given) {
    CheckCenters(centers, clusters, x.columns, nullptr);
  } else {
    DrawCenters(x, clusters, options.seed, centers);
  }
  const std::vector<double> mean = ColumnMeans(x, options.num_threads);
  const std::unique_ptr<KMeansDevice> device = OpenDevice(x, mean, options);
  if (options.steps_done == 0) {
    std::fill(prices, prices + clusters, 0.0);
  } else {
    CheckSizes(x.rows, clusters, labels);
  }
  BalancedKMeansResult result;
  result.iterations = options.steps_done;
  std::vector<int32_t> previous(static_cast<size_t>(x.rows), -1);
  const auto settled = [&] {
    const bool same = std::equal(previous.begin(), previous.end(), labels);
    std::copy(labels, labels + x.rows, previous.begin());
    return same;
  };
  if (options.method == BalancedMethod::kSequential) {
    while (result.iterations < options.max_iter && !result.converged) {
      SequentialRound(x, mean, centers, clusters, options, labels);
      result.converged = settled();
      ClusterMeans(x, labels, clusters, options, centers);
      ++result.iterations;
      if (options.on_iteration) options.on_iteration(result.iterations, 0);
    }
    result.inertia = Inertia(x, centers, labels, options);
    result.gap = std::numeric_limits<double>::quiet_NaN();
    return result;
  }
  const auto assign = [&](bool warm, bool certify) {
    const BalancedAssignment step = SolveAssignment(
        x, mean, centers, clusters, options, device.get(), warm, warm, certify, prices, labels);
    result.inertia = step.cost;
    result.gap = step.gap;
    BalancedAssignment& work = result.work;
    work.cost = step.cost;
    work.dual = step.dual;
    work.gap = step.gap;
    work.moves += step.moves;
    work.passes += step.passes;
    work.sweeps += step.sweeps;
    work.pass_seconds += step.pass_seconds;
    work.price_seconds += step.price_seconds;
    work.finish_seconds += step.finish_seconds;
  };
  double before = options.inertia_done;
  while (result.iterations < options.max_iter && !result.converged) {
    assign(result.iterations > 0, false);
    if (settled()) break;  // the centres are the means of these labels already
    const std::vector<float> old(centers, centers + clusters * x.columns);
    ClusterMeans(x, labels, clusters, options, centers);
    // To first order in the move of a centre, its members' cost + price stays what it was.
    for (int64_t k = 0; k < clusters; ++k) {
      prices[k] += CurrentKMeansKernels().exact_cost(old.data() + k * x.columns,
                                                     centers + k * x.columns, x.columns);
    }
    const double inertia = Inertia(x, centers, labels, options);
    result.converged = result.iterations > 0 && before - inertia <= options.tolerance * before;
    before = inertia;
    ++result.iterations;
    if (options.on_iteration) options.on_iteration(result.iterations, inertia);
  }
  // The last move of the centres is followed by one more assignment, so that labels and prices
  // belong to the centres that are returned.
  assign(true, true);
  result.converged = result.converged || settled();
  return result;
}

void PricedArgmin(const FloatRows& x, const float* centers, int64_t clusters, const double* prices,
                  const BalancedKMeansOptions& options, int32_t* labels, double* distances) {
  if (x.rows == 0) return;
  CheckShape(x, clusters, options);
  CheckCenters(centers, clusters, x.columns, prices);
  CheckFinite(x, options.num_threads);
  const KMeansKernels& kernels = CurrentKMeansKernels();
  FloatRows rows{centers, clusters, x.columns, x.columns};
  const std::vector<double> mean = ColumnMeans(rows, 1);
  PackedCenters packed(centers, clusters, x.columns, mean, kernels);
  packed.SetPrices(prices);
  const int64_t columns = packed.columns();
  std::vector<int64_t> open;
  const std::unique_ptr<KMeansDevice> device = OpenDevice(x, mean, options);
  if (device != nullptr) {
    device->SetCenters(centers, clusters, {});
    device->SetPrices(prices);
    device->Argmin(labels);
    for (int64_t i = 0; i < x.rows; ++i) {
      if (labels[i] < 0) {
        open.push_back(i);
      } else if (distances != nullptr) {
        distances[i] = Cost(x, i, centers, labels[i], kernels);
      }
    }
  }
  DensePass(x, device != nullptr ? open.data() : nullptr,
            device != nullptr ? static_cast<int64_t>(open.size()) : x.rows, packed, kernels,
            options, [&](int64_t, int64_t position, const float* row, double square) {
              const int64_t i = device != nullptr ? open[static_cast<size_t>(position)] : position;
              const float limit =
                  std::nextafter(kernels.row_min(row, columns) + 2 * packed.Error(square),
                                 std::numeric_limits<float>::infinity());
              int32_t best = -1;
              double least = 0;
              double distance = 0;
              int32_t found[64];
              for (int64_t k = 0; k < columns; k += 64) {
                const int64_t width = std::min<int64_t>(64, columns - k);
                const int64_t n = kernels.collect(row + k, width, limit, found);
                for (int64_t t = 0; t < n; ++t) {
                  const auto code = static_cast<int32_t>(k + found[t]);
                  const double cost = Cost(x, i, centers, code, kernels);
                  const double value = cost + (prices != nullptr ? prices[code] : 0.0);
                  if (best >= 0 && !(value < least)) continue;
                  best = code;
                  least = value;
                  distance = cost;
                }
              }
              labels[i] = best;
              if (distances != nullptr) distances[i] = distance;
            });
}

void CappedAssign(const FloatRows& x, const float* centers, int64_t clusters, const double* prices,
                  const int64_t* groups, int64_t cap, const BalancedKMeansOptions& options,
                  int32_t* labels) {
  if (cap < 1) throw std::invalid_argument("cap: wanted at least 1, got " + Text(cap));
  PricedArgmin(x, centers, clusters, prices, options, labels, nullptr);
  // Items by group, in item order.
  int64_t count = 0;
  for (int64_t i = 0; i < x.rows; ++i) {
    if (groups[i] < 0 || groups[i] >= x.rows) {
      throw std::invalid_argument("groups: wanted numbers in 0.." + Text(x.rows - 1) + ", got " +
                                  Text(groups[i]) + " at " + Text(i));
    }
    count = std::max(count, groups[i] + 1);
  }
  std::vector<int64_t> offset(static_cast<size_t>(count) + 1);
  for (int64_t i = 0; i < x.rows; ++i) ++offset[static_cast<size_t>(groups[i]) + 1];
  std::partial_sum(offset.begin(), offset.end(), offset.begin());
  std::vector<int64_t> members(static_cast<size_t>(x.rows));
  std::vector<int64_t> place(offset.begin(), offset.end() - 1);
  for (int64_t i = 0; i < x.rows; ++i)
    members[static_cast<size_t>(place[static_cast<size_t>(groups[i])]++)] = i;
  // Only groups in which a cluster is over-full have anything to decide.
  std::vector<int64_t> crowded;
  std::vector<int64_t> rows;
  std::vector<int64_t> wanted;
  std::vector<int32_t> codes;
  for (int64_t g = 0; g < count; ++g) {
    const int64_t n = offset[static_cast<size_t>(g) + 1] - offset[static_cast<size_t>(g)];
    if (n > cap * clusters) {
      throw std::invalid_argument(
          "groups: wanted at most cap * clusters = " + Text(cap * clusters) +
          " items in a group, got " + Text(n) + " in group " + Text(g));
    }
    codes.clear();
    for (int64_t t = offset[static_cast<size_t>(g)]; t < offset[static_cast<size_t>(g) + 1]; ++t) {
      codes.push_back(labels[members[static_cast<size_t>(t)]]);
    }
    std::sort(codes.begin(), codes.end());
    bool over = false;
    for (size_t t = static_cast<size_t>(cap); t < codes.size(); ++t) {
      over = over || codes[t] == codes[t - static_cast<size_t>(cap)];
    }
    if (!over) continue;
    crowded.push_back(g);
    // The others of its group fill at most (n - 1) / cap clusters, so an item never needs more than
    // its (n - 1) / cap + 1 best.
    for (int64_t t = offset[static_cast<size_t>(g)]; t < offset[static_cast<size_t>(g) + 1]; ++t) {
      rows.push_back(members[static_cast<size_t>(t)]);
      wanted.push_back(std::min(clusters, (n - 1) / cap + 1));
    }
  }
  if (crowded.empty()) return;
  const KMeansKernels& kernels = CurrentKMeansKernels();
  FloatRows center_rows{centers, clusters, x.columns, x.columns};
  PackedCenters packed(centers, clusters, x.columns, ColumnMeans(center_rows, 1), kernels);
  packed.SetPrices(prices);
  const int64_t columns = packed.columns();
  std::vector<std::vector<int32_t>> choices(rows.size());
  DensePass(x, rows.data(), static_cast<int64_t>(rows.size()), packed, kernels, options,
            [&](int64_t, int64_t position, const float* row, double square) {
              std::vector<float> sorted(row, row + clusters);
              const auto nth = sorted.begin() + wanted[static_cast<size_t>(position)] - 1;
              std::nth_element(sorted.begin(), nth, sorted.end());
              const float limit = std::nextafter(*nth + 2 * packed.Error(square),
                                                 std::numeric_limits<float>::infinity());
              std::vector<int32_t> codes(static_cast<size_t>(columns));
              codes.resize(static_cast<size_t>(kernels.collect(row, columns, limit, codes.data())));
              choices[static_cast<size_t>(position)].assign(codes.begin(), codes.end());
            });
  std::vector<int64_t> start(crowded.size() + 1);
  for (size_t g = 0; g < crowded.size(); ++g) {
    const auto group = static_cast<size_t>(crowded[g]);
    start[g + 1] = start[g] + offset[group + 1] - offset[group];
  }
  ParallelFor(static_cast<int64_t>(crowded.size()), options.num_threads, [&](int64_t g) {
    const auto begin = static_cast<size_t>(start[static_cast<size_t>(g)]);
    const auto end = static_cast<size_t>(start[static_cast<size_t>(g) + 1]);
    // Number the clusters that anyone here may take.
    std::vector<int32_t> used;
    for (size_t t = begin; t < end; ++t) {
      used.insert(used.end(), choices[t].begin(), choices[t].end());
    }
    std::sort(used.begin(), used.end());
    used.erase(std::unique(used.begin(), used.end()), used.end());
    const auto index = [&](int32_t code) {
      return static_cast<int32_t>(std::lower_bound(used.begin(), used.end(), code) - used.begin());
    };
    NodeCapacity capacity;
    capacity.units.assign(used.size(), cap);
    capacity.extra.assign(used.size(), cap);
    capacity.dummies = cap * static_cast<int64_t>(used.size()) - static_cast<int64_t>(end - begin);
    std::vector<int32_t> chosen;
    std::vector<int64_t> items;
    for (size_t t = begin; t < end; ++t) {
      chosen.push_back(index(labels[rows[t]]));
      items.push_back(rows[t]);
    }
    const GroupCosts costs(x, centers, prices, items, used, kernels);
    std::vector<double> zero(used.size(), 0.0);
    ExactFinish finish(capacity, costs, static_cast<int64_t>(end - begin), chosen.data(),
                       zero.data(), 1, nullptr);
    finish.Run();
    for (size_t t = begin; t < end; ++t)
      labels[rows[t]] = used[static_cast<size_t>(chosen[t - begin])];
  });
}

void AssignWithin(const FloatRows& x, const float* centers, int64_t clusters, const double* prices,
                  const int64_t* room, const BalancedKMeansOptions& options, int32_t* labels) {
  NodeCapacity capacity;
  capacity.dummies = -x.rows;
  for (int64_t k = 0; k < clusters; ++k) {
    if (room[k] < 0) {
      throw std::invalid_argument("room: wanted at least 0, got " + Text(room[k]) + " at " +
                                  Text(k));
    }
    capacity.units.push_back(room[k]);
    capacity.extra.push_back(room[k]);
    capacity.dummies += room[k];
  }
  if (capacity.dummies < 0) {
    throw std::invalid_argument("room: wanted at least " + Text(x.rows) + " in all, got " +
                                Text(x.rows + capacity.dummies));
  }
  if (x.rows == 0) return;
  PricedArgmin(x, centers, clusters, prices, options, labels, nullptr);
  const KMeansKernels& kernels = CurrentKMeansKernels();
  const FloatRows center_rows{centers, clusters, x.columns, x.columns};
  PackedCenters packed(centers, clusters, x.columns, ColumnMeans(center_rows, 1), kernels);
  packed.SetPrices(prices);
  const TileCosts costs(x, centers, prices, packed, kernels);
  std::vector<double> zero(static_cast<size_t>(clusters), 0.0);
  ExactFinish finish(capacity, costs, x.rows, labels, zero.data(), options.num_threads,
                     options.on_step);
  finish.Run();
}

}  // namespace onerec
