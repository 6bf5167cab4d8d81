// A fixture that runs a test on each instruction set, and random matrices.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <vector>

#include "onerec/runtime.h"

namespace onerec {

// For INSTANTIATE_TEST_SUITE_P over kIsas.
class EachIsa : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    const Isa isa = GetParam();
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
  std::vector<float> values(size);
  for (float& value : values) value = normal(draw);
  return values;
}

}  // namespace onerec
