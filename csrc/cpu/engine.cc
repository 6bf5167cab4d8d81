#include "onerec/engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/engine_isa.h"
#include "cpu/engine_model.h"
#include "cpu/packed_gemm_tile.h"
#include "cpu/thread_pool.h"
#include "onerec/runtime.h"

namespace onerec {
namespace {

constexpr int64_t kMostRows = 48;    // rows that one piece of work takes through a sublayer
constexpr int64_t kFewestRows = 6;   // of a block of the matrix product
constexpr int64_t kMostPending = 4;  // tokens that a beam may have waiting
constexpr int64_t kTaskPanels = 8;   // columns of an expert's matrix that one task makes, over 16

EngineKernels CurrentKernels() {
#ifdef ONEREC_X86
  if (CurrentIsa() == Isa::kAvx512) return avx512::EngineTable();
  if (CurrentIsa() == Isa::kAvx2) return avx2::EngineTable();
#endif
  return baseline::EngineTable();
}

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t PaddedTo16(int64_t n) { return DivideUp(n, kPanelWidth) * kPanelWidth; }

template <class T>
void Grow(std::vector<T>& v, int64_t size) {
  if (static_cast<int64_t>(v.size()) < size) v.resize(static_cast<size_t>(size));
}

std::string WantedGot(const char* name, const std::string& wanted, int64_t got) {
  return std::string(name) + ": wanted " + wanted + ", got " + std::to_string(got);
}

// Rows [begin, end) of one request.
struct Piece {
  int64_t request, begin, end;
};

// Keys and values of one layer and request, packed as matrices for each head.
struct Context {
  float* keys;    // heads times [ceil(T / 16)][dh][16]
  float* values;  // heads times [ceil(dh / 16)][T][16]
  int64_t tokens;
};

// Buffers of one call; kept for the next.
struct Workspace {
  std::vector<float> x, normed, qkv, hidden, up, expert_out, gates, last, logits;
  std::vector<float> context[2];    // encoder self-attention, this layer's and the next one's
  std::vector<float> cross;         // [decoder layers]
  std::vector<float> keys, values;  // [decoder layers, batch, times, width, d]
  std::vector<float> scratch;       // [workers, scratch_size]
  std::vector<int64_t> offsets;     // [workers, times]
  std::vector<int32_t> panels;      // [workers, panels of a head]
  std::vector<int32_t> slots, next_slots;      // [batch, width, times]
  std::vector<int32_t> pending, next_pending;  // [batch, width, kMostPending]
  std::vector<int32_t> ids, place, sorted, expert_begin;
  std::vector<int64_t> live, first_row, rows_of, tokens_of, token_begin, key_begin, value_begin;
  std::vector<int64_t> deny, deny_offsets;
  std::vector<Piece> pieces;
  std::vector<std::pair<int32_t, int32_t>> tasks;  // expert, first panel
  std::vector<float> zeros;
  std::unique_ptr<BeamSearch> search;
  BeamSearchOptions search_options;
};

class Call {
 public:
  Call(const EngineModel::Impl& model, const std::shared_ptr<const Trie>& trie, Workspace& w,
       const EngineRequest* requests, int64_t batch, const EngineOptions& options)
      : m_(model),
        c_(model.config),
        trie_(trie),
        w_(w),
        requests_(requests),
        batch_(batch),
        o_(options),
        d_(c_.d_model),
        heads_(c_.n_heads),
        dh_(c_.d_model / c_.n_heads),
        scale_(1.0f / std::sqrt(static_cast<float>(dh_))),
        times_(options.session_length * (c_.levels + 1)),
        workers_(std::max(options.num_threads, 1)),
        gemm_(CurrentGemm()),
        f_(CurrentKernels()) {}

  void Run(const EngineResult& result) {
    Prepare();
    Encode();
    Decode();
    w_.search->Items(result.items);
    if (result.sids != nullptr) w_.search->Sids(result.sids);
    const double* const scores = w_.search->Scores();
    for (int64_t i = 0; i < batch_ * o_.beam_width; ++i) {
      result.scores[i] = static_cast<float>(scores[i]);
    }
    std::copy_n(w_.search->Valid(), batch_, result.valid);
  }

 private:
  // body(worker, i) for each i < n; a worker runs one at a time, so its scratch is its own.
  template <class Body>
  void Parallel(int64_t n, Body&& body) {
    std::atomic<int64_t> next{0};
    ParallelFor(std::min<int64_t>(workers_, n), workers_, [&](int64_t worker) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(worker, i);
    });
  }

  float* Scratch(int64_t worker) { return w_.scratch.data() + worker * scratch_size_; }

  // y [m, w.n] = or += x W^T on this thread.
  void Multiply(const float* x, int64_t x_stride, int64_t m, const PackedMatrix& w, float* y,
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

  void Norm(const float* x, const float* weight, int64_t rows, float* out) const {
    for (int64_t r = 0; r < rows; ++r) f_.norm(x + r * d_, weight, d_, c_.norm_eps, out + r * d_);
  }

  // Cuts each request's rows into pieces of whole multiples of `unit`.
  void Cut(int64_t rows_all, int64_t unit, const std::vector<int64_t>& counts) {
    const int64_t size = std::clamp(DivideUp(rows_all, int64_t{2} * workers_),
                                    std::max(kFewestRows, unit), std::max(kMostRows, unit)) /
                         unit * unit;
    w_.pieces.clear();
    for (int64_t b = 0; b < batch_; ++b) {
      const int64_t n = counts[static_cast<size_t>(b)];
      for (int64_t i = 0; i < n; i += size) w_.pieces.push_back({b, i, std::min(i + size, n)});
    }
  }

  void Prepare() {
    const int64_t levels = c_.levels, beams = batch_ * o_.beam_width;
    w_.tokens_of.assign(static_cast<size_t>(batch_), 0);
    w_.token_begin.assign(static_cast<size_t>(batch_) + 1, 0);
    w_.key_begin.assign(static_cast<size_t>(batch_) + 1, 0);
    w_.value_begin.assign(static_cast<size_t>(batch_) + 1, 0);
    w_.deny.clear();
    w_.deny_offsets.assign(1, 0);
    int64_t most = 1;
    for (int64_t b = 0; b < batch_; ++b) {
      const EngineRequest& r = requests_[b];
      if (r.items < 0 || r.items > c_.history_length) {
        throw std::invalid_argument(
            WantedGot("items of a history", "0.." + std::to_string(c_.history_length), r.items));
      }
      for (int64_t i = 0; i < r.items * levels; ++i) {
        if (r.codes[i] < 0 || r.codes[i] >= c_.codebook_size) {
          throw std::invalid_argument(WantedGot(
              "codes of a history", "0.." + std::to_string(c_.codebook_size - 1), r.codes[i]));
        }
      }
      const auto at = static_cast<size_t>(b);
      const int64_t tokens = 1 + r.items * (c_.history_is_items ? 1 : levels);
      w_.tokens_of[at] = tokens;
      w_.token_begin[at + 1] = w_.token_begin[at] + tokens;
      w_.key_begin[at + 1] = w_.key_begin[at] + heads_ * PaddedTo16(tokens) * dh_;
      w_.value_begin[at + 1] = w_.value_begin[at] + heads_ * tokens * PaddedTo16(dh_);
      most = std::max(most, tokens);
      w_.deny.insert(w_.deny.end(), r.deny, r.deny + r.denied);
      w_.deny_offsets.push_back(static_cast<int64_t>(w_.deny.size()));
    }
    const auto last = static_cast<size_t>(batch_);
    context_size_ = w_.key_begin[last] + w_.value_begin[last];
    const int64_t pending = o_.scoring == Scoring::kLegalSoftmax ? kMostPending : 2;
    const int64_t decoder_rows = beams * pending;
    const int64_t rows = std::max(w_.token_begin[last], decoder_rows);
    const int64_t hidden = c_.n_experts > 0 ? c_.expert_d_ff : c_.d_ff;
    const int64_t pairs = decoder_rows * c_.experts_per_token;
    Grow(w_.x, rows * d_);
    Grow(w_.qkv, rows * 3 * d_);
    Grow(w_.normed, rows * d_);
    Grow(w_.context[0], context_size_);
    Grow(w_.context[1], context_size_);
    Grow(w_.cross, context_size_ * c_.decoder_layers);
    cache_size_ = batch_ * times_ * o_.beam_width * d_;
    Grow(w_.keys, cache_size_ * c_.decoder_layers);
    Grow(w_.values, cache_size_ * c_.decoder_layers);
    if (c_.n_experts > 0) {
      Grow(w_.hidden, pairs * hidden);
      Grow(w_.up, pairs * hidden);
      Grow(w_.expert_out, pairs * d_);
      Grow(w_.gates, pairs);
      Grow(w_.ids, pairs);
      Grow(w_.place, pairs);
      Grow(w_.sorted, pairs);
      Grow(w_.expert_begin, c_.n_experts + 2);
      const int64_t wide = DivideUp(DivideUp(std::max(hidden, d_), kPanelWidth), kTaskPanels);
      w_.tasks.reserve(static_cast<size_t>(c_.n_experts * wide));
    }
    Grow(w_.last, beams * d_);
    Grow(w_.logits, beams * c_.codebook_size);
    Grow(w_.zeros, beams);
    // A piece needs attention scores (of one head), gate and up of the dense layers, router logits.
    const int64_t piece = std::max(kMostRows, pending);
    scratch_size_ = piece * std::max({most, 2 * int64_t{c_.d_ff}, int64_t{c_.n_experts}, times_}) +
                    piece * 2 * d_ + c_.codebook_size + kPanelWidth;
    Grow(w_.scratch, scratch_size_ * workers_);
    Grow(w_.offsets, times_ * workers_);
    head_panels_ = DivideUp(c_.codebook_size, kPanelWidth);
    Grow(w_.panels, head_panels_ * workers_);
    Grow(w_.slots, beams * times_);
    Grow(w_.next_slots, beams * times_);
    Grow(w_.pending, beams * kMostPending);
    Grow(w_.next_pending, beams * kMostPending);
    w_.live.assign(static_cast<size_t>(batch_), 1);
    w_.first_row.assign(static_cast<size_t>(batch_), 0);
    w_.rows_of.assign(static_cast<size_t>(batch_), 0);
    w_.pieces.reserve(static_cast<size_t>(rows + batch_));

    BeamSearchOptions wanted;
    wanted.batch = batch_;
    wanted.width = o_.beam_width;
    wanted.items = o_.session_length;
    wanted.scoring = o_.scoring;
    wanted.temperature = o_.temperature;
    wanted.num_threads = workers_;
    const BeamSearchOptions& have = w_.search_options;
    if (w_.search == nullptr || have.batch != wanted.batch || have.width != wanted.width ||
        have.items != wanted.items || have.scoring != wanted.scoring ||
        have.temperature != wanted.temperature || have.num_threads != wanted.num_threads) {
      w_.search = std::make_unique<BeamSearch>(trie_, wanted);
      w_.search_options = wanted;
    }
    BeamRequests allowed;
    allowed.deny = w_.deny.data();
    allowed.deny_offsets = w_.deny_offsets.data();
    w_.search->Reset(allowed);
  }

  Context ContextOf(float* base, int64_t b) const {
    const auto at = static_cast<size_t>(b), all = static_cast<size_t>(batch_);
    return {base + w_.key_begin[at], base + w_.key_begin[all] + w_.value_begin[at],
            w_.tokens_of[at]};
  }

  // Puts the keys and values of token t, d floats each, into their panels.
  void PackToken(const Context& to, int64_t t, const float* key, const float* value) const {
    const int64_t padded = PaddedTo16(dh_);
    for (int64_t h = 0; h < heads_; ++h) {
      float* const k = to.keys + h * PaddedTo16(to.tokens) * dh_ +
                       t / kPanelWidth * kPanelWidth * dh_ + t % kPanelWidth;
      for (int64_t i = 0; i < dh_; ++i) k[i * kPanelWidth] = key[h * dh_ + i];
      float* const v = to.values + h * to.tokens * padded + t * kPanelWidth;
      for (int64_t i = 0; i < dh_; ++i) {
        v[i / kPanelWidth * kPanelWidth * to.tokens + i % kPanelWidth] = value[h * dh_ + i];
      }
    }
  }

  // out [rows, d] = attention of queries (row stride q_stride) to a context; scores: [rows,
  // tokens].
  void Attend(const float* q, int64_t q_stride, int64_t rows, const Context& context, float* scores,
              float* out) const {
    const int64_t tokens = context.tokens;
    for (int64_t h = 0; h < heads_; ++h) {
      const PackedMatrix keys{context.keys + h * PaddedTo16(tokens) * dh_, WeightType::kFloat32,
                              tokens, dh_};
      Multiply(q + h * dh_, q_stride, rows, keys, scores, tokens, false);
      for (int64_t r = 0; r < rows; ++r) f_.softmax(scores + r * tokens, tokens, scale_);
      const PackedMatrix values{context.values + h * tokens * PaddedTo16(dh_), WeightType::kFloat32,
                                dh_, tokens};
      Multiply(scores, tokens, rows, values, out + h * dh_, d_, false);
    }
  }

  // x += w2 act(w13 x), the norm included; scratch: 2 d_ff + d floats a row.
  void DenseFeedForward(const FeedForwardWeights& w, const float* norm, int64_t rows, float* x,
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

  // --- encoder ---

  void AddCode(float* x, const char* table, int64_t level, int64_t code) const {
    f_.add_row(x, table + (level * c_.codebook_size + code) * m_.row_bytes, c_.bfloat16 != 0, d_);
  }

  // Positions count from the latest item, which is 0 for everybody.
  void EmbedHistory(const EngineRequest& r, int64_t t, float* x) const {
    if (t == 0)
      return static_cast<void>(std::memcpy(x, m_.start, sizeof(float) * static_cast<size_t>(d_)));
    const int64_t item = c_.history_is_items ? t - 1 : (t - 1) / c_.levels;
    const int32_t* const codes = r.codes + item * c_.levels;
    std::memset(x, 0, sizeof(float) * static_cast<size_t>(d_));
    if (c_.history_is_items) {
      for (int64_t l = 0; l < c_.levels; ++l) AddCode(x, m_.codes, l, codes[l]);
    } else {
      AddCode(x, m_.codes, (t - 1) % c_.levels, codes[(t - 1) % c_.levels]);
    }
    f_.add_row(x, m_.age + (r.items - 1 - item) * d_, false, d_);
  }

  // One sweep a layer: it finishes layer `layer - 1` for its rows (embeds them before the first)
  // and makes the keys and values of this one, or of the decoder's cross-attentions at the end.
  void Encode() {
    Cut(w_.token_begin[static_cast<size_t>(batch_)], 1, w_.tokens_of);
    for (int layer = 0; layer <= c_.encoder_layers; ++layer) {
      Parallel(static_cast<int64_t>(w_.pieces.size()), [&](int64_t worker, int64_t i) {
        const Piece& p = w_.pieces[static_cast<size_t>(i)];
        const int64_t rows = p.end - p.begin;
        const int64_t row = w_.token_begin[static_cast<size_t>(p.request)] + p.begin;
        float* const x = w_.x.data() + row * d_;
        float* const qkv = w_.qkv.data() + row * 3 * d_;
        float* const scratch = Scratch(worker);
        if (layer == 0) {
          for (int64_t r = 0; r < rows; ++r) {
            EmbedHistory(requests_[p.request], p.begin + r, x + r * d_);
          }
        } else {
          const EncoderWeights& w = m_.encoder[static_cast<size_t>(layer - 1)];
          float* const out = scratch;
          Attend(qkv, 3 * d_, rows, ContextOf(w_.context[(layer - 1) % 2].data(), p.request),
                 out + rows * d_, out);
          Multiply(out, d_, rows, w.out, x, d_, true);
          DenseFeedForward(w.ffn, w.ffn_norm, rows, x, scratch);
        }
        float* const normed = scratch;
        if (layer < c_.encoder_layers) {
          const EncoderWeights& w = m_.encoder[static_cast<size_t>(layer)];
          Norm(x, w.attention_norm, rows, normed);
          Multiply(normed, d_, rows, w.qkv, qkv, 3 * d_, false);
          const Context to = ContextOf(w_.context[layer % 2].data(), p.request);
          for (int64_t r = 0; r < rows; ++r) {
            const float* const token = qkv + r * 3 * d_;
            PackToken(to, p.begin + r, token + d_, token + 2 * d_);
          }
          return;
        }
        Norm(x, m_.encoder_norm, rows, normed);
        for (int64_t l = 0; l < c_.decoder_layers; ++l) {
          Multiply(normed, d_, rows, m_.decoder[static_cast<size_t>(l)].cross_kv, qkv, 2 * d_,
                   false);
          const Context to = ContextOf(w_.cross.data() + l * context_size_, p.request);
          for (int64_t r = 0; r < rows; ++r) {
            PackToken(to, p.begin + r, qkv + r * 2 * d_, qkv + r * 2 * d_ + d_);
          }
        }
      });
    }
  }

  // --- decoder ---

  void Decode() {
    BeamSearch& search = *w_.search;
    const int64_t width = o_.beam_width;
    int64_t start = 0, waiting = 1;  // tokens in the caches, and tokens of each beam not yet there
    std::fill_n(w_.pending.begin(), batch_ * width * kMostPending, 0);
    while (true) {
      const auto level = static_cast<int>(search.Steps() % c_.levels);
      // Where the scoring reads the legal codes alone, only they get logits; not at the root, which
      // has most codes.
      const LegalCodes* const legal =
          level > 0 && o_.scoring != Scoring::kFullSoftmax ? &search.Legal() : nullptr;
      const bool forced = legal != nullptr && waiting + 2 <= kMostPending && Forced(*legal);
      if (!forced) {
        Forward(start, waiting);
        start += waiting;
        waiting = 0;
      }
      if (forced) {
        search.StepLegal(w_.zeros.data(), legal->offsets[batch_ * width]);
      } else if (legal != nullptr && Few(*legal)) {
        LegalHead(m_.heads[static_cast<size_t>(level)], *legal);
        search.StepLegal(w_.logits.data(), legal->offsets[batch_ * width]);
      } else {
        Head(m_.heads[static_cast<size_t>(level)]);
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

  // Whether no logits are needed: under the legal softmax an only code has probability 1.
  bool Forced(const LegalCodes& legal) const {
    if (o_.scoring != Scoring::kLegalSoftmax) return false;
    for (int64_t beam = 0; beam < batch_ * o_.beam_width; ++beam) {
      if (legal.offsets[beam + 1] - legal.offsets[beam] > 1) return false;
    }
    return true;
  }

  // Whether the legal codes are so few that their panels are less work than all of them.
  bool Few(const LegalCodes& legal) const {
    int64_t panels = 0, all = 0;
    for (int64_t b = 0; b < batch_; ++b) {
      const int64_t first = b * o_.beam_width, live = w_.live[static_cast<size_t>(b)];
      all += live * head_panels_;
      for (int64_t beam = first; beam < first + live; ++beam) {
        panels += std::min(legal.offsets[beam + 1] - legal.offsets[beam], head_panels_);
      }
    }
    return panels * 4 < all;
  }

  // Goes on with the beams that the last step kept: ancestors and waiting tokens follow.
  void Choose(int64_t start, int64_t waiting) {
    const int64_t width = o_.beam_width;
    for (int64_t b = 0; b < batch_; ++b) {
      const int64_t live = w_.search->Valid()[b];
      w_.live[static_cast<size_t>(b)] = live;
      for (int64_t i = 0; i < live; ++i) {
        const int64_t beam = b * width + i;
        const int64_t parent = b * width + w_.search->Parents()[beam];
        std::copy_n(w_.slots.data() + parent * times_, start, w_.next_slots.data() + beam * times_);
        int32_t* const to = w_.next_pending.data() + beam * kMostPending;
        std::copy_n(w_.pending.data() + parent * kMostPending, waiting, to);
        to[waiting] = static_cast<int32_t>(w_.search->Tokens()[beam]);
        if (waiting + 1 < kMostPending) to[waiting + 1] = 0;
      }
    }
    std::swap(w_.slots, w_.next_slots);
    std::swap(w_.pending, w_.next_pending);
  }

  // Runs the waiting tokens, q a beam, through the layers; leaves the normed state of each beam's
  // last one in `last`.
  void Forward(int64_t start, int64_t q) {
    tokens_ = q;
    int64_t rows = 0;
    for (int64_t b = 0; b < batch_; ++b) {
      const auto at = static_cast<size_t>(b);
      w_.first_row[at] = rows;
      w_.rows_of[at] = w_.live[at] * q;
      rows += w_.rows_of[at];
    }
    Cut(rows, q, w_.rows_of);
    const auto pieces = static_cast<int64_t>(w_.pieces.size());
    for (int64_t l = 0; l < c_.decoder_layers; ++l) {
      Parallel(pieces, [&](int64_t worker, int64_t i) {
        Attention(l, w_.pieces[static_cast<size_t>(i)], start, q, worker);
      });
      if (c_.n_experts > 0) Experts(m_.decoder[static_cast<size_t>(l)], rows);
    }
    if (c_.n_experts > 0) {
      Parallel(pieces, [&](int64_t, int64_t i) {
        const Piece& p = w_.pieces[static_cast<size_t>(i)];
        AddExperts(p);
        KeepLast(p, q);
      });
    }
  }

  int64_t FirstRow(const Piece& p) const {
    return w_.first_row[static_cast<size_t>(p.request)] + p.begin;
  }

  // A decoder layer for some rows, all but its experts; a dense layer is finished.
  void Attention(int64_t l, const Piece& p, int64_t start, int64_t q, int64_t worker) {
    const DecoderWeights& w = m_.decoder[static_cast<size_t>(l)];
    const int64_t rows = p.end - p.begin, row = FirstRow(p), width = o_.beam_width;
    float* const x = w_.x.data() + row * d_;
    float* const qkv = w_.qkv.data() + row * 3 * d_;
    float* const normed = Scratch(worker);
    float* const queries = normed + rows * d_;
    float* const rest = queries + rows * d_;
    if (l > 0 && c_.n_experts > 0) AddExperts(p);
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
      const int64_t beam = (p.begin + r) / q, time = start + (p.begin + r) % q;
      const int64_t at = (cache + time * width + beam) * d_;
      std::memcpy(keys + at, qkv + r * 3 * d_ + d_, sizeof(float) * static_cast<size_t>(d_));
      std::memcpy(values + at, qkv + r * 3 * d_ + 2 * d_, sizeof(float) * static_cast<size_t>(d_));
    }
    int64_t* const offsets = w_.offsets.data() + worker * times_;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t beam = (p.begin + r) / q, time = start + (p.begin + r) % q;
      const int32_t* const slots = w_.slots.data() + (p.request * width + beam) * times_;
      for (int64_t t = 0; t <= time; ++t) {
        offsets[t] = (cache + t * width + (t < start ? slots[t] : beam)) * d_;
      }
      for (int64_t h = 0; h < heads_; ++h) {
        const int64_t at = h * dh_;
        f_.attend(qkv + r * 3 * d_ + at, keys + at, values + at, offsets, time + 1, dh_, scale_,
                  rest, normed + r * d_ + at);
      }
    }
    Multiply(normed, d_, rows, w.out, x, d_, true);

    Norm(x, w.cross_norm, rows, normed);
    Multiply(normed, d_, rows, w.cross_q, queries, d_, false);
    Attend(queries, d_, rows, ContextOf(w_.cross.data() + l * context_size_, p.request), rest,
           normed);
    Multiply(normed, d_, rows, w.cross_out, x, d_, true);

    if (c_.n_experts == 0) {
      DenseFeedForward(w.experts[0], w.ffn_norm, rows, x, normed);
      if (l + 1 == c_.decoder_layers) KeepLast(p, q);
      return;
    }
    float* const input = w_.normed.data() + row * d_;
    Norm(x, w.ffn_norm, rows, input);
    Multiply(input, d_, rows, w.router, rest, c_.n_experts, false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * c_.experts_per_token;
      Route(w, rest + r * c_.n_experts, w_.ids.data() + at, w_.gates.data() + at);
    }
  }

  void EmbedSession(int64_t request, int64_t row, int64_t start, int64_t q, float* x) {
    const int64_t beam = request * o_.beam_width + row / q, time = start + row % q;
    const int64_t level = time % (c_.levels + 1) - 1;
    w_.slots[static_cast<size_t>(beam * times_ + time)] = static_cast<int32_t>(row / q);
    if (level < 0) {
      std::memcpy(x, m_.bos, sizeof(float) * static_cast<size_t>(d_));
    } else {
      std::memset(x, 0, sizeof(float) * static_cast<size_t>(d_));
      AddCode(x, m_.decoder_codes, level,
              w_.pending[static_cast<size_t>(beam * kMostPending + row % q)]);
    }
    f_.add_row(x, m_.time + time * d_, false, d_);
  }

  // The best experts by probability plus bias, ties to the lower id; gates are probabilities.
  void Route(const DecoderWeights& w, float* logits, int32_t* ids, float* gates) const {
    f_.softmax(logits, c_.n_experts, 1.0f);
    float sum = 0.0f;
    for (int j = 0; j < c_.experts_per_token; ++j) {
      int32_t best = -1;
      for (int32_t e = 0; e < c_.n_experts; ++e) {
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

  // The experts' outputs for all rows: pairs of row and expert are sorted by expert (stable), and
  // each expert multiplies its rows.
  void Experts(const DecoderWeights& w, int64_t rows) {
    const int64_t k = c_.experts_per_token, hidden = c_.expert_d_ff;
    int32_t* const begin = w_.expert_begin.data();
    std::fill_n(begin, c_.n_experts + 2, 0);
    for (int64_t i = 0; i < rows * k; ++i) ++begin[w_.ids[static_cast<size_t>(i)] + 2];
    for (int32_t e = 2; e < c_.n_experts + 2; ++e) begin[e] += begin[e - 1];
    for (int64_t i = 0; i < rows * k; ++i) {  // leaves the first pair of expert e in begin[e]
      const int32_t at = begin[w_.ids[static_cast<size_t>(i)] + 1]++;
      w_.place[static_cast<size_t>(i)] = at;
      w_.sorted[static_cast<size_t>(at)] = static_cast<int32_t>(i / k);
    }
    const auto tasks = [&](int64_t columns) {
      w_.tasks.clear();
      for (int32_t e = 0; e < c_.n_experts; ++e) {
        if (begin[e] == begin[e + 1]) continue;
        for (int64_t p = 0; p * kPanelWidth < columns; p += kTaskPanels) {
          w_.tasks.emplace_back(e, static_cast<int32_t>(p));
        }
      }
      return static_cast<int64_t>(w_.tasks.size());
    };
    Parallel(tasks(hidden), [&](int64_t, int64_t i) {
      const auto [e, panel] = w_.tasks[static_cast<size_t>(i)];
      const FeedForwardWeights& ffn = w.experts[static_cast<size_t>(e)];
      const int64_t first = begin[e], column = panel * kPanelWidth;
      GemmTile tile = TileOf(ffn.gate, panel, kTaskPanels);
      tile.x = w_.normed.data();
      tile.x_stride = d_;
      tile.rows = w_.sorted.data() + first;
      tile.m = begin[e + 1] - first;
      tile.y = w_.hidden.data() + first * hidden + column;
      tile.y_stride = hidden;
      gemm_(tile);
      if (ffn.up.data != nullptr) {
        tile.weights = TileOf(ffn.up, panel, kTaskPanels).weights;
        tile.y = w_.up.data() + first * hidden + column;
        gemm_(tile);
      }
      for (int64_t r = 0; r < tile.m; ++r) {
        const int64_t at = (first + r) * hidden + column;
        f_.activate(w_.hidden.data() + at, w_.up.data() + at, tile.n, c_.activation);
      }
    });
    Parallel(tasks(d_), [&](int64_t, int64_t i) {
      const auto [e, panel] = w_.tasks[static_cast<size_t>(i)];
      const int64_t first = begin[e];
      GemmTile tile = TileOf(w.experts[static_cast<size_t>(e)].down, panel, kTaskPanels);
      tile.x = w_.hidden.data() + first * hidden;
      tile.x_stride = hidden;
      tile.m = begin[e + 1] - first;
      tile.y = w_.expert_out.data() + first * d_ + panel * kPanelWidth;
      tile.y_stride = d_;
      gemm_(tile);
    });
  }

  // x += the experts' outputs times their gates, in the order of choice.
  void AddExperts(const Piece& p) {
    const int64_t k = c_.experts_per_token, first = FirstRow(p);
    for (int64_t row = first; row < first + p.end - p.begin; ++row) {
      for (int64_t i = row * k; i < (row + 1) * k; ++i) {
        f_.add_scaled(w_.x.data() + row * d_,
                      w_.expert_out.data() + w_.place[static_cast<size_t>(i)] * d_,
                      w_.gates[static_cast<size_t>(i)], d_);
      }
    }
  }

  void KeepLast(const Piece& p, int64_t q) {
    const int64_t first = FirstRow(p);
    for (int64_t row = first + q - 1; row < first + p.end - p.begin; row += q) {
      Norm(w_.x.data() + row * d_, m_.decoder_norm, 1, w_.last.data() + row / q * d_);
    }
  }

  // Logits of all codes of a level.
  void Head(const PackedMatrix& head) {
    const int64_t width = o_.beam_width, size = c_.codebook_size;
    constexpr int64_t kGroup = 16;
    Parallel(DivideUp(head_panels_, kGroup), [&](int64_t, int64_t group) {
      GemmTile tile = TileOf(head, group * kGroup, kGroup);
      tile.x_stride = d_;
      tile.y_stride = size;
      for (int64_t b = 0; b < batch_; ++b) {
        tile.x = LastOf(b);
        tile.m = w_.live[static_cast<size_t>(b)];
        tile.y = w_.logits.data() + b * width * size + group * kGroup * kPanelWidth;
        gemm_(tile);
      }
    });
  }

  // States of a request's beams.
  const float* LastOf(int64_t b) const {
    return w_.last.data() + w_.first_row[static_cast<size_t>(b)] / tokens_ * d_;
  }

  // Logits of the legal codes alone, in their order.
  void LegalHead(const PackedMatrix& head, const LegalCodes& legal) {
    const int64_t width = o_.beam_width;
    Parallel(batch_ * width, [&](int64_t worker, int64_t beam) {
      const int32_t* const begin = legal.codes + legal.offsets[beam];
      const int32_t* const end = legal.codes + legal.offsets[beam + 1];
      if (begin == end) return;
      int32_t* const panels = w_.panels.data() + worker * head_panels_;
      float* const found = Scratch(worker);
      int64_t count = 0;
      for (const int32_t* code = begin; code < end; ++code) {
        const auto panel = static_cast<int32_t>(*code / kPanelWidth);
        if (count == 0 || panels[count - 1] != panel) panels[count++] = panel;
      }
      GemmTile tile = TileOf(head, 0, head_panels_);
      tile.x = LastOf(beam / width) + beam % width * d_;
      tile.m = 1;
      tile.panels = panels;
      tile.n = count * kPanelWidth;
      tile.y = found;
      gemm_(tile);
      float* logits = w_.logits.data() + legal.offsets[beam];
      int64_t at = 0;
      for (const int32_t* code = begin; code < end; ++code) {
        while (panels[at] != *code / kPanelWidth) ++at;
        *logits++ = found[at * kPanelWidth + *code % kPanelWidth];
      }
    });
  }

  const EngineModel::Impl& m_;
  const EngineConfig& c_;
  const std::shared_ptr<const Trie>& trie_;
  Workspace& w_;
  const EngineRequest* const requests_;
  const int64_t batch_;
  const EngineOptions& o_;
  const int64_t d_, heads_, dh_;
  const float scale_;
  const int64_t times_;
  const int workers_;
  const GemmFunction gemm_;
  const EngineKernels f_;
  int64_t context_size_ = 0;  // keys and values of one layer
  int64_t cache_size_ = 0;    // decoder keys of one layer
  int64_t scratch_size_ = 0;
  int64_t head_panels_ = 0;
  int64_t tokens_ = 1;  // of each beam in the last forward pass
};

}  // namespace

struct Engine::Impl {
  std::shared_ptr<const EngineModel> model;
  std::shared_ptr<const Trie> trie;
  std::mutex mutex;
  std::vector<std::unique_ptr<Workspace>> idle;
};

Engine::Engine(std::shared_ptr<const EngineModel> model, std::shared_ptr<const Trie> trie)
    : impl_(new Impl) {
  const EngineConfig& c = model->Config();
  const TrieView& t = trie->View();
  if (c.levels != t.levels || c.codebook_size != t.codebook_size) {
    throw std::invalid_argument("trie: wanted " + std::to_string(c.levels) + " levels of " +
                                std::to_string(c.codebook_size) + " codes as the model, got " +
                                std::to_string(t.levels) + " of " +
                                std::to_string(t.codebook_size));
  }
  impl_->model = std::move(model);
  impl_->trie = std::move(trie);
}

Engine::~Engine() = default;
const EngineModel& Engine::Model() const { return *impl_->model; }
const Trie& Engine::GetTrie() const { return *impl_->trie; }

void Engine::Run(const EngineRequest* requests, int64_t batch, const EngineOptions& options,
                 const EngineResult& result) const {
  const EngineConfig& c = impl_->model->Config();
  if (batch < 0) throw std::invalid_argument(WantedGot("batch", "0 or more", batch));
  if (options.session_length < 1 || options.session_length > c.session_length) {
    throw std::invalid_argument(WantedGot(
        "session_length", "1.." + std::to_string(c.session_length), options.session_length));
  }
  if (options.beam_width < 1 || options.beam_width > int64_t{1} << 20) {
    throw std::invalid_argument(WantedGot("beam_width", "1..1048576", options.beam_width));
  }
  if (batch == 0) return;
  std::unique_ptr<Workspace> workspace;
  {
    const std::lock_guard lock(impl_->mutex);
    if (!impl_->idle.empty()) {
      workspace = std::move(impl_->idle.back());
      impl_->idle.pop_back();
    }
  }
  if (workspace == nullptr) workspace = std::make_unique<Workspace>();
  Call(impl_->model->impl(), impl_->trie, *workspace, requests, batch, options).Run(result);
  const std::lock_guard lock(impl_->mutex);
  impl_->idle.push_back(std::move(workspace));
}

}  // namespace onerec
