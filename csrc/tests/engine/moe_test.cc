#include "onerec/moe.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "tests/each_isa.h"

namespace onerec {
namespace {

constexpr int64_t kTokens = 230, kSlots = 2, kExperts = 3, kWidth = 19, kHidden = 70;

std::vector<char> Pack(const std::vector<float>& w, int64_t n, int64_t k) {
  const int64_t bytes = PackedBytes(n, k, WeightType::kFloat32);
  std::vector<char> packed(kExperts * bytes);
  for (int64_t e = 0; e < kExperts; ++e) {
    PackWeights(&w[e * n * k], n, k, k, WeightType::kFloat32, &packed[e * bytes], 2);
  }
  return packed;
}

using MoeTest = EachIsa;

TEST_P(MoeTest, IsTheSumOverChosenExperts) {
  const std::vector<float> x = Normal(kTokens * kWidth, 1, 0.3f);
  const std::vector<float> gate = Normal(kExperts * kHidden * kWidth, 2, 0.3f);
  const std::vector<float> up = Normal(kExperts * kHidden * kWidth, 3, 0.3f);
  const std::vector<float> down = Normal(kExperts * kWidth * kHidden, 4, 0.3f);
  const std::vector<float> gates = Normal(kTokens * kSlots, 5, 0.3f);
  // Experts 4 to 6 are here; 3 and 7 are not.
  std::vector<int64_t> ids(kTokens * kSlots);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = 3 + static_cast<int64_t>(i * 7 / 3 % 5);
  const std::vector<char> packed[] = {Pack(gate, kHidden, kWidth), Pack(up, kHidden, kWidth),
                                      Pack(down, kWidth, kHidden)};
  PackedExperts experts;
  experts.gate = packed[0].data();
  experts.up = packed[1].data();
  experts.down = packed[2].data();
  experts.count = kExperts;
  experts.width = kWidth;
  experts.hidden = kHidden;
  experts.first = 4;
  std::vector<float> results[2];
  for (int threads = 1; threads <= 2; ++threads) {
    std::vector<float>& y = results[threads - 1];
    y.resize(kTokens * kWidth);
    const int64_t bytes = MoeWorkspaceBytes(kTokens, kSlots, experts);
    void* const workspace = ::operator new(bytes, std::align_val_t{64});
    MoeForward(x.data(), kTokens, kWidth, ids.data(), gates.data(), kSlots, experts, workspace,
               y.data(), kWidth, false, threads);
    ::operator delete(workspace, std::align_val_t{64});
  }
  EXPECT_EQ(results[0], results[1]);
  for (int64_t t = 0; t < kTokens; ++t) {
    std::vector<double> want(kWidth);
    for (int64_t i = t * kSlots; i < (t + 1) * kSlots; ++i) {
      const int64_t e = ids[i] - experts.first;
      if (e < 0 || e >= kExperts) continue;
      for (int64_t h = 0; h < kHidden; ++h) {
        double a = 0.0, b = 0.0;
        for (int64_t d = 0; d < kWidth; ++d) {
          const size_t at = (e * kHidden + h) * kWidth + d;
          const double value = static_cast<double>(x[t * kWidth + d]);
          a += value * static_cast<double>(gate[at]);
          b += value * static_cast<double>(up[at]);
        }
        const double active = a / (1.0 + std::exp(-a)) * b * static_cast<double>(gates[i]);
        for (int64_t d = 0; d < kWidth; ++d) {
          want[d] += active * static_cast<double>(down[(e * kWidth + d) * kHidden + h]);
        }
      }
    }
    for (int64_t d = 0; d < kWidth; ++d) {
      ASSERT_NEAR(results[0][t * kWidth + d], want[d], 2e-5);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllIsas, MoeTest, ::testing::ValuesIn(kIsas));

}  // namespace
}  // namespace onerec
