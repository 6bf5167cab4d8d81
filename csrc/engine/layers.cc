#include <algorithm>

#include "engine/call.h"
#include "support/bfloat16.h"

namespace onerec::engine {

void Call::Multiply(const float* x, int64_t x_stride, int64_t m, const PackedMatrix& w, float* y,
                    int64_t y_stride, bool add) const {
  GemmTile tile = TileOf(w, 0, DivideUp(w.n, kPanelWidth));
  tile.x = x;
  tile.x_stride = x_stride;
  tile.m = m;
  tile.y = y;
  tile.y_stride = y_stride;
  tile.add = add;
  gemm_(tile);
}

void Call::Norm(const float* x, const float* weight, int64_t rows, float* out) const {
  for (int64_t r = 0; r < rows; ++r) f_.norm(x + r * d_, weight, d_, c_.norm_eps, out + r * d_);
}

void Call::Cut(int64_t rows_all, int64_t unit, const std::vector<int64_t>& counts) {
  const int64_t size = std::clamp(DivideUp(rows_all, int64_t{2} * workers_),
                                  std::max(kFewestRows, unit), std::max(kMostRows, unit)) /
                       unit * unit;
  w_.pieces.clear();
  for (int64_t b = 0; b < batch_; ++b) {
    const int64_t n = counts[b];
    for (int64_t i = 0; i < n; i += size) w_.pieces.push_back({b, i, std::min(i + size, n)});
  }
}

namespace {

// Row `at` of a packed matrix of k columns, or (kRow false) the first n values of column `at`.
template <bool kRow>
void PackVector(char* matrix, WeightType type, int64_t k, int64_t at, const float* values,
                int64_t n) {
  const int64_t panel = PanelBytes(k, type);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = kRow ? at : i, column = kRow ? i : at;
    char* const to = matrix + row / kPanelWidth * panel;
    if (type == WeightType::kFloat32) {
      reinterpret_cast<float*>(to)[column * kPanelWidth + row % kPanelWidth] = values[i];
      continue;
    }
    auto* const pair =
        reinterpret_cast<uint16_t*>(to) + (column / 2 * kPanelWidth + row % kPanelWidth) * 2;
    pair[column % 2] = RoundToBFloat16(values[i]);
    if (column % 2 == 0 && column + 1 == k) pair[1] = 0;
  }
}

}  // namespace

void Call::PackToken(const Context& to, int64_t t, const float* key, const float* value) const {
  const int64_t keys = PackedBytes(to.tokens, dh_, context_type_);
  const int64_t values = PackedBytes(dh_, to.tokens, context_type_);
  for (int64_t h = 0; h < heads_; ++h) {
    PackVector<true>(to.keys + h * keys, context_type_, dh_, t, key + h * dh_, dh_);
    PackVector<false>(to.values + h * values, context_type_, to.tokens, t, value + h * dh_, dh_);
  }
}

void Call::Attend(const float* q, int64_t q_stride, int64_t rows, const Context& context,
                  int64_t seen, int64_t more, float* scores, float* out) const {
  const int64_t tokens = context.tokens;
  for (int64_t h = 0; h < heads_; ++h) {
    const PackedMatrix keys{context.keys + h * PackedBytes(tokens, dh_, context_type_),
                            context_type_, tokens, dh_};
    Multiply(q + h * dh_, q_stride, rows, keys, scores, tokens, false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = seen + r * more;
      f_.softmax(scores + r * tokens, n, scale_);
      std::fill_n(scores + r * tokens + n, tokens - n, 0.0f);
    }
    const PackedMatrix values{context.values + h * PackedBytes(dh_, tokens, context_type_),
                              context_type_, dh_, tokens};
    Multiply(scores, tokens, rows, values, out + h * dh_, d_, false);
  }
}

void Call::DenseFeedForward(const FeedForwardWeights& w, const float* norm, int64_t rows, float* x,
                            float* scratch) const {
  float* const normed = scratch;
  float* const gate = normed + rows * d_;
  float* const up = gate + rows * c_.d_ff;
  Norm(x, norm, rows, normed);
  Multiply(normed, d_, rows, w.gate, gate, c_.d_ff, false);
  if (w.up.data != nullptr) Multiply(normed, d_, rows, w.up, up, c_.d_ff, false);
  f_.activate(gate, up, rows * c_.d_ff, c_.activation);
  Multiply(gate, c_.d_ff, rows, w.down, x, d_, true);
}

void Call::AddCode(float* x, const char* table, int64_t level, int64_t code) const {
  f_.add_row(x, table + (level * c_.codebook_size + code) * m_.row_bytes, c_.bfloat16 != 0, d_);
}

}  // namespace onerec::engine
