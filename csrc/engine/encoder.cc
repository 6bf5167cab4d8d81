#include <algorithm>
#include <cstring>

#include "engine/call.h"

namespace onerec::engine {

void Call::EmbedHistory(const EngineRequest& r, int64_t t, float* x) const {
  if (t == 0) return static_cast<void>(std::memcpy(x, m_.start, sizeof(float) * d_));
  const int64_t item = c_.history_is_items ? t - 1 : (t - 1) / c_.levels;
  const int32_t* const codes = r.history + item * c_.levels;
  std::memset(x, 0, sizeof(float) * d_);
  if (c_.n_items > 0) {
    UnpackRow(m_.items, r.history[item], x);
  } else if (c_.history_is_items) {
    for (int64_t l = 0; l < c_.levels; ++l) AddCode(x, m_.codes, l, codes[l]);
  } else {
    AddCode(x, m_.codes, (t - 1) % c_.levels, codes[(t - 1) % c_.levels]);
  }
  f_.add_row(x, m_.age + (c_.causal ? item : r.items - 1 - item) * d_, false, d_);
}

void Call::Encode() {
  Cut(w_.token_begin[batch_], 1, w_.tokens_of);
  for (int layer = 0; layer <= c_.encoder_layers; ++layer) {
    Parallel(static_cast<int64_t>(w_.pieces.size()), [&](int64_t worker, int64_t i) {
      const Piece& p = w_.pieces[i];
      const int64_t rows = p.end - p.begin;
      const int64_t row = w_.token_begin[p.request] + p.begin;
      float* const x = w_.x.data() + row * d_;
      float* const qkv = w_.qkv.data() + row * 3 * d_;
      float* const scratch = Scratch(worker);
      if (layer == 0) {
        for (int64_t r = 0; r < rows; ++r) {
          EmbedHistory(requests_[p.request], p.begin + r, x + r * d_);
        }
      } else {
        const EncoderWeights& w = m_.encoder[layer - 1];
        float* const out = scratch;
        const Context context = ContextOf(w_.context[(layer - 1) % 2].data(), p.request);
        Attend(qkv, 3 * d_, rows, context, c_.causal ? p.begin + 1 : context.tokens, c_.causal,
               out + rows * d_, out);
        Multiply(out, d_, rows, w.out, x, d_, true);
        DenseFeedForward(w.ffn, w.ffn_norm, rows, x, scratch);
      }
      float* const normed = scratch;
      if (layer < c_.encoder_layers) {
        const EncoderWeights& w = m_.encoder[layer];
        Norm(x, w.attention_norm, rows, normed);
        Multiply(normed, d_, rows, w.qkv, qkv, 3 * d_, false);
        const Context to = ContextOf(w_.context[layer % 2].data(), p.request);
        for (int64_t r = 0; r < rows; ++r) {
          const float* const token = qkv + r * 3 * d_;
          PackToken(to, p.begin + r, token + d_, token + 2 * d_);
        }
        return;
      }
      if (!decodes_) {
        if (p.end == w_.tokens_of[p.request]) {
          Norm(x + (rows - 1) * d_, m_.encoder_norm, 1, w_.last.data() + p.request * d_);
        }
        return;
      }
      Norm(x, m_.encoder_norm, rows, normed);
      if (c_.decoder_start != 0 && p.end == w_.tokens_of[p.request]) {
        std::copy_n(normed + (rows - 1) * d_, d_, w_.states.data() + p.request * d_);
      }
      for (int64_t l = 0; l < c_.decoder_layers; ++l) {
        Multiply(normed, d_, rows, m_.decoder[l].cross_kv, qkv, 2 * d_, false);
        const Context to = ContextOf(w_.cross.data() + l * context_size_, p.request);
        for (int64_t r = 0; r < rows; ++r) {
          PackToken(to, p.begin + r, qkv + r * 2 * d_, qkv + r * 2 * d_ + d_);
        }
      }
    });
  }
}

}  // namespace onerec::engine
