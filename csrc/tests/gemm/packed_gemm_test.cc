#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "gemm/tile.h"
#include "tests/each_isa.h"

namespace onerec {
namespace {

struct Case {
  int64_t m, n, k;
};

using PackedGemmTest = EachIsa;

TEST_P(PackedGemmTest, IsTheProductAndARowsResultIsItsOwn) {
  for (const Case& c :
       {Case{1, 1, 1}, Case{5, 17, 3}, Case{7, 64, 31}, Case{100, 100, 33}, Case{13, 145, 128}}) {
    const std::vector<float> x = Normal(c.m * c.k, 1), w = Normal(c.n * c.k, 2);
    for (WeightType type : {WeightType::kFloat32, WeightType::kBFloat16}) {
      std::vector<char> bytes(PackedBytes(c.n, c.k, type));
      PackWeights(w.data(), c.n, c.k, c.k, type, bytes.data(), 2);
      const PackedMatrix packed{bytes.data(), type, c.n, c.k};
      std::vector<float> y(c.m * c.n, 1.0f);
      PackedGemm(x.data(), c.m, c.k, packed, y.data(), c.n, /*add=*/true, 2);
      const double unit = type == WeightType::kFloat32 ? 1e-6 : 5e-3;
      for (int64_t r = 0; r < c.m; ++r) {
        for (int64_t j = 0; j < c.n; ++j) {
          double sum = 1.0, size = 1.0;
          for (int64_t i = 0; i < c.k; ++i) {
            const double product =
                static_cast<double>(x[r * c.k + i]) * static_cast<double>(w[j * c.k + i]);
            sum += product;
            size += std::abs(product);
          }
          ASSERT_NEAR(y[r * c.n + j], sum, unit * size);
        }
      }
      std::vector<float> alone(c.n, 1.0f);
      const int64_t last = c.m - 1;
      PackedGemm(&x[last * c.k], 1, c.k, packed, alone.data(), c.n, true, 1);
      for (int64_t j = 0; j < c.n; ++j) {
        ASSERT_EQ(alone[j], y[last * c.n + j]);
      }
    }
  }
}

TEST_P(PackedGemmTest, ATileTakesTheRowsAndPanelsThatItIsTold) {
  constexpr int64_t kM = 9, kN = 80, kK = 21;
  const std::vector<float> x = Normal(kM * kK, 3), w = Normal(kN * kK, 4);
  std::vector<char> bytes(PackedBytes(kN, kK, WeightType::kFloat32));
  PackWeights(w.data(), kN, kK, kK, WeightType::kFloat32, bytes.data(), 1);
  const PackedMatrix packed{bytes.data(), WeightType::kFloat32, kN, kK};
  std::vector<float> whole(kM * kN);
  PackedGemm(x.data(), kM, kK, packed, whole.data(), kN, false, 1);

  const std::vector<int32_t> rows = {8, 0, 8, 3, 5, 1, 2}, panels = {4, 1, 4};
  std::vector<float> y(rows.size() * 40, -1.0f);
  GemmTile tile = TileOf(packed, 0, 5);
  tile.x = x.data();
  tile.x_stride = kK;
  tile.rows = rows.data();
  tile.m = static_cast<int64_t>(rows.size());
  tile.panels = panels.data();
  tile.n = 40;  // the third panel gives its first 8 columns
  tile.y = y.data();
  tile.y_stride = 40;
  CurrentGemm()(tile);
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t j = 0; j < 40; ++j) {
      const auto column = panels[j / 16] * 16 + j % 16;
      ASSERT_EQ(y[r * 40 + j], whole[rows[r] * kN + column]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, PackedGemmTest, ::testing::ValuesIn(kIsas),
                         [](const auto& info) { return IsaName(info.param); });

}  // namespace
}  // namespace onerec
