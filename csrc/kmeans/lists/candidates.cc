#include "kmeans/lists/candidates.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "support/int_math.h"
#include "support/thread_pool.h"

namespace onerec {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

void SetLimit(double threshold, Candidates& row) {
  row.limit = static_cast<float>(
      std::min(static_cast<double>(row.low) + threshold + static_cast<double>(row.error),
               static_cast<double>(kLargest) / 2));
}

}  // namespace

CandidatePass::CandidatePass(const FloatRows& x, const Nodes& nodes,
                             const BalancedKMeansOptions& options, const KMeansKernels& kernels,
                             PackedCenters& centers, KMeansDevice* device, int64_t device_rows)
    : x_(x),
      nodes_(nodes),
      options_(options),
      kernels_(kernels),
      centers_(centers),
      device_(device),
      device_rows_(device_rows) {
  if (device != nullptr) {
    device->SetCenters(nodes.centers.data(), nodes.count, nodes.group_offset);
  }
}

void CandidatePass::Run(const double* prices, double threshold, double reach, const int64_t* subset,
                        int64_t count, const Body& body) {
  centers_.SetPrices(prices);
  if (device_ == nullptr) {
    OnHost(threshold, reach, subset, count, body);
  } else {
    device_->SetPrices(prices);
    OnDevice(threshold, reach, subset, count, body);
  }
}

void CandidatePass::OnHost(double threshold, double reach, const int64_t* subset, int64_t count,
                           const Body& body) const {
  const int64_t columns = centers_.columns();
  DensePass(x_, subset, count, centers_, kernels_, options_,
            [&](int64_t chunk, int64_t position, const float* row, double square) {
              thread_local std::vector<int32_t> where;
              thread_local Candidates candidates;
              if (static_cast<int64_t>(where.size()) < columns) {
                where.resize(columns);
              }
              candidates.low = kernels_.row_min(row, columns);
              candidates.error = 2 * centers_.Error(square);
              SetLimit(threshold, candidates);
              int64_t found = kernels_.collect(
                  row, columns, std::nextafter(candidates.limit, kInfinity), where.data());
              if (reach > threshold) found = AddLeaders(row, candidates, reach, found, where);
              candidates.code.assign(where.begin(), where.begin() + found);
              candidates.value.resize(found);
              for (int64_t t = 0; t < found; ++t) {
                candidates.value[t] = row[where[t]];
              }
              body(chunk, position, candidates);
            });
}

// Adds the best of each group that has none below the limit yet, if it is within reach.
int64_t CandidatePass::AddLeaders(const float* row, const Candidates& of, double reach,
                                  int64_t found, std::vector<int32_t>& where) const {
  const auto groups = static_cast<int64_t>(nodes_.group_offset.size()) - 1;
  thread_local std::vector<float> least;
  thread_local std::vector<int32_t> below;
  least.resize(groups);
  kernels_.group_min(row, nodes_.group_offset.data(), groups, least.data());
  below.assign(where.begin(), where.begin() + found);
  auto next = below.begin();
  int64_t count = 0;
  for (size_t g = 0; g < least.size(); ++g) {
    const int32_t first = nodes_.group_offset[g];
    const int32_t last = nodes_.group_offset[g + 1];
    if (next != below.end() && *next < last) {
      do {
        where[count++] = *next++;
      } while (next != below.end() && *next < last);
    } else if (static_cast<double>(least[g] - of.low) <= reach) {
      where[count++] =
          first + static_cast<int32_t>(kernels_.find(row + first, last - first, least[g]));
    }
  }
  return count;
}

void CandidatePass::OnDevice(double threshold, double reach, const int64_t* subset, int64_t count,
                             const Body& body) const {
  const PassPlan plan = PlanPass(count, centers_.columns(), kernels_);
  const int64_t piece = std::max<int64_t>(1, device_rows_ / plan.chunk_rows) * plan.chunk_rows;
  for (int64_t first = 0; first < count; first += piece) {
    const int64_t rows = std::min(piece, count - first);
    const int64_t* const some = subset != nullptr ? subset + first : nullptr;
    const KMeansDevice::Lists& lists = device_->Candidates(some, first, rows, threshold, reach);
    const auto item = [&](int64_t r) { return some != nullptr ? some[r] : first + r; };
    // Rows with more candidates than the device has room for are the host's.
    std::vector<int64_t> full;
    std::vector<int64_t> full_items;
    for (int64_t r = 0; r < rows; ++r) {
      if (lists.count[r] >= 0) continue;
      full.push_back(r);
      full_items.push_back(item(r));
    }
    std::vector<Candidates> again(full.size());
    OnHost(threshold, reach, full_items.data(), static_cast<int64_t>(full.size()),
           [&](int64_t, int64_t position, Candidates& row) { again[position] = row; });
    ParallelFor(DivideUp(rows, plan.chunk_rows), options_.num_threads, [&](int64_t c) {
      thread_local Candidates row;
      const int64_t begin = c * plan.chunk_rows;
      const int64_t end = std::min(rows, begin + plan.chunk_rows);
      auto next = std::lower_bound(full.begin(), full.end(), begin);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t chunk = (first + begin) / plan.chunk_rows;
        if (next != full.end() && *next == r) {
          body(chunk, first + r, again[next++ - full.begin()]);
          continue;
        }
        const auto start = static_cast<int64_t>(lists.start[r]);
        const int64_t stop = start + lists.count[r];
        row.code.assign(lists.code.begin() + start, lists.code.begin() + stop);
        row.value.assign(lists.value.begin() + start, lists.value.begin() + stop);
        row.low = *std::min_element(row.value.begin(), row.value.end());
        row.error = 2 * device_->Error(item(r));
        SetLimit(threshold, row);
        body(chunk, first + r, row);
      }
    });
    if (options_.on_step) options_.on_step();
  }
}

}  // namespace onerec
