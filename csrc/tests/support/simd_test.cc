#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "tests/support/simd_portable.h"

#define ONEREC_ISA baseline
#include "tests/support/simd_case.h"

namespace onerec::baseline {
namespace {

TEST(Lanes, AreTheSameWithoutIntrinsics) {
  std::mt19937 random(0);
  const float special[] = {0.0f,
                           -0.0f,
                           1.0f,
                           -120.0f,
                           std::numeric_limits<float>::infinity(),
                           -std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::max(),
                           std::numeric_limits<float>::quiet_NaN()};
  for (int round = 0; round < 1000; ++round) {
    std::uniform_real_distribution<float> number(round % 2 ? -30.0f : -130.0f, 9.0f);
    float x[16], y[16];
    for (int i = 0; i < 16; ++i) {
      x[i] = number(random);
      y[i] = round % 3 == 0 ? x[i] : number(random);
      if (round % 5 == 0 && random() % 4 == 0) x[i] = special[random() % 8];
      if (round % 7 == 0 && random() % 4 == 0) y[i] = special[random() % 8];
    }
    EXPECT_EQ(Everything(x, y), portable::PortableLanes(x, y)) << "round " << round;
  }
}

TEST(Lanes, PowersOfTwo) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> number(-64.0f, 127.0f);
  for (int round = 0; round < 10000; ++round) {
    float x[16], y[16];
    for (float& value : x) value = number(random);
    Store(y, Exp2(Load(x)));
    for (int i = 0; i < 16; ++i) {
      const double exact = std::exp2(static_cast<double>(x[i]));
      ASSERT_LT(std::abs(static_cast<double>(y[i]) - exact), 3.2e-7 * exact) << x[i];
    }
  }
  float one[16];
  Store(one, Exp2(Set(0.0f)));
  EXPECT_EQ(one[0], 1.0f);
}

}  // namespace
}  // namespace onerec::baseline
