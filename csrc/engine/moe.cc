#include "onerec/moe.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "engine/kernels_isa.h"
#include "gemm/tile.h"
#include "onerec/runtime.h"
#include "support/dispatch.h"
#include "support/int_math.h"
#include "support/thread_pool.h"

namespace onerec {

EngineKernels CurrentEngineKernels() { return ONEREC_DISPATCH(EngineTable)(); }

namespace {

constexpr int64_t kRows = 96;   // rows of an expert that one task takes
constexpr int64_t kPanels = 8;  // columns that it makes, over 16

int64_t Aligned(int64_t bytes) { return RoundUp(bytes, 64); }

// Floats from one row of `hidden` to the next: rows a power of two apart would share their places
// in the cache.
int64_t HiddenStride(const PackedExperts& experts) { return (experts.hidden + 31) / 16 * 16; }

// The parts of the workspace.
struct Workspace {
  Workspace(char* base, int64_t tokens, int64_t slots, const PackedExperts& experts) {
    const int64_t pairs = tokens * slots;
    const auto start = reinterpret_cast<uintptr_t>(base);
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
          start + static_cast<uintptr_t>(bytes));
      bytes += Aligned(count * static_cast<int64_t>(sizeof *pointer));
    };
    take(begin, experts.count + 2);
    take(blocks, experts.count + 1);
    take(place, pairs);
    take(token, pairs);
    take(hidden, pairs * HiddenStride(experts));
    take(out, pairs * experts.width);
  }

  int64_t* begin;   // [E + 1], sorted row where each expert begins (and one to spare)
  int64_t* blocks;  // [E + 1], row blocks of the experts before
  int32_t* place;   // [P], sorted row of each pair, -1 for nobody
  int32_t* token;   // [P], token of each sorted row
  float* hidden;    // [P, hidden], HiddenStride apart
  float* out;       // [P, width]
  int64_t bytes = 0;
};

// A task: some rows of an expert and some columns of one of its matrices.
struct Task {
  int64_t expert, row, rows, panel;
};

Task TaskAt(int64_t index, int64_t groups, int64_t experts, const Workspace& w) {
  // Row blocks of the same columns come one after the other and find the weights in the cache.
  const int64_t* const blocks = w.blocks;
  const int64_t e = std::upper_bound(blocks, blocks + experts + 1, index / groups) - blocks - 1;
  const int64_t count = w.blocks[e + 1] - w.blocks[e];
  const int64_t local = index - w.blocks[e] * groups;
  const int64_t row = w.begin[e] + local % count * kRows;
  return {e, row, std::min(kRows, w.begin[e + 1] - row), local / count * kPanels};
}

}  // namespace

int64_t MoeWorkspaceBytes(int64_t tokens, int64_t slots, const PackedExperts& experts) {
  return Workspace(nullptr, tokens, slots, experts).bytes;
}

void MoeForward(const float* x, int64_t tokens, int64_t x_stride, const int64_t* ids,
                const float* gates, int64_t slots, const PackedExperts& experts, void* workspace,
                float* y, int64_t y_stride, bool add, int num_threads) {
  const GemmFunction gemm = CurrentGemm();
  const EngineKernels kernels = CurrentEngineKernels();
  const int64_t pairs = tokens * slots, width = experts.width, hidden = experts.hidden;
  const int64_t hidden_stride = HiddenStride(experts);
  const Workspace w(static_cast<char*>(workspace), tokens, slots, experts);

  // Pairs sorted by expert (stable).
  const auto expert_of = [&](int64_t pair) {
    const int64_t e = ids[pair] - experts.first;
    return e >= 0 && e < experts.count ? e : -1;
  };
  std::fill_n(w.begin, experts.count + 2, 0);
  for (int64_t i = 0; i < pairs; ++i) {
    if (const int64_t e = expert_of(i); e >= 0) ++w.begin[e + 2];
  }
  w.blocks[0] = 0;
  for (int64_t e = 0; e < experts.count; ++e) {
    w.blocks[e + 1] = w.blocks[e] + DivideUp(w.begin[e + 2], kRows);
    w.begin[e + 2] += w.begin[e + 1];
  }
  for (int64_t i = 0; i < pairs; ++i) {  // leaves the first row of expert e in begin[e]
    const int64_t e = expert_of(i);
    w.place[i] = e < 0 ? -1 : static_cast<int32_t>(w.begin[e + 1]++);
    if (e >= 0) w.token[w.place[i]] = static_cast<int32_t>(i / slots);
  }

  const auto packed = [&](const void* data, int64_t e, int64_t n, int64_t k) {
    const int64_t bytes = experts.stride > 0 ? experts.stride : PackedBytes(n, k, experts.type);
    return PackedMatrix{static_cast<const char*>(data) + e * bytes, experts.type, n, k};
  };
  const auto groups = [](int64_t n) { return DivideUp(n, kPanels * kPanelWidth); };
  const int64_t blocks = w.blocks[experts.count];
  const auto activation = static_cast<int>(experts.activation);
  ParallelFor(blocks * groups(hidden), num_threads, [&](int64_t index) {
    const Task task = TaskAt(index, groups(hidden), experts.count, w);
    const PackedMatrix gate = packed(experts.gate, task.expert, hidden, width);
    GemmTile tile = TileOf(gate, task.panel, kPanels);
    tile.x = x;
    tile.x_stride = x_stride;
    tile.rows = w.token + task.row;
    tile.m = task.rows;
    float* const first = w.hidden + task.row * hidden_stride + task.panel * kPanelWidth;
    tile.y = first;
    tile.y_stride = hidden_stride;
    gemm(tile);
    alignas(64) float up[kRows * kPanels * kPanelWidth];
    constexpr int64_t kStride = kPanels * kPanelWidth;
    if (experts.up != nullptr) {
      const PackedMatrix matrix = packed(experts.up, task.expert, hidden, width);
      tile.weights = TileOf(matrix, task.panel, kPanels).weights;
      tile.y = up;
      tile.y_stride = kStride;
      gemm(tile);
    }
    for (int64_t r = 0; r < task.rows; ++r) {
      kernels.activate(first + r * hidden_stride, up + r * kStride, tile.n, activation);
    }
  });
  ParallelFor(blocks * groups(width), num_threads, [&](int64_t index) {
    const Task task = TaskAt(index, groups(width), experts.count, w);
    GemmTile tile = TileOf(packed(experts.down, task.expert, width, hidden), task.panel, kPanels);
    tile.x = w.hidden + task.row * hidden_stride;
    tile.x_stride = hidden_stride;
    tile.m = task.rows;
    tile.y = w.out + task.row * width + task.panel * kPanelWidth;
    tile.y_stride = width;
    gemm(tile);
  });
  constexpr int64_t kTokens = 16;
  ParallelFor(DivideUp(tokens, kTokens), num_threads, [&](int64_t chunk) {
    const int64_t end = std::min(tokens, (chunk + 1) * kTokens);
    for (int64_t t = chunk * kTokens; t < end; ++t) {
      if (!add) std::memset(y + t * y_stride, 0, width * sizeof(float));
      for (int64_t i = t * slots; i < (t + 1) * slots; ++i) {
        if (w.place[i] < 0) continue;
        kernels.add_scaled(y + t * y_stride, w.out + w.place[i] * width, gates[i], width);
      }
    }
  });
}

}  // namespace onerec
