// A fixture that runs a test on each instruction set, and random matrices.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <vector>

#include "onerec/runtime.h"

namespace onerec {

// For INSTANTIATE_TEST_SUITE_P over 0, 1, 2: the values of Isa.
class EachIsa : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    const auto isa = static_cast<Isa>(GetParam());
    if (!IsaAvailable(isa)) GTEST_SKIP() << IsaName(isa) << " is not available here";
    SetIsa(isa);
  }
  void TearDown() override { SetIsa(before_); }

 private:
  Isa before_ = CurrentIsa();
};

inline std::vector<float> Normal(int64_t size, uint32_t seed, float deviation = 1.0f) {
  std::mt19937 draw(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = normal(draw);
  return values;
}

}  // namespace onerec
