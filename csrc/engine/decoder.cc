#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>

#include "engine/call.h"
#include "onerec/moe.h"

namespace onerec::engine {

void Call::Decode() {
  BeamSearch& search = *w_.search;
  const int64_t width = o_.beam_width;
  int64_t start = 0, waiting = 1;  // tokens in the caches, and tokens of each beam not yet there
  std::fill_n(w_.pending.begin(), batch_ * width * kMostPending, 0);
  std::fill_n(w_.nodes.begin(), batch_ * width, 0);
  while (true) {
    const auto level = static_cast<int>(search.Steps() % c_.levels);
    // Where the scoring reads the legal codes alone, only they get logits; not at the root, which
    // has most codes.
    const LegalCodes* const legal =
        level > 0 && scoring_ != Scoring::kFullSoftmax ? &search.Legal() : nullptr;
    const bool apart = legal != nullptr && MayWait(*legal, waiting);
    if (!apart) TakeBeams(nullptr);
    Forward(start, waiting);
    if (!apart) {
      start += waiting;
      waiting = 0;
    }
    if (legal != nullptr && (apart || Few(level, *legal))) {
      LegalHead(level, *legal);
      search.StepLegal(w_.logits.data(), legal->offsets[batch_ * width]);
    } else {
      AllLogits(level);
      search.Step(
          {w_.logits.data(), LogitType::kFloat32, width * c_.codebook_size, c_.codebook_size},
          width);
    }
    if (search.Done()) return;
    Choose(start, waiting);
    ++waiting;
    if (level + 1 == c_.levels) ++waiting;  // the next item's BOS, whose token is not read
  }
}

int64_t Call::TakeBeams(const LegalCodes* legal) {
  int64_t all = 0;
  for (int64_t b = 0; b < batch_; ++b) {
    const int64_t first = b * o_.beam_width;
    int64_t n = 0;
    for (int64_t i = 0; i < w_.live[b]; ++i) {
      if (legal != nullptr && Forced(*legal, first + i)) continue;
      w_.beams[first + n++] = static_cast<int32_t>(i);
    }
    w_.taken[b] = n;
    all += n;
  }
  return all;
}

bool Call::MayWait(const LegalCodes& legal, int64_t waiting) {
  const int64_t live = std::accumulate(w_.live.begin(), w_.live.end(), int64_t{0});
  const int64_t taken = TakeBeams(&legal);
  if (w_.search->Steps() + 1 == o_.session_length * c_.levels) return taken < live;
  return waiting + 2 <= kMostPending && taken * 8 <= live;
}

void Call::Choose(int64_t start, int64_t waiting) {
  const int64_t width = o_.beam_width;
  const auto level = static_cast<int>((w_.search->Steps() - 1) % c_.levels);
  for (int64_t b = 0; b < batch_; ++b) {
    const int64_t live = w_.search->Valid()[b];
    w_.live[b] = live;
    for (int64_t i = 0; i < live; ++i) {
      const int64_t beam = b * width + i;
      const int64_t parent = b * width + w_.search->Parents()[beam];
      std::copy_n(w_.slots.data() + parent * times_, start, w_.next_slots.data() + beam * times_);
      int32_t* const to = w_.next_pending.data() + beam * kMostPending;
      std::copy_n(w_.pending.data() + parent * kMostPending, waiting, to);
      to[waiting] = static_cast<int32_t>(w_.search->Tokens()[beam]);
      if (c_.node_outputs) {
        w_.next_nodes[beam] =
            level + 1 == c_.levels ? 0 : Child(level, w_.nodes[parent], to[waiting]);
      }
      if (waiting + 1 < kMostPending) to[waiting + 1] = 0;
    }
  }
  std::swap(w_.slots, w_.next_slots);
  std::swap(w_.pending, w_.next_pending);
  std::swap(w_.nodes, w_.next_nodes);
}

void Call::Forward(int64_t start, int64_t q) {
  tokens_ = q;
  int64_t rows = 0;
  for (int64_t b = 0; b < batch_; ++b) {
    const size_t at = b;
    w_.first_row[at] = rows;
    w_.rows_of[at] = w_.taken[at] * q;
    const int64_t first = b * o_.beam_width;
    for (int64_t i = 0; i < w_.taken[at]; ++i) {
      w_.last_row[first + w_.beams[first + i]] = static_cast<int32_t>(rows / q + i);
    }
    rows += w_.rows_of[at];
  }
  if (rows == 0) return;
  Cut(rows, q, w_.rows_of);
  const auto pieces = static_cast<int64_t>(w_.pieces.size());
  for (int64_t l = 0; l < c_.decoder_layers; ++l) {
    Parallel(pieces,
             [&](int64_t worker, int64_t i) { Attention(l, w_.pieces[i], start, q, worker); });
    if (c_.n_experts == 0) continue;
    const bool last = l + 1 == c_.decoder_layers;
    void* space = w_.experts.data();
    size_t bytes = w_.experts.size();
    MoeForward(w_.normed.data(), last ? rows / q : rows, d_, w_.ids.data(), w_.gates.data(),
               c_.experts_per_token, m_.decoder[l].experts, std::align(64, 1, space, bytes),
               last ? w_.last.data() : w_.x.data(), d_, true, workers_);
  }
  Parallel(pieces, [&](int64_t, int64_t i) {
    const Piece& p = w_.pieces[i];
    float* const x = w_.last.data() + FirstRow(p) / q * d_;
    Norm(x, m_.decoder_norm, (p.end - p.begin) / q, x);
  });
}

void Call::Attention(int64_t l, const Piece& p, int64_t start, int64_t q, int64_t worker) {
  const DecoderWeights& w = m_.decoder[l];
  const int64_t rows = p.end - p.begin, row = FirstRow(p), width = o_.beam_width;
  float* x = w_.x.data() + row * d_;
  float* const qkv = w_.qkv.data() + row * 3 * d_;
  float* const normed = Scratch(worker);
  float* const queries = normed + rows * d_;
  float* const rest = queries + rows * d_;
  if (l == 0) {
    for (int64_t r = 0; r < rows; ++r) EmbedSession(p.request, p.begin + r, start, q, x + r * d_);
  }
  Norm(x, w.attention_norm, rows, normed);
  Multiply(normed, d_, rows, w.qkv, qkv, 3 * d_, false);

  // Keys and values stay where they are written; a beam finds its ancestors by their slots.
  float* const keys = w_.keys.data() + l * cache_size_;
  float* const values = w_.values.data() + l * cache_size_;
  const int64_t cache = p.request * times_ * width;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t beam = BeamOf(p.request, p.begin + r, q), time = start + (p.begin + r) % q;
    const int64_t at = (cache + time * width + beam) * d_;
    std::memcpy(keys + at, qkv + r * 3 * d_ + d_, sizeof(float) * d_);
    std::memcpy(values + at, qkv + r * 3 * d_ + 2 * d_, sizeof(float) * d_);
  }

  // Of the last layer the others read keys and values alone: only a beam's last token goes on.
  const bool last = l + 1 == c_.decoder_layers;
  const int64_t every = last ? q : 1, kept = rows / every, to = row / every;
  if (last) {
    float* const goes_on = w_.last.data() + to * d_;
    for (int64_t i = 0; i < kept; ++i) std::copy_n(x + (i * q + q - 1) * d_, d_, goes_on + i * d_);
    x = goes_on;
  }
  int64_t* const offsets = w_.offsets.data() + worker * times_;
  for (int64_t i = 0; i < kept; ++i) {
    const int64_t r = i * every + every - 1;
    const int64_t beam = BeamOf(p.request, p.begin + r, q), time = start + (p.begin + r) % q;
    const int32_t* const slots = w_.slots.data() + (p.request * width + beam) * times_;
    for (int64_t t = 0; t <= time; ++t) {
      offsets[t] = (cache + t * width + (t < start ? slots[t] : beam)) * d_;
    }
    for (int64_t h = 0; h < heads_; ++h) {
      const int64_t at = h * dh_;
      f_.attend(qkv + r * 3 * d_ + at, keys + at, values + at, offsets, time + 1, dh_, scale_, rest,
                normed + i * d_ + at);
    }
  }
  Multiply(normed, d_, kept, w.out, x, d_, true);

  Norm(x, w.cross_norm, kept, normed);
  Multiply(normed, d_, kept, w.cross_q, queries, d_, false);
  const Context context = ContextOf(w_.cross.data() + l * context_size_, p.request);
  Attend(queries, d_, kept, context, context.tokens, 0, rest, normed);
  Multiply(normed, d_, kept, w.cross_out, x, d_, true);

  if (c_.n_experts == 0) return DenseFeedForward(w.ffn, w.ffn_norm, kept, x, normed);
  float* const input = w_.normed.data() + to * d_;
  Norm(x, w.ffn_norm, kept, input);
  Multiply(input, d_, kept, w.router, rest, c_.n_experts, false);
  for (int64_t r = 0; r < kept; ++r) {
    const int64_t at = (to + r) * c_.experts_per_token;
    Route(w, rest + r * c_.n_experts, w_.ids.data() + at, w_.gates.data() + at);
  }
}

void Call::EmbedSession(int64_t request, int64_t row, int64_t start, int64_t q, float* x) {
  const int64_t own = BeamOf(request, row, q), time = start + row % q;
  const int64_t beam = request * o_.beam_width + own;
  const int64_t level = time % (c_.levels + 1) - 1;
  w_.slots[beam * times_ + time] = static_cast<int32_t>(own);
  if (level < 0) {
    std::memcpy(x, m_.bos, sizeof(float) * d_);
    if (c_.decoder_start != 0) f_.add_row(x, w_.states.data() + request * d_, false, d_);
  } else {
    std::memset(x, 0, sizeof(float) * d_);
    AddCode(x, m_.decoder_codes, level, w_.pending[beam * kMostPending + row % q]);
  }
  f_.add_row(x, m_.time + time * d_, false, d_);
}

void Call::Route(const DecoderWeights& w, float* logits, int64_t* ids, float* gates) const {
  f_.softmax(logits, c_.n_experts, 1.0f);
  float sum = 0.0f;
  for (int j = 0; j < c_.experts_per_token; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < c_.n_experts; ++e) {
      if (std::find(ids, ids + j, e) != ids + j) continue;
      if (best < 0 || logits[e] + w.selection_bias[e] > logits[best] + w.selection_bias[best]) {
        best = e;
      }
    }
    ids[j] = best;
    gates[j] = logits[best];
    sum += gates[j];
  }
  if (!c_.normalize_gates) return;
  for (int j = 0; j < c_.experts_per_token; ++j) gates[j] /= sum;
}

}  // namespace onerec::engine
