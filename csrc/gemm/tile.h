// The part of a packed product that one thread does without asking anybody. Plain data and
// declarations only: *_isa.cc files include this header.
#pragma once

#include <cstdint>

#include "onerec/packed_gemm.h"
#include "support/dispatch.h"

namespace onerec {

// out [k] = row `row` of W.
void UnpackRow(const PackedMatrix& w, int64_t row, float* out);

// Bytes of one panel of a matrix of k columns.
int64_t PanelBytes(int64_t k, WeightType type);

// A block of y = x W^T.
struct GemmTile {
  const float* x = nullptr;  // row r at x + (rows ? rows[r] : r) * x_stride
  int64_t x_stride = 0;
  const int32_t* rows = nullptr;
  int64_t m = 0;                  // rows of y
  const void* weights = nullptr;  // first byte of panel 0
  WeightType type = WeightType::kFloat32;
  int64_t k = 0;
  const int32_t* panels = nullptr;  // which panels to take, in order; null: panel 0, 1, ...
  int64_t n = 0;                    // columns of y: the last panel may give fewer than 16
  float* y = nullptr;               // [m, n]
  int64_t y_stride = 0;
  bool add = false;  // y += x W^T, the product being summed first
};
using GemmFunction = void (*)(const GemmTile&);

// The function for the instruction set in use.
GemmFunction CurrentGemm();

// A tile of columns 16 * first_panel .. of a packed matrix, to be given x and y.
GemmTile TileOf(const PackedMatrix& w, int64_t first_panel, int64_t panels);

ONEREC_EACH_ISA(void RunTile(const GemmTile& tile);)
namespace avx512_bf16 {
void RunTile(const GemmTile& tile);
}

}  // namespace onerec
