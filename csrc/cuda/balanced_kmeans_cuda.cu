// Balanced k-means on a CUDA device: launches of the kernels of balanced_kmeans_tiles.h.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/balanced_kmeans_device.h"
#include "cuda/balanced_kmeans_tiles.h"
#include "cuda/check.h"
#include "cuda/device.h"

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
    CheckCuda(cudaMalloc(reinterpret_cast<void**>(&data_), static_cast<size_t>(count) * sizeof(T)),
              "balanced k-means, device memory");
    count_ = count;
  }
  void Upload(const T* values, int64_t count, int64_t at = 0) {
    CheckCuda(cudaMemcpy(data_ + at, values, static_cast<size_t>(count) * sizeof(T),
                         cudaMemcpyHostToDevice),
              "balanced k-means, copy to the device");
  }
  void Upload(const std::vector<T>& values, int64_t at = 0) {
    Upload(values.data(), static_cast<int64_t>(values.size()), at);
  }
  template <class U>
  void Download(U* values, int64_t count) const {
    static_assert(sizeof(U) == sizeof(T));
    CheckCuda(
        cudaMemcpy(values, data_, static_cast<size_t>(count) * sizeof(T), cudaMemcpyDeviceToHost),
        "balanced k-means, copy from the device");
  }
  void Fill(int byte, int64_t count) {
    CheckCuda(cudaMemset(data_, byte, static_cast<size_t>(count) * sizeof(T)),
              "balanced k-means, device memory");
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

int64_t Tiles(int64_t rows) { return (rows + tiles::kTile - 1) / tiles::kTile; }

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
  Lists lists;
  Buffer<float> x, squares, centers, bias, lows, some, some_squares, values;
  Buffer<int32_t> labels, group_of, counts, codes;
  Buffer<int64_t> subset;
  Buffer<unsigned long long> leaders, found, starts, total;

  tiles::Argmin ArgminOf(const float* from, const float* from_squares, int64_t count) {
    labels.Reserve(count);
    lows.Reserve(count);
    return {{from, centers.data(), padded},
            bias.data(),
            from_squares,
            slope,
            offset,
            count,
            Tiles(centre_count),
            labels.data(),
            lows.data()};
  }
};

KMeansDevice::KMeansDevice(const FloatRows& x, const std::vector<double>& mean, int device)
    : state_(std::make_unique<State>()) {
  State& s = *state_;
  CheckCuda(cudaSetDevice(device), "balanced k-means, device");
  s.device = device;
  s.rows = x.rows;
  s.d = x.columns;
  s.padded = (x.columns + tiles::kDepth - 1) / tiles::kDepth * tiles::kDepth;
  s.mean.assign(mean.begin(), mean.end());
  // A chunk of rows may begin anywhere and ends with a whole tile.
  const int64_t all = (Tiles(x.rows) + 1) * tiles::kTile;
  s.x.Reserve(all * s.padded);
  s.squares.Reserve(all);
  s.row_squares.assign(static_cast<size_t>(all), 0.0f);
  std::vector<float> part;
  for (int64_t first = 0; first < all; first += kUploadRows) {
    const int64_t count = std::min(kUploadRows, all - first);
    part.assign(static_cast<size_t>(count * s.padded), 0.0f);
    for (int64_t r = 0; r < count && first + r < x.rows; ++r) {
      const float* const source = x.data + (first + r) * x.stride;
      double square = 0;
      for (int64_t j = 0; j < s.d; ++j) {
        const float value = source[j] - s.mean[static_cast<size_t>(j)];
        part[static_cast<size_t>(r * s.padded + j)] = value;
        square += static_cast<double>(value) * static_cast<double>(value);
      }
      s.row_squares[static_cast<size_t>(first + r)] = static_cast<float>(square);
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
  CheckCuda(cudaSetDevice(s.device), "balanced k-means, device");
  const int64_t all = Tiles(count) * tiles::kTile;
  s.centre_rows.assign(static_cast<size_t>(all * s.padded), 0.0f);
  s.centre_count = count;
  s.centre_squares.assign(static_cast<size_t>(count), 0.0);
  s.largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    double square = 0;
    for (int64_t j = 0; j < s.d; ++j) {
      // From what the items were moved by: float32.
      const double value = static_cast<double>(centers[k * s.d + j]) -
                           static_cast<double>(s.mean[static_cast<size_t>(j)]);
      square += value * value;
      s.centre_rows[static_cast<size_t>(k * s.padded + j)] = static_cast<float>(value);
    }
    s.centre_squares[static_cast<size_t>(k)] = square;
    s.largest = std::max(s.largest, std::sqrt(square));
  }
  s.centers.Reserve(all * s.padded);
  s.bias.Reserve(all);
  s.centers.Upload(s.centre_rows);
  s.groups = std::max<int64_t>(1, static_cast<int64_t>(group_offset.size())) - 1;
  std::vector<int32_t> group_of(static_cast<size_t>(all));
  for (int64_t g = 0; g < s.groups; ++g) {
    const auto at = static_cast<size_t>(g);
    std::fill(group_of.begin() + group_offset[at], group_of.begin() + group_offset[at + 1],
              static_cast<int32_t>(g));
  }
  s.group_of.Reserve(all);
  s.group_of.Upload(group_of);
}

void KMeansDevice::SetPrices(const double* prices) {
  State& s = *state_;
  CheckCuda(cudaSetDevice(s.device), "balanced k-means, device");
  std::vector<float> bias(static_cast<size_t>(Tiles(s.centre_count) * tiles::kTile),
                          tiles::kPadding);
  double most = 0;
  for (int64_t k = 0; k < s.centre_count; ++k) {
    const double value =
        s.centre_squares[static_cast<size_t>(k)] + (prices != nullptr ? prices[k] : 0.0);
    bias[static_cast<size_t>(k)] = static_cast<float>(value);
    most = std::max(most, std::abs(value));
  }
  s.bias.Upload(bias);
  // Twice a product, of operands that were rounded to float32.
  s.slope = static_cast<float>(2.02 * s.largest * tiles::ProductError(s.padded));
  s.offset = static_cast<float>(most * 0x1p-21);
}

float KMeansDevice::Error(int64_t item) const {
  const State& s = *state_;
  return s.slope * std::sqrt(s.row_squares[static_cast<size_t>(item)]) + s.offset;
}

void KMeansDevice::Argmin(int32_t* labels) {
  State& s = *state_;
  CheckCuda(cudaSetDevice(s.device), "balanced k-means, device");
  Launch("balanced k-means, argmin", ArgminKernel, static_cast<unsigned>(Tiles(s.rows)),
         tiles::kThreads, tiles::kSharedBytes, nullptr,
         s.ArgminOf(s.x.data(), s.squares.data(), s.rows));
  s.labels.Download(labels, s.rows);
}

const KMeansDevice::Lists& KMeansDevice::Candidates(const int64_t* subset, int64_t first,
                                                    int64_t count, double threshold, double reach) {
  State& s = *state_;
  CheckCuda(cudaSetDevice(s.device), "balanced k-means, device");
  const auto row_tiles = static_cast<unsigned>(Tiles(count));
  const int64_t all = Tiles(count) * tiles::kTile;
  const float* x = s.x.data() + first * s.padded;
  const float* squares = s.squares.data() + first;
  if (subset != nullptr) {
    s.subset.Reserve(count);
    s.subset.Upload(subset, count);
    s.some.Reserve(all * s.padded);
    s.some_squares.Reserve(all);
    Launch("balanced k-means, rows", GatherKernel, static_cast<unsigned>(all / kWarps),
           tiles::kThreads, 0, nullptr,
           tiles::Gather{s.x.data(), s.squares.data(), s.subset.data(), count, s.padded,
                         s.some.data(), s.some_squares.data()});
    x = s.some.data();
    squares = s.some_squares.data();
  }
  const tiles::Argmin argmin = s.ArgminOf(x, squares, count);
  Launch("balanced k-means, argmin", ArgminKernel, row_tiles, tiles::kThreads, tiles::kSharedBytes,
         nullptr, argmin);
  const int64_t groups = reach > threshold ? s.groups : 0;
  s.leaders.Reserve(count * groups);
  if (groups > 0) s.leaders.Fill(0xFF, count * groups);
  s.counts.Reserve(count);
  s.found.Reserve(count * tiles::kRoom);
  const tiles::Collect collect{argmin.in,
                               s.bias.data(),
                               squares,
                               s.lows.data(),
                               s.slope,
                               s.offset,
                               threshold,
                               reach,
                               count,
                               argmin.centre_tiles,
                               s.group_of.data(),
                               groups,
                               s.leaders.data(),
                               s.counts.data(),
                               s.found.data()};
  Launch("balanced k-means, candidates", CollectKernel, row_tiles, tiles::kThreads, kCollectBytes,
         nullptr, collect);
  s.total.Reserve(1);
  s.total.Fill(0, 1);
  s.starts.Reserve(count);
  s.codes.Reserve(count * tiles::kRoom);
  s.values.Reserve(count * tiles::kRoom);
  Launch("balanced k-means, packing", PackKernel,
         static_cast<unsigned>((count + kWarps - 1) / kWarps), tiles::kThreads, 0, nullptr,
         tiles::Pack{s.counts.data(), s.found.data(), count, s.total.data(), s.starts.data(),
                     s.codes.data(), s.values.data()});
  uint64_t total = 0;
  s.total.Download(&total, 1);
  Lists& lists = s.lists;
  const auto resize = [](auto& values, auto size) {
    if (values.size() < static_cast<size_t>(size)) values.resize(static_cast<size_t>(size));
  };
  resize(lists.count, count);
  resize(lists.start, count);
  resize(lists.code, total);
  resize(lists.value, total);
  s.counts.Download(lists.count.data(), count);
  s.starts.Download(lists.start.data(), count);
  s.codes.Download(lists.code.data(), static_cast<int64_t>(total));
  s.values.Download(lists.value.data(), static_cast<int64_t>(total));
  for (int64_t r = 0; r < count; ++r) {
    int32_t& own = lists.count[static_cast<size_t>(r)];
    if (own > tiles::kRoom) own = -1;
  }
  return lists;
}

}  // namespace onerec
