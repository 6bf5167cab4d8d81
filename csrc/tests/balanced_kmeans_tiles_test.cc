// Runs the kernel bodies of balanced k-means on the host: a block is one host thread per device
// thread, and what only a device has stands in below, after the PTX manual. So the tiles, the
// fragments' layouts and the reductions are checked on machines without a GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#define __device__

namespace onerec::tiles {
namespace {

// A block's barriers, and what a warp's lanes exchange.
struct Block {
  explicit Block(int threads) : all(threads) {
    for (int warp = 0; warp < threads / 32; ++warp) {
      warps.push_back(std::make_unique<std::barrier<>>(32));
    }
    exchange.resize(static_cast<size_t>(threads) * 6);
  }
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<uint64_t> exchange;  // six numbers a thread
};

struct Index {
  unsigned x;
};
thread_local Index threadIdx;
thread_local Block* block;

void __syncthreads() { block->all.arrive_and_wait(); }
void SyncWarp() { block->warps[threadIdx.x / 32]->arrive_and_wait(); }
uint64_t* Given(unsigned lane) {
  return block->exchange.data() + static_cast<size_t>(threadIdx.x / 32 * 32 + lane) * 6;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  std::memcpy(Given(threadIdx.x % 32), &value, sizeof(T));
  SyncWarp();
  T other;
  std::memcpy(&other, Given((threadIdx.x % 32) ^ static_cast<unsigned>(mask)), sizeof(T));
  SyncWarp();
  return other;
}

float AsFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
// Ten bits of mantissa, to nearest, halves away from zero.
uint32_t ToTf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return (bits + 0x1000u) & ~0x1FFFu;
}
void CopyAsync(float* target, const float* source) { std::memcpy(target, source, 16); }
void WaitCopies() {}
void atomicAdd(unsigned long long* target, unsigned long long value) {
  std::atomic_ref<unsigned long long>(*target).fetch_add(value);
}
float exp2f(float x) { return std::exp2(x); }
float log2f(float x) { return std::log2(x); }
float sqrtf(float x) { return std::sqrt(x); }

// mma.m16n8k8, tf32: with g = lane / 4 and t = lane % 4, a lane gives a(g + 8 (e % 2), t + 4 (e /
// 2)) and b(t + 4 e, g), and has c(g + 8 (e / 2), 2 t + e % 2).
void Mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned lane = threadIdx.x % 32;
  for (int e = 0; e < 4; ++e) Given(lane)[e] = a[e];
  for (int e = 0; e < 2; ++e) Given(lane)[4 + e] = b[e];
  SyncWarp();
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
    for (unsigned k = 0; k < 8; ++k) {
      const uint64_t left = Given(row % 8 * 4 + k % 4)[row / 8 + 2 * (k / 4)];
      const uint64_t right = Given(column * 4 + k % 4)[4 + k / 4];
      c[e] += AsFloat(static_cast<uint32_t>(left)) * AsFloat(static_cast<uint32_t>(right));
    }
  }
  SyncWarp();
}

}  // namespace
}  // namespace onerec::tiles

#include "cuda/balanced_kmeans_tiles.h"

namespace onerec::tiles {
namespace {

template <class Body>
void RunBlock(const Body& body) {
  Block shared_block(kThreads);
  std::vector<float> shared(kSharedBytes / sizeof(float), std::nanf(""));
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      threadIdx.x = t;
      block = &shared_block;
      body(shared.data());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// 190 items and 200 centres of 40 dimensions, padded to whole tiles.
struct Data {
  static constexpr int64_t kItems = 190, kCentres = 200, kWide = 40, kPadded = 64;
  std::vector<float> x = std::vector<float>(256 * kPadded);
  std::vector<float> centers = std::vector<float>(256 * kPadded);
  std::vector<float> bias = std::vector<float>(256, kPadding);
  std::vector<float> squares = std::vector<float>(256);

  Data() {
    std::mt19937 draw(0);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < kItems; ++i) {
      for (int64_t j = 0; j < kWide; ++j) {
        float& value = x[static_cast<size_t>(i * kPadded + j)] = normal(draw);
        squares[static_cast<size_t>(i)] += value * value;
      }
    }
    for (int64_t k = 0; k < kCentres; ++k) {
      float square = 0;
      for (int64_t j = 0; j < kWide; ++j) {
        float& value = centers[static_cast<size_t>(k * kPadded + j)] = normal(draw);
        square += value * value;
      }
      bias[static_cast<size_t>(k)] = square + normal(draw);
    }
    // Two centres that no precision tells apart, near item 5.
    for (const int64_t k : {17, 150}) {
      std::copy_n(x.begin() + 5 * kPadded, kPadded, centers.begin() + k * kPadded);
      bias[static_cast<size_t>(k)] = squares[5];
    }
  }

  double Value(int64_t item, int64_t centre) const {
    double product = 0;
    for (int64_t j = 0; j < kPadded; ++j) {
      product += static_cast<double>(x[static_cast<size_t>(item * kPadded + j)]) *
                 static_cast<double>(centers[static_cast<size_t>(centre * kPadded + j)]);
    }
    return static_cast<double>(bias[static_cast<size_t>(centre)]) - 2 * product;
  }
  std::vector<double> Values(int64_t item) const {
    std::vector<double> values;
    for (int64_t k = 0; k < kCentres; ++k) values.push_back(Value(item, k));
    return values;
  }
};

TEST(BalancedKMeansTiles, ArgminIsRightOrLeftOpen) {
  const Data data;
  std::vector<int32_t> labels(256, -7);
  const auto slope = static_cast<float>(2 * std::sqrt(40.0) * ProductError(Data::kPadded));
  const Argmin body{{data.x.data(), data.centers.data(), Data::kPadded},
                    data.bias.data(),
                    data.squares.data(),
                    slope,
                    1e-5f,
                    Data::kItems,
                    2,
                    labels.data()};
  for (const int64_t tile : {0, 1}) RunBlock([&](float* shared) { body(tile, shared); });
  int open = 0;
  for (int64_t i = 0; i < Data::kItems; ++i) {
    const std::vector<double> values = data.Values(i);
    const auto best = std::min_element(values.begin(), values.end());
    const int32_t label = labels[static_cast<size_t>(i)];
    open += label == -1;
    if (label != -1) {
      EXPECT_EQ(label, best - values.begin()) << i;
    }
  }
  EXPECT_EQ(labels[5], -1);
  EXPECT_LE(open, 5);
  EXPECT_EQ(labels[Data::kItems], -7);
}

TEST(BalancedKMeansTiles, SoftSumsAreThoseOfTheEntropicDual) {
  const Data data;
  const double eps = 3;
  const auto scale = static_cast<float>(1 / (eps * std::log(2.0)));
  std::vector<float> potentials(256, std::nanf(""));
  std::vector<unsigned long long> sums(256);
  const RowPotentials rows{{data.x.data(), data.centers.data(), Data::kPadded},
                           data.bias.data(),
                           scale,
                           Data::kItems,
                           2,
                           potentials.data()};
  const ColumnSums columns{{data.centers.data(), data.x.data(), Data::kPadded},
                           data.bias.data(),
                           potentials.data(),
                           scale,
                           sums.data()};
  for (const int64_t tile : {0, 1}) RunBlock([&](float* shared) { rows(tile, shared); });
  for (const int64_t tile : {0, 1}) {
    for (const int64_t part : {0, 1}) {
      RunBlock([&](float* shared) { columns(tile, part, part + 1, shared); });
    }
  }
  std::vector<double> wanted(256);
  for (int64_t i = 0; i < Data::kItems; ++i) {
    const std::vector<double> values = data.Values(i);
    double sum = 0;
    for (const double value : values) sum += std::exp(-value / eps);
    EXPECT_NEAR(potentials[static_cast<size_t>(i)], -eps * std::log(sum), 0.05) << i;
    for (size_t k = 0; k < values.size(); ++k) wanted[k] += std::exp(-values[k] / eps) / sum;
  }
  for (size_t k = 0; k < wanted.size(); ++k) {
    EXPECT_NEAR(static_cast<double>(sums[k]) / kShareUnits, wanted[k], 0.02 * wanted[k] + 1e-4)
        << k;
  }
}

}  // namespace
}  // namespace onerec::tiles
