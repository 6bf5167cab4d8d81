// A pass over rows and all centres: distance tiles that never leave the cache.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "kmeans/tiles/kernels.h"
#include "onerec/balanced_kmeans.h"
#include "support/aligned_vector.h"
#include "support/int_math.h"
#include "support/thread_pool.h"

namespace onerec {

const KMeansKernels& CurrentKMeansKernels();

inline double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Column means of x in float64, summed in an order that does not depend on the threads.
std::vector<double> ColumnMeans(const FloatRows& x, int num_threads);

// Centres packed for the tile kernel, relative to `mean`, so that a common offset of the data costs
// no digits. approximate(i, k) = |c_k|^2 - 2 x_i c_k + price_k, all relative to the mean: the cost
// less |x_i|^2, up to an error that Error() bounds.
class PackedCenters {
 public:
  PackedCenters(const float* centers, int64_t count, int64_t d, const std::vector<double>& mean,
                const KMeansKernels& kernels);

  void SetPrices(const double* prices);  // null: zero

  // Bound on |computed - exact| for a row with |x|^2 = square.
  float Error(double square) const {
    return static_cast<float>(slope_ * __builtin_sqrt(square) + offset_);
  }

  int64_t count() const { return count_; }
  int64_t columns() const { return columns_; }
  int64_t d() const { return d_; }
  const float* packed() const { return packed_.data(); }
  const float* bias() const { return bias_.data(); }
  const float* mean() const { return mean_.data(); }

 private:
  int64_t count_;
  int64_t columns_;  // count rounded up to whole panels; the rest have an infinite bias
  int64_t d_;
  LineVector<float> packed_;
  LineVector<float> bias_;
  std::vector<float> mean_;
  std::vector<double> squares_;
  double largest_ = 0;  // norm of the longest centred centre
  double slope_ = 0;
  double offset_ = 0;
};

constexpr int64_t kParts = 32;  // parts of a sum over chunks, each summed in order

struct PassPlan {
  int64_t block_rows;  // rows of a tile
  int64_t chunk_rows;  // rows of a unit of parallel work, whole tiles
  int64_t chunks;
};

PassPlan PlanPass(int64_t rows, int64_t columns, const KMeansKernels& kernels);

// Calls body(chunk, position, tile_row, square), square being |x|^2 from the mean, for each of
// `count` rows: those named by `subset`, or all in order if it is null. A chunk's rows come in
// order on one thread.
template <class Body>
void DensePass(const FloatRows& x, const int64_t* subset, int64_t count,
               const PackedCenters& centers, const KMeansKernels& kernels,
               const BalancedKMeansOptions& options, Body&& body) {
  const PassPlan plan = PlanPass(count, centers.columns(), kernels);
  const int64_t d = centers.d();
  const int64_t columns = centers.columns();
  const int64_t most = std::min(plan.block_rows, RoundUp(count, kernels.mr));
  const auto run = [&](int64_t chunk) {
    LineVector<float> a(most * d);
    LineVector<float> tile(most * columns);
    std::vector<double> squares(most);
    const int64_t chunk_end = std::min(count, (chunk + 1) * plan.chunk_rows);
    for (int64_t first = chunk * plan.chunk_rows; first < chunk_end; first += plan.block_rows) {
      const int64_t rows = std::min(plan.block_rows, chunk_end - first);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t item = subset != nullptr ? subset[first + r] : first + r;
        const float* source = x.data + item * x.stride;
        squares[r] = kernels.centre(source, centers.mean(), d, a.data() + r * d);
      }
      const int64_t padded = RoundUp(rows, kernels.mr);
      std::fill(a.begin() + rows * d, a.begin() + padded * d, 0.0f);
      kernels.cost_tile(a.data(), padded, d, centers.packed(), centers.bias(), columns,
                        tile.data());
      for (int64_t r = 0; r < rows; ++r) {
        body(chunk, first + r, tile.data() + r * columns, squares[r]);
      }
    }
  };
  // In pieces of a second or so, so that on_step is heard.
  const double work = 2.0 * static_cast<double>(plan.chunk_rows) * static_cast<double>(columns * d);
  const int64_t piece = std::max<int64_t>(64, static_cast<int64_t>(4e10 / work));
  for (int64_t begin = 0; begin < plan.chunks; begin += piece) {
    const int64_t end = std::min(plan.chunks, begin + piece);
    ParallelFor(end - begin, options.num_threads, [&](int64_t c) { run(begin + c); });
    if (options.on_step) options.on_step();
  }
}

// Means of the rows of each cluster, in float64 and in item order.
void ClusterMeans(const FloatRows& x, const int32_t* labels, int64_t clusters,
                  const BalancedKMeansOptions& options, float* centers);

// Exact squared distance of item to centre k.
inline double Cost(const FloatRows& x, int64_t item, const float* centers, int64_t k,
                   const KMeansKernels& kernels) {
  return kernels.exact_cost(x.data + item * x.stride, centers + k * x.columns, x.columns);
}

}  // namespace onerec
