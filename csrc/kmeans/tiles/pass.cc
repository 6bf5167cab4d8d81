#include "kmeans/tiles/pass.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kmeans/rounding.h"
#include "onerec/runtime.h"
#include "support/dispatch.h"
#include "support/int_math.h"

namespace onerec {
const KMeansKernels& CurrentKMeansKernels() { return ONEREC_DISPATCH(kKMeansKernels); }

std::vector<double> ColumnMeans(const FloatRows& x, int num_threads) {
  const int64_t parts = std::min<int64_t>(x.rows, 64);
  const int64_t d = x.columns;
  std::vector<double> partial(parts * d);
  ParallelFor(parts, num_threads, [&](int64_t c) {
    double* sum = partial.data() + c * d;
    for (int64_t i = c * x.rows / parts; i < (c + 1) * x.rows / parts; ++i) {
      const float* row = x.data + i * x.stride;
      for (int64_t j = 0; j < d; ++j) sum[j] += static_cast<double>(row[j]);
    }
  });
  std::vector<double> mean(d);
  for (int64_t c = 0; c < parts; ++c) {
    for (int64_t j = 0; j < d; ++j) mean[j] += partial[c * d + j];
  }
  for (double& value : mean) value /= static_cast<double>(x.rows);
  return mean;
}

PackedCenters::PackedCenters(const float* centers, int64_t count, int64_t d,
                             const std::vector<double>& mean, const KMeansKernels& kernels)
    : count_(count),
      columns_(RoundUp(count, kernels.nr)),
      d_(d),
      packed_(columns_ * d, 0.0f),
      bias_(columns_, std::numeric_limits<float>::infinity()),
      mean_(mean.begin(), mean.end()),
      squares_(count) {
  const int64_t nr = kernels.nr;
  double most = 0;
  for (int64_t k = 0; k < count; ++k) {
    float* panel = packed_.data() + k / nr * nr * d + k % nr;
    double square = 0;
    for (int64_t j = 0; j < d; ++j) {
      const double difference = static_cast<double>(centers[k * d + j]) - mean_[j];
      square += difference * difference;
      panel[j * nr] = static_cast<float>(-2 * difference);
    }
    squares_[k] = square;
    most = std::max(most, square);
  }
  largest_ = std::sqrt(most);
  SetPrices(nullptr);
}

void PackedCenters::SetPrices(const double* prices) {
  double bias = 0;
  for (int64_t k = 0; k < count_; ++k) {
    const double value = squares_[k] + (prices != nullptr ? prices[k] : 0.0);
    bias_[k] = static_cast<float>(value);
    bias = std::max(bias, std::abs(value));
  }
  // d products and sums, both operands rounded once, the bias rounded and added.
  slope_ = kFloatUnit * (2.0 * static_cast<double>(d_) + 16) * largest_ * 1.001;
  offset_ = kFloatUnit * 4 * bias;
}

PassPlan PlanPass(int64_t rows, int64_t columns, const KMeansKernels& kernels) {
  const int64_t mr = kernels.mr;
  PassPlan plan;
  plan.block_rows = std::clamp<int64_t>((192 << 10) / 4 / columns, mr, 96) / mr * mr;
  const int64_t share = std::clamp<int64_t>(rows / 16, 1, 1024);
  plan.chunk_rows = RoundUp(share, plan.block_rows);
  plan.chunks = DivideUp(rows, plan.chunk_rows);
  return plan;
}

void ClusterMeans(const FloatRows& x, const int32_t* labels, int64_t clusters,
                  const BalancedKMeansOptions& options, float* centers) {
  std::vector<int64_t> offset(clusters + 1);
  for (int64_t i = 0; i < x.rows; ++i) ++offset[labels[i] + 1];
  std::partial_sum(offset.begin(), offset.end(), offset.begin());
  std::vector<int32_t> members(x.rows);
  std::vector<int64_t> place(offset.begin(), offset.end() - 1);
  for (int64_t i = 0; i < x.rows; ++i) {
    members[place[labels[i]]++] = static_cast<int32_t>(i);
  }
  ParallelFor(clusters, options.num_threads, [&](int64_t k) {
    const int64_t begin = offset[k];
    const int64_t end = offset[k + 1];
    if (begin == end) return;
    std::vector<double> sum(x.columns);
    for (int64_t t = begin; t < end; ++t) {
      const float* row = x.data + members[t] * x.stride;
      for (int64_t j = 0; j < x.columns; ++j) sum[j] += static_cast<double>(row[j]);
    }
    for (int64_t j = 0; j < x.columns; ++j) {
      centers[k * x.columns + j] = static_cast<float>(sum[j] / static_cast<double>(end - begin));
    }
  });
}

}  // namespace onerec
