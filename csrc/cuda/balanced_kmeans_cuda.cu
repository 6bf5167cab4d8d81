// Balanced k-means on a CUDA device: launches of the kernels of balanced_kmeans_tiles.h.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/balanced_kmeans_device.h"
#include "cpu/balanced_kmeans_solver.h"
#include "cuda/balanced_kmeans_tiles.h"
#include "cuda/check.h"
#include "cuda/device.h"

namespace onerec {
namespace {

constexpr int64_t kUploadRows = 65536;
constexpr int64_t kSlices = 64;  // parts of the items that blocks of column sums walk over

__global__ void __launch_bounds__(tiles::kThreads) ArgminKernel(tiles::Argmin body) {
  body(blockIdx.x, DynamicShared<float>());
}

__global__ void __launch_bounds__(tiles::kThreads) RowPotentialsKernel(tiles::RowPotentials body) {
  body(blockIdx.x, DynamicShared<float>());
}

__global__ void __launch_bounds__(tiles::kThreads)
    ColumnSumsKernel(tiles::ColumnSums body, int64_t item_tiles) {
  const int64_t slice = blockIdx.y, slices = gridDim.y;
  body(blockIdx.x, slice * item_tiles / slices, (slice + 1) * item_tiles / slices,
       DynamicShared<float>());
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
  void Upload(const std::vector<T>& values, int64_t at = 0) {
    CheckCuda(
        cudaMemcpy(data_ + at, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
        "balanced k-means, copy to the device");
  }
  void Download(std::vector<T>& values) const {
    CheckCuda(cudaMemcpy(values.data(), data_, values.size() * sizeof(T), cudaMemcpyDeviceToHost),
              "balanced k-means, copy from the device");
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
  double largest = 0;  // norm of the longest centre, from the mean
  std::vector<double> mean;
  std::vector<int64_t> order;  // item of each row on the device
  std::vector<double> centre_squares;
  Buffer<float> x, squares, centers, bias, potentials;
  Buffer<int32_t> labels;
  Buffer<unsigned long long> sums;

  // |c_k|^2 + price for every centre, padded; returns the largest that there is.
  double SetBias(const double* prices) {
    std::vector<float> values(static_cast<size_t>(Tiles(centre_count) * tiles::kTile),
                              tiles::kPadding);
    double most = 0;
    for (int64_t k = 0; k < centre_count; ++k) {
      const double value = centre_squares[static_cast<size_t>(k)] + prices[k];
      values[static_cast<size_t>(k)] = static_cast<float>(value);
      most = std::max(most, std::abs(value));
    }
    bias.Upload(values);
    return most;
  }
};

KMeansDevice::KMeansDevice(const FloatRows& x, const std::vector<double>& mean, uint64_t seed,
                           int device)
    : state_(std::make_unique<State>()) {
  State& s = *state_;
  CheckCuda(cudaSetDevice(device), "balanced k-means, device");
  s.device = device;
  s.rows = x.rows;
  s.d = x.columns;
  s.padded = (x.columns + tiles::kDepth - 1) / tiles::kDepth * tiles::kDepth;
  s.mean = mean;
  s.order = DrawRows(x.rows, x.rows, seed ^ 0x2C9);
  const int64_t all = Tiles(x.rows) * tiles::kTile;
  s.x.Reserve(all * s.padded);
  s.squares.Reserve(all);
  s.potentials.Reserve(all);
  s.labels.Reserve(all);
  std::vector<float> part;
  std::vector<float> squares;
  for (int64_t first = 0; first < all; first += kUploadRows) {
    const int64_t count = std::min(kUploadRows, all - first);
    part.assign(static_cast<size_t>(count * s.padded), 0.0f);
    squares.assign(static_cast<size_t>(count), 0.0f);
    for (int64_t r = 0; r < count && first + r < x.rows; ++r) {
      const float* const source = x.data + s.order[static_cast<size_t>(first + r)] * x.stride;
      double square = 0;
      for (int64_t j = 0; j < s.d; ++j) {
        const float value = source[j] - static_cast<float>(mean[static_cast<size_t>(j)]);
        part[static_cast<size_t>(r * s.padded + j)] = value;
        square += static_cast<double>(value) * static_cast<double>(value);
      }
      squares[static_cast<size_t>(r)] = static_cast<float>(square);
    }
    s.x.Upload(part, first * s.padded);
    s.squares.Upload(squares, first);
  }
  AllowShared("balanced k-means, argmin", ArgminKernel, tiles::kSharedBytes);
  AllowShared("balanced k-means, row potentials", RowPotentialsKernel, tiles::kSharedBytes);
  AllowShared("balanced k-means, column sums", ColumnSumsKernel, tiles::kSharedBytes);
}

KMeansDevice::~KMeansDevice() = default;

void KMeansDevice::SetCenters(const float* centers, int64_t count) {
  State& s = *state_;
  CheckCuda(cudaSetDevice(s.device), "balanced k-means, device");
  const int64_t all = Tiles(count) * tiles::kTile;
  std::vector<float> rows(static_cast<size_t>(all * s.padded), 0.0f);
  s.centre_count = count;
  s.centre_squares.assign(static_cast<size_t>(count), 0.0);
  s.largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    double square = 0;
    for (int64_t j = 0; j < s.d; ++j) {
      const double value =
          static_cast<double>(centers[k * s.d + j]) - s.mean[static_cast<size_t>(j)];
      square += value * value;
      rows[static_cast<size_t>(k * s.padded + j)] = static_cast<float>(value);
    }
    s.centre_squares[static_cast<size_t>(k)] = square;
    s.largest = std::max(s.largest, std::sqrt(square));
  }
  s.centers.Reserve(all * s.padded);
  s.bias.Reserve(all);
  s.sums.Reserve(all);
  s.centers.Upload(rows);
}

void KMeansDevice::Argmin(const double* prices, int32_t* labels) {
  State& s = *state_;
  CheckCuda(cudaSetDevice(s.device), "balanced k-means, device");
  const double most = s.SetBias(prices);
  const tiles::Argmin body{{s.x.data(), s.centers.data(), s.padded},
                           s.bias.data(),
                           s.squares.data(),
                           // Twice a product, of operands that were rounded to float32.
                           static_cast<float>(2.02 * s.largest * tiles::ProductError(s.padded)),
                           static_cast<float>(most * 0x1p-21),
                           s.rows,
                           Tiles(s.centre_count),
                           s.labels.data()};
  Launch("balanced k-means, argmin", ArgminKernel, static_cast<unsigned>(Tiles(s.rows)),
         tiles::kThreads, tiles::kSharedBytes, nullptr, body);
  std::vector<int32_t> found(static_cast<size_t>(s.rows));
  s.labels.Download(found);
  for (int64_t r = 0; r < s.rows; ++r) {
    labels[s.order[static_cast<size_t>(r)]] = found[static_cast<size_t>(r)];
  }
}

void KMeansDevice::ColumnSums(int64_t rows, double eps, const double* prices, double* sums) {
  State& s = *state_;
  CheckCuda(cudaSetDevice(s.device), "balanced k-means, device");
  s.SetBias(prices);
  const auto scale = static_cast<float>(1.4426950408889634 / eps);
  const int64_t item_tiles = Tiles(rows);
  const int64_t centre_tiles = Tiles(s.centre_count);
  CheckCuda(cudaMemset(s.sums.data(), 0,
                       static_cast<size_t>(centre_tiles * tiles::kTile) * sizeof(uint64_t)),
            "balanced k-means, column sums");
  const tiles::RowPotentials row_potentials{{s.x.data(), s.centers.data(), s.padded},
                                            s.bias.data(),
                                            scale,
                                            rows,
                                            centre_tiles,
                                            s.potentials.data()};
  Launch("balanced k-means, row potentials", RowPotentialsKernel, static_cast<unsigned>(item_tiles),
         tiles::kThreads, tiles::kSharedBytes, nullptr, row_potentials);
  const tiles::ColumnSums column_sums{{s.centers.data(), s.x.data(), s.padded},
                                      s.bias.data(),
                                      s.potentials.data(),
                                      scale,
                                      s.sums.data()};
  const dim3 grid(static_cast<unsigned>(centre_tiles),
                  static_cast<unsigned>(std::min(kSlices, item_tiles)));
  Launch("balanced k-means, column sums", ColumnSumsKernel, grid, tiles::kThreads,
         tiles::kSharedBytes, nullptr, column_sums, item_tiles);
  std::vector<unsigned long long> units(static_cast<size_t>(s.centre_count));
  s.sums.Download(units);
  for (int64_t k = 0; k < s.centre_count; ++k) {
    sums[k] = static_cast<double>(units[static_cast<size_t>(k)]) /
              static_cast<double>(tiles::kShareUnits);
  }
}

}  // namespace onerec
