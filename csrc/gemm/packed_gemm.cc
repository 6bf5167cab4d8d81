#include "onerec/packed_gemm.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "gemm/tile.h"
#include "onerec/runtime.h"
#include "support/bfloat16.h"
#include "support/dispatch.h"
#include "support/int_math.h"
#include "support/thread_pool.h"

namespace onerec {
namespace {

constexpr int64_t kLarge = 4 << 20;  // bytes of which most can lie in pages of 2 MB

int64_t Panels(int64_t n) { return DivideUp(n, kPanelWidth); }

}  // namespace

int64_t PanelBytes(int64_t k, WeightType type) {
  return type == WeightType::kFloat32 ? k * kPanelWidth * 4 : (k + 1) / 2 * kPanelWidth * 4;
}

int64_t PackedBytes(int64_t n, int64_t k, WeightType type) {
  return Panels(n) * PanelBytes(k, type);
}

void AdviseLargePages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < kLarge) return;
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = RoundUp(reinterpret_cast<uintptr_t>(data), page);
  const auto end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

void PackWeights(const float* w, int64_t n, int64_t k, int64_t row_stride, WeightType type,
                 void* packed, int num_threads) {
  ParallelFor(Panels(n), num_threads, [&](int64_t panel) {
    char* const out = static_cast<char*>(packed) + panel * PanelBytes(k, type);
    const int64_t rows = std::min(kPanelWidth, n - panel * kPanelWidth);
    if (rows < kPanelWidth || k % 2 != 0) std::memset(out, 0, PanelBytes(k, type));
    for (int64_t j = 0; j < rows; ++j) {
      const float* const row = w + (panel * kPanelWidth + j) * row_stride;
      if (type == WeightType::kFloat32) {
        for (int64_t i = 0; i < k; ++i) reinterpret_cast<float*>(out)[i * kPanelWidth + j] = row[i];
      } else {
        auto* const pairs = reinterpret_cast<uint16_t*>(out);
        for (int64_t i = 0; i < k; ++i) {
          pairs[(i / 2 * kPanelWidth + j) * 2 + i % 2] = RoundToBFloat16(row[i]);
        }
      }
    }
  });
}

void UnpackRow(const PackedMatrix& w, int64_t row, float* out) {
  const char* const panel =
      static_cast<const char*>(w.data) + row / kPanelWidth * PanelBytes(w.k, w.type);
  const int64_t j = row % kPanelWidth;
  for (int64_t i = 0; i < w.k; ++i) {
    if (w.type == WeightType::kFloat32) {
      out[i] = reinterpret_cast<const float*>(panel)[i * kPanelWidth + j];
    } else {
      const uint16_t bits =
          reinterpret_cast<const uint16_t*>(panel)[(i / 2 * kPanelWidth + j) * 2 + i % 2];
      out[i] = std::bit_cast<float>(uint32_t{bits} << 16);
    }
  }
}

GemmFunction CurrentGemm() {
#ifdef ONEREC_X86
  if (CurrentIsa() == Isa::kAvx512Bf16) return &avx512_bf16::RunTile;
#endif
  return &ONEREC_DISPATCH(RunTile);
}

GemmTile TileOf(const PackedMatrix& w, int64_t first_panel, int64_t panels) {
  GemmTile tile;
  tile.weights = static_cast<const char*>(w.data) + first_panel * PanelBytes(w.k, w.type);
  tile.type = w.type;
  tile.k = w.k;
  tile.n = std::min(w.n - first_panel * kPanelWidth, panels * kPanelWidth);
  return tile;
}

void PackedGemm(const float* x, int64_t m, int64_t x_stride, const PackedMatrix& w, float* y,
                int64_t y_stride, bool add, int num_threads) {
  const GemmFunction run = CurrentGemm();
  const int64_t panels = Panels(w.n);
  // Columns are cut first, so that each weight is read by one thread; rows where they are many.
  const int64_t parts = num_threads > 1 ? int64_t{4} * num_threads : 1;
  const int64_t columns = std::clamp<int64_t>(panels / 4, 1, parts);
  const int64_t row_parts = std::clamp<int64_t>(m / 96, 1, DivideUp(parts, columns));
  ParallelFor(columns * row_parts, num_threads, [&](int64_t chunk) {
    const int64_t column = chunk / row_parts, part = chunk % row_parts;
    const int64_t first = column * panels / columns, last = (column + 1) * panels / columns;
    const int64_t begin = part * m / row_parts, end = (part + 1) * m / row_parts;
    if (first == last || begin == end) return;
    GemmTile tile = TileOf(w, first, last - first);
    tile.x = x + begin * x_stride;
    tile.x_stride = x_stride;
    tile.m = end - begin;
    tile.y = y + begin * y_stride + first * kPanelWidth;
    tile.y_stride = y_stride;
    tile.add = add;
    run(tile);
  });
}

}  // namespace onerec
