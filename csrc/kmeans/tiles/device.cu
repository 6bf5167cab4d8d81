// Balanced k-means on a CUDA device: launches of the kernels of device_tiles.cuh.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "kmeans/tiles/device.h"
#include "kmeans/tiles/device_tiles.cuh"
#include "support/aligned_vector.h"
#include "support/cuda/check.h"
#include "support/cuda/device.h"
#include "support/int_math.h"

namespace onerec {
namespace {

constexpr int64_t kUploadRows = 65536;
constexpr int kCollectBytes = tiles::kSharedBytes + tiles::kTile * static_cast<int>(sizeof(int));
constexpr int64_t kWarps = tiles::kThreads / 32;

__global__ void __launch_bounds__(tiles::kThreads) ArgminKernel(tiles::Argmin body) {
  body(blockIdx.x, DynamicShared<float>());
}

__global__ void __launch_bounds__(tiles::kThreads) CollectKernel(tiles::Collect body) {
  body(blockIdx.x, DynamicShared<float>());
}

__global__ void __launch_bounds__(tiles::kThreads) PackKernel(tiles::Pack body) {
  body(blockIdx.x);
}

__global__ void __launch_bounds__(tiles::kThreads) GatherKernel(tiles::Gather body) {
  body(blockIdx.x);
}

// Device memory; grows, never shrinks.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  void Reserve(int64_t count) {
    if (count <= count_) return;
    cudaFree(data_);
    data_ = nullptr;
    count_ = 0;
    CheckCuda(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)),
              "balanced k-means, device memory");
    count_ = count;
  }
  void Upload(const T* values, int64_t count, int64_t at = 0) {
    CheckCuda(cudaMemcpy(data_ + at, values, count * sizeof(T), cudaMemcpyHostToDevice),
              "balanced k-means, copy to the device");
  }
  void Upload(const std::vector<T>& values, int64_t at = 0) {
    Upload(values.data(), static_cast<int64_t>(values.size()), at);
  }
  template <class U>
  void Download(U* values, int64_t count) const {
    static_assert(sizeof(U) == sizeof(T));
    CheckCuda(cudaMemcpy(values, data_, count * sizeof(T), cudaMemcpyDeviceToHost),
              "balanced k-means, copy from the device");
  }
  void Fill(int byte, int64_t count) {
    CheckCuda(cudaMemset(data_, byte, count * sizeof(T)), "balanced k-means, device memory");
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

int64_t Tiles(int64_t rows) { return DivideUp(rows, tiles::kTile); }

}  // namespace

struct KMeansDevice::State {
  int device;
  int64_t rows, d, padded;
  int64_t centre_count = 0;
  int64_t groups = 0;
  double largest = 0;  // norm of the longest centre, from the mean
  float slope = 0, offset = 0;
  std::vector<float> mean;
  std::vector<float> row_squares, centre_rows;
  std::vector<double> centre_squares;
  Lists lists, one;
  Buffer<float> x, squares, centers, bias, lows, some, some_squares, values;
  Buffer<int32_t> labels, group_of, counts, codes;
  Buffer<int64_t> wanted;
  Buffer<unsigned long long> leaders, found, starts, total;

  // Smallest values and labels of some rows or, if `subset` is null, of those from `first`.
  tiles::Argmin Argmin(const int64_t* subset, int64_t first, int64_t count) {
    const int64_t all = Tiles(count) * tiles::kTile;
    const float* from = x.data() + first * padded;
    const float* from_squares = squares.data() + first;
    if (subset != nullptr) {
      wanted.Reserve(count);
      wanted.Upload(subset, count);
      some.Reserve(all * padded);
      some_squares.Reserve(all);
      Launch("balanced k-means, rows", GatherKernel, static_cast<unsigned>(all / kWarps),
             tiles::kThreads, 0, nullptr,
             tiles::Gather{x.data(), squares.data(), wanted.data(), count, padded, some.data(),
                           some_squares.data()});
      from = some.data();
      from_squares = some_squares.data();
    }
    labels.Reserve(count);
    lows.Reserve(count);
    const tiles::Argmin body{{from, centers.data(), padded},
                             bias.data(),
                             from_squares,
                             slope,
                             offset,
                             count,
                             Tiles(centre_count),
                             labels.data(),
                             lows.data()};
    Launch("balanced k-means, argmin", ArgminKernel, static_cast<unsigned>(Tiles(count)),
           tiles::kThreads, tiles::kSharedBytes, nullptr, body);
    return body;
  }

  // All candidates, to `lists`; returns their number.
  int64_t Collect(const int64_t* subset, int64_t first, int64_t count, double threshold,
                  double reach) {
    const tiles::Argmin argmin = Argmin(subset, first, count);
    const int64_t used_groups = reach > threshold ? groups : 0;
    leaders.Reserve(count * used_groups);
    if (used_groups > 0) leaders.Fill(0xFF, count * used_groups);
    counts.Reserve(count);
    found.Reserve(count * tiles::kRoom);
    const tiles::Collect collect{
        argmin.in,       argmin.bias, argmin.squares, argmin.lows,   slope,
        offset,          threshold,   reach,          count,         argmin.centre_tiles,
        group_of.data(), used_groups, leaders.data(), counts.data(), found.data()};
    Launch("balanced k-means, candidates", CollectKernel, static_cast<unsigned>(Tiles(count)),
           tiles::kThreads, kCollectBytes, nullptr, collect);
    total.Reserve(1);
    total.Fill(0, 1);
    starts.Reserve(count);
    codes.Reserve(count * tiles::kRoom);
    values.Reserve(count * tiles::kRoom);
    Launch("balanced k-means, packing", PackKernel, static_cast<unsigned>(DivideUp(count, kWarps)),
           tiles::kThreads, 0, nullptr,
           tiles::Pack{counts.data(), found.data(), count, total.data(), starts.data(),
                       codes.data(), values.data()});
    int64_t entries = 0;
    total.Download(&entries, 1);
    Grow(lists.count, count);
    Grow(lists.start, count);
    Grow(lists.code, entries);
    Grow(lists.value, entries);
    counts.Download(lists.count.data(), count);
    starts.Download(lists.start.data(), count);
    codes.Download(lists.code.data(), entries);
    values.Download(lists.value.data(), entries);
    for (int64_t r = 0; r < count; ++r) {
      int32_t& own = lists.count[r];
      if (own > tiles::kRoom) own = -1;
    }
    return entries;
  }
};

KMeansDevice::KMeansDevice(const FloatRows& x, const std::vector<double>& mean, int device)
    : state_(std::make_unique<State>()) {
  State& s = *state_;
  const DeviceScope scope(device, "balanced k-means, device");
  s.device = device;
  s.rows = x.rows;
  s.d = x.columns;
  s.padded = RoundUp(x.columns, tiles::kDepth);
  s.mean.assign(mean.begin(), mean.end());
  // A chunk of rows may begin anywhere and ends with a whole tile.
  const int64_t all = (Tiles(x.rows) + 1) * tiles::kTile;
  s.x.Reserve(all * s.padded);
  s.squares.Reserve(all);
  s.row_squares.assign(all, 0.0f);
  std::vector<float> part;
  for (int64_t first = 0; first < all; first += kUploadRows) {
    const int64_t count = std::min(kUploadRows, all - first);
    part.assign(count * s.padded, 0.0f);
    for (int64_t r = 0; r < count && first + r < x.rows; ++r) {
      const float* const source = x.data + (first + r) * x.stride;
      double square = 0;
      for (int64_t j = 0; j < s.d; ++j) {
        const float value = source[j] - s.mean[j];
        part[r * s.padded + j] = value;
        square += static_cast<double>(value) * static_cast<double>(value);
      }
      s.row_squares[first + r] = static_cast<float>(square);
    }
    s.x.Upload(part, first * s.padded);
  }
  s.squares.Upload(s.row_squares);
  AllowShared("balanced k-means, argmin", ArgminKernel, tiles::kSharedBytes);
  AllowShared("balanced k-means, candidates", CollectKernel, kCollectBytes);
}

KMeansDevice::~KMeansDevice() = default;

void KMeansDevice::SetCenters(const float* centers, int64_t count,
                              const std::vector<int32_t>& group_offset) {
  State& s = *state_;
  const DeviceScope scope(s.device, "balanced k-means, device");
  const int64_t all = Tiles(count) * tiles::kTile;
  s.centre_rows.assign(all * s.padded, 0.0f);
  s.centre_count = count;
  s.centre_squares.assign(count, 0.0);
  s.largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    double square = 0;
    for (int64_t j = 0; j < s.d; ++j) {
      // From what the items were moved by: float32.
      const double value =
          static_cast<double>(centers[k * s.d + j]) - static_cast<double>(s.mean[j]);
      square += value * value;
      s.centre_rows[k * s.padded + j] = static_cast<float>(value);
    }
    s.centre_squares[k] = square;
    s.largest = std::max(s.largest, std::sqrt(square));
  }
  s.centers.Reserve(all * s.padded);
  s.bias.Reserve(all);
  s.centers.Upload(s.centre_rows);
  s.groups = std::max<int64_t>(1, static_cast<int64_t>(group_offset.size())) - 1;
  std::vector<int32_t> group_of(all);
  for (int64_t g = 0; g < s.groups; ++g) {
    const size_t at = g;
    std::fill(group_of.begin() + group_offset[at], group_of.begin() + group_offset[at + 1],
              static_cast<int32_t>(g));
  }
  s.group_of.Reserve(all);
  s.group_of.Upload(group_of);
}

void KMeansDevice::SetPrices(const double* prices) {
  State& s = *state_;
  const DeviceScope scope(s.device, "balanced k-means, device");
  std::vector<float> bias(Tiles(s.centre_count) * tiles::kTile, tiles::kPadding);
  double most = 0;
  for (int64_t k = 0; k < s.centre_count; ++k) {
    const double value = s.centre_squares[k] + (prices != nullptr ? prices[k] : 0.0);
    bias[k] = static_cast<float>(value);
    most = std::max(most, std::abs(value));
  }
  s.bias.Upload(bias);
  // Twice a product, of operands that were rounded to float32.
  s.slope = static_cast<float>(2.02 * s.largest * tiles::ProductError(s.padded));
  s.offset = static_cast<float>(most * 0x1p-21);
}

float KMeansDevice::Error(int64_t item) const {
  const State& s = *state_;
  return s.slope * std::sqrt(s.row_squares[item]) + s.offset;
}

void KMeansDevice::Argmin(int32_t* labels) {
  State& s = *state_;
  const DeviceScope scope(s.device, "balanced k-means, device");
  s.Argmin(nullptr, 0, s.rows);
  s.labels.Download(labels, s.rows);
}

const KMeansDevice::Lists& KMeansDevice::Candidates(const int64_t* subset, int64_t first,
                                                    int64_t count, double threshold, double reach) {
  State& s = *state_;
  const DeviceScope scope(s.device, "balanced k-means, device");
  if (threshold > 0 || reach > 0) {
    s.Collect(subset, first, count, threshold, reach);
    return s.lists;
  }
  // Nearly every row has one, which the argmin knows.
  Lists& one = s.one;
  Grow(one.count, count);
  Grow(one.start, count);
  Grow(one.code, count);
  Grow(one.value, count);
  s.Argmin(subset, first, count);
  s.labels.Download(one.code.data(), count);
  s.lows.Download(one.value.data(), count);
  std::vector<int64_t> open;
  for (int64_t r = 0; r < count; ++r) {
    const size_t row = r;
    one.count[row] = 1;
    one.start[row] = row;
    if (one.code[row] < 0) open.push_back(r);
  }
  if (open.empty()) return one;
  std::vector<int64_t> items;
  for (const int64_t r : open) items.push_back(subset != nullptr ? subset[r] : first + r);
  const auto total = s.Collect(items.data(), 0, static_cast<int64_t>(items.size()), 0, 0);
  const size_t behind = count;
  Grow(one.code, behind + total);
  Grow(one.value, behind + total);
  std::copy_n(s.lists.code.begin(), total, one.code.begin() + count);
  std::copy_n(s.lists.value.begin(), total, one.value.begin() + count);
  for (size_t t = 0; t < open.size(); ++t) {
    one.count[open[t]] = s.lists.count[t];
    one.start[open[t]] = behind + s.lists.start[t];
  }
  return one;
}

}  // namespace onerec
