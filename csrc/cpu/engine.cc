#include "onerec/engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/engine_isa.h"
#include "cpu/engine_model.h"
#include "cpu/packed_gemm_tile.h"
#include "cpu/thread_pool.h"
#include "onerec/moe.h"
#include "onerec/runtime.h"

namespace onerec {
namespace {

constexpr int64_t kMostRows = 48;    // rows that one piece of work takes through a sublayer
constexpr int64_t kFewestRows = 6;   // of a block of the matrix product
constexpr int64_t kMostPending = 4;  // tokens that a beam may have waiting

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
  std::vector<float> x, normed, qkv, gates, last, logits;
  std::vector<char> experts;         // of MoeForward
  std::vector<float> context[2];     // encoder self-attention, this layer's and the next one's
  std::vector<float> cross;          // [decoder layers]
  std::vector<float> keys, values;   // [decoder layers, batch, times, width, d]
  std::vector<float> scratch;        // [workers, scratch_size]
  std::vector<int64_t> offsets;      // [workers, times]
  std::vector<float> found;          // [pairs of a beam and a panel, 16], of LegalHead
  std::vector<int32_t> panel_rows;   // [pairs], rows of `last`
  std::vector<int64_t> panel_begin;  // [panels + 2], pairs before each panel
  std::vector<int32_t> slots, next_slots;      // [batch, width, times]
  std::vector<int32_t> pending, next_pending;  // [batch, width, kMostPending]
  std::vector<int64_t> ids;                    // [rows, experts_per_token]
  std::vector<int64_t> live, first_row, rows_of, tokens_of, token_begin, key_begin, value_begin;
  std::vector<int64_t> deny, deny_offsets;
  std::vector<uint64_t> allow;
  std::vector<int32_t> sids, legal_codes;  // of items to be scored, and the codes beside theirs
  std::vector<int64_t> nodes, legal_offsets;
  std::vector<Piece> pieces;
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
        scoring_(options.scoring.value_or(c_.legal_softmax ? Scoring::kLegalSoftmax
                                                           : Scoring::kFullSoftmax)),
        workers_(std::max(options.num_threads, 1)),
        gemm_(CurrentGemm()),
        f_(CurrentKernels()) {}

  void Run(const EngineResult& result) {
    PrepareHistories();
    PrepareDecoder(scoring_ == Scoring::kLegalSoftmax ? kMostPending : 2);
    PrepareSearch();
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

  void ItemScores(float* scores) {
    PrepareHistories();
    PrepareDecoder(0);
    Encode();
    PackedGemm(w_.last.data(), batch_, d_, m_.items, scores, c_.n_items, false, workers_);
  }

  // Item i of request b is a beam that is given its codes.
  void ItemLogProbs(const int64_t* items, float* scores) {
    const int64_t count = o_.beam_width, all = batch_ * count, levels = c_.levels;
    for (int64_t i = 0; i < all; ++i) {
      if (items[i] < 0 || items[i] >= c_.n_items) {
        throw std::invalid_argument(
            WantedGot("items", "0.." + std::to_string(c_.n_items - 1), items[i]));
      }
    }
    PrepareHistories();
    PrepareDecoder(1);
    Grow(w_.sids, all * levels);
    for (int64_t i = 0; i < all; ++i) {
      std::copy_n(m_.item_sids + items[i] * levels, levels, w_.sids.data() + i * levels);
    }
    Encode();
    std::fill_n(scores, all, 0.0f);
    std::fill_n(w_.slots.data(), all * times_, 0);  // all come from the one BOS
    for (int level = 0; level < c_.levels; ++level) {
      const int64_t live = level == 0 ? 1 : count;
      w_.live.assign(static_cast<size_t>(batch_), live);
      for (int64_t i = 0; level > 0 && i < all; ++i) {
        w_.pending[static_cast<size_t>(i * kMostPending)] =
            w_.sids[static_cast<size_t>(i * levels + level - 1)];
      }
      Forward(level, 1);
      const PackedMatrix& head = m_.heads[static_cast<size_t>(level)];
      const LegalCodes legal = scoring_ == Scoring::kLegalSoftmax ? Children(level) : LegalCodes();
      const bool few = legal.codes != nullptr && Few(legal);
      few ? LegalHead(head, legal) : Head(head);
      Parallel(batch_ * live, [&](int64_t worker, int64_t row) {
        const int64_t first = row / live * count + row % live;
        const int64_t beams = level == 0 ? count : 1;
        AddLogProbs(level, legal, few, first, beams, Scratch(worker), scores);
      });
    }
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

  void PrepareHistories() {
    const int64_t columns = c_.n_items > 0 ? 1 : c_.levels;
    const int64_t values = c_.n_items > 0 ? c_.n_items : c_.codebook_size;
    w_.tokens_of.assign(static_cast<size_t>(batch_), 0);
    w_.token_begin.assign(static_cast<size_t>(batch_) + 1, 0);
    w_.key_begin.assign(static_cast<size_t>(batch_) + 1, 0);
    w_.value_begin.assign(static_cast<size_t>(batch_) + 1, 0);
    most_tokens_ = 1;
    for (int64_t b = 0; b < batch_; ++b) {
      const EngineRequest& r = requests_[b];
      if (r.items < 0 || r.items > c_.history_length) {
        throw std::invalid_argument(
            WantedGot("items of a history", "0.." + std::to_string(c_.history_length), r.items));
      }
      for (int64_t i = 0; i < r.items * columns; ++i) {
        if (r.history[i] < 0 || r.history[i] >= values) {
          throw std::invalid_argument(
              WantedGot("history", "0.." + std::to_string(values - 1), r.history[i]));
        }
      }
      const auto at = static_cast<size_t>(b);
      const int64_t tokens = 1 + r.items * (c_.history_is_items ? 1 : c_.levels);
      w_.tokens_of[at] = tokens;
      w_.token_begin[at + 1] = w_.token_begin[at] + tokens;
      w_.key_begin[at + 1] = w_.key_begin[at] + heads_ * PaddedTo16(tokens) * dh_;
      w_.value_begin[at + 1] = w_.value_begin[at] + heads_ * tokens * PaddedTo16(dh_);
      most_tokens_ = std::max(most_tokens_, tokens);
    }
    const auto last = static_cast<size_t>(batch_);
    context_size_ = w_.key_begin[last] + w_.value_begin[last];
  }

  // Buffers for at most `pending` tokens of a beam at once; 0: for the encoder alone.
  void PrepareDecoder(int64_t pending) {
    const int64_t beams = batch_ * o_.beam_width, decoder_rows = beams * pending;
    const int64_t rows = std::max(w_.token_begin[static_cast<size_t>(batch_)], decoder_rows);
    const int64_t pairs = decoder_rows * c_.experts_per_token;
    decodes_ = pending > 0;
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
      Grow(w_.gates, pairs);
      Grow(w_.ids, pairs);
      const PackedExperts& experts = m_.decoder[0].experts;
      Grow(w_.experts, MoeWorkspaceBytes(decoder_rows, c_.experts_per_token, experts) + 64);
    }
    Grow(w_.last, beams * d_);
    Grow(w_.logits, beams * c_.codebook_size);
    Grow(w_.zeros, beams);
    // A piece needs attention scores (of one head), gate and up of the dense layers, router logits.
    const int64_t piece = std::max(kMostRows, pending);
    const int64_t widest =
        std::max({most_tokens_, 2 * int64_t{c_.d_ff}, int64_t{c_.n_experts}, times_});
    scratch_size_ = piece * (widest + 2 * d_) + 2 * c_.codebook_size + kPanelWidth;
    Grow(w_.scratch, scratch_size_ * workers_);
    Grow(w_.offsets, times_ * workers_);
    head_panels_ = DivideUp(c_.codebook_size, kPanelWidth);
    Grow(w_.panel_begin, head_panels_ + 2);
    Grow(w_.slots, beams * times_);
    Grow(w_.next_slots, beams * times_);
    Grow(w_.pending, beams * kMostPending);
    Grow(w_.next_pending, beams * kMostPending);
    w_.live.assign(static_cast<size_t>(batch_), 1);
    w_.first_row.assign(static_cast<size_t>(batch_), 0);
    w_.rows_of.assign(static_cast<size_t>(batch_), 0);
    w_.pieces.reserve(static_cast<size_t>(rows + batch_));
  }

  void PrepareSearch() {
    BeamSearchOptions wanted;
    wanted.batch = batch_;
    wanted.width = o_.beam_width;
    wanted.items = o_.session_length;
    wanted.scoring = scoring_;
    wanted.temperature = o_.temperature;
    wanted.num_threads = workers_;
    const BeamSearchOptions& have = w_.search_options;
    if (w_.search == nullptr || have.batch != wanted.batch || have.width != wanted.width ||
        have.items != wanted.items || have.scoring != wanted.scoring ||
        have.temperature != wanted.temperature || have.num_threads != wanted.num_threads) {
      w_.search = std::make_unique<BeamSearch>(trie_, wanted);
      w_.search_options = wanted;
    }
    w_.deny.clear();
    w_.deny_offsets.assign(1, 0);
    w_.allow.clear();
    for (int64_t b = 0; b < batch_; ++b) {
      const EngineRequest& r = requests_[b];
      w_.deny.insert(w_.deny.end(), r.deny, r.deny + r.denied);
      w_.deny_offsets.push_back(static_cast<int64_t>(w_.deny.size()));
      w_.allow.push_back(r.allow);
    }
    BeamRequests allowed;
    allowed.allow = w_.allow.data();
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

  // out [rows, d] = attention of queries (row stride q_stride) to the first tokens of a context:
  // `seen` of them for the first row and `more` for each next one. scores: [rows, tokens].
  void Attend(const float* q, int64_t q_stride, int64_t rows, const Context& context, int64_t seen,
              int64_t more, float* scores, float* out) const {
    const int64_t tokens = context.tokens;
    for (int64_t h = 0; h < heads_; ++h) {
      const PackedMatrix keys{context.keys + h * PaddedTo16(tokens) * dh_, WeightType::kFloat32,
                              tokens, dh_};
      Multiply(q + h * dh_, q_stride, rows, keys, scores, tokens, false);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t n = seen + r * more;
        f_.softmax(scores + r * tokens, n, scale_);
        std::fill_n(scores + r * tokens + n, tokens - n, 0.0f);
      }
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

  // Positions count from the latest item, which is 0 for everybody; in a causal encoder, which must
  // not know how long the history is, from the oldest.
  void EmbedHistory(const EngineRequest& r, int64_t t, float* x) const {
    if (t == 0)
      return static_cast<void>(std::memcpy(x, m_.start, sizeof(float) * static_cast<size_t>(d_)));
    const int64_t item = c_.history_is_items ? t - 1 : (t - 1) / c_.levels;
    const int32_t* const codes = r.history + item * c_.levels;
    std::memset(x, 0, sizeof(float) * static_cast<size_t>(d_));
    if (c_.n_items > 0) {
      UnpackRow(m_.items, r.history[item], x);
    } else if (c_.history_is_items) {
      for (int64_t l = 0; l < c_.levels; ++l) AddCode(x, m_.codes, l, codes[l]);
    } else {
      AddCode(x, m_.codes, (t - 1) % c_.levels, codes[(t - 1) % c_.levels]);
    }
    f_.add_row(x, m_.age + (c_.causal ? item : r.items - 1 - item) * d_, false, d_);
  }

  // One sweep a layer: it finishes layer `layer - 1` for its rows (embeds them before the first)
  // and makes the keys and values of this one, or of the decoder's cross-attentions at the end (or
  // leaves the state of each history's last token in `last`).
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
          const Context context = ContextOf(w_.context[(layer - 1) % 2].data(), p.request);
          Attend(qkv, 3 * d_, rows, context, c_.causal ? p.begin + 1 : context.tokens, c_.causal,
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
        if (!decodes_) {
          if (p.end == w_.tokens_of[static_cast<size_t>(p.request)]) {
            Norm(x + (rows - 1) * d_, m_.encoder_norm, 1, w_.last.data() + p.request * d_);
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
          level > 0 && scoring_ != Scoring::kFullSoftmax ? &search.Legal() : nullptr;
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
    if (scoring_ != Scoring::kLegalSoftmax) return false;
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
    return panels * 2 < all;
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
      if (c_.n_experts == 0) continue;
      void* space = w_.experts.data();
      size_t bytes = w_.experts.size();
      MoeForward(w_.normed.data(), rows, d_, w_.ids.data(), w_.gates.data(), c_.experts_per_token,
                 m_.decoder[static_cast<size_t>(l)].experts, std::align(64, 1, space, bytes),
                 w_.x.data(), d_, true, workers_);
    }
    Parallel(pieces, [&](int64_t, int64_t i) { KeepLast(w_.pieces[static_cast<size_t>(i)], q); });
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
    const Context context = ContextOf(w_.cross.data() + l * context_size_, p.request);
    Attend(queries, d_, rows, context, context.tokens, 0, rest, normed);
    Multiply(normed, d_, rows, w.cross_out, x, d_, true);

    if (c_.n_experts == 0) return DenseFeedForward(w.ffn, w.ffn_norm, rows, x, normed);
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
  void Route(const DecoderWeights& w, float* logits, int64_t* ids, float* gates) const {
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

  // Logits of the legal codes alone, in their order: each panel that has one is multiplied with the
  // beams that want it.
  void LegalHead(const PackedMatrix& head, const LegalCodes& legal) {
    const int64_t width = o_.beam_width, beams = batch_ * width;
    const auto each = [&](auto&& take) {  // every pair of a beam and a panel, in order
      for (int64_t beam = 0; beam < beams; ++beam) {
        int64_t last = -1;
        for (int64_t i = legal.offsets[beam]; i < legal.offsets[beam + 1]; ++i) {
          const int64_t panel = legal.codes[i] / kPanelWidth;
          if (panel != last) take(beam, panel);
          last = panel;
        }
      }
    };
    std::fill_n(w_.panel_begin.begin(), head_panels_ + 2, 0);
    each([&](int64_t, int64_t panel) { ++w_.panel_begin[static_cast<size_t>(panel) + 2]; });
    std::partial_sum(w_.panel_begin.begin(), w_.panel_begin.begin() + head_panels_ + 2,
                     w_.panel_begin.begin());
    const int64_t pairs = w_.panel_begin[static_cast<size_t>(head_panels_) + 1];
    Grow(w_.panel_rows, pairs);
    Grow(w_.found, pairs * kPanelWidth);
    each([&](int64_t beam, int64_t panel) {  // leaves the first pair of panel p in panel_begin[p]
      const int64_t at = w_.panel_begin[static_cast<size_t>(panel) + 1]++;
      w_.panel_rows[static_cast<size_t>(at)] = static_cast<int32_t>(
          w_.first_row[static_cast<size_t>(beam / width)] / tokens_ + beam % width);
    });
    Parallel(head_panels_, [&](int64_t, int64_t panel) {
      const int64_t first = w_.panel_begin[static_cast<size_t>(panel)];
      GemmTile tile = TileOf(head, panel, 1);
      tile.x = w_.last.data();
      tile.x_stride = d_;
      tile.rows = w_.panel_rows.data() + first;
      tile.m = w_.panel_begin[static_cast<size_t>(panel) + 1] - first;
      tile.y = w_.found.data() + first * kPanelWidth;
      tile.y_stride = kPanelWidth;
      if (tile.m > 0) gemm_(tile);
    });
    std::copy_backward(w_.panel_begin.begin(), w_.panel_begin.begin() + head_panels_,
                       w_.panel_begin.begin() + head_panels_ + 1);
    int64_t at = 0;
    for (int64_t beam = 0; beam < beams; ++beam) {
      int64_t last = -1;
      for (int64_t i = legal.offsets[beam]; i < legal.offsets[beam + 1]; ++i) {
        const int64_t panel = legal.codes[i] / kPanelWidth;
        if (panel != last) at = w_.panel_begin[static_cast<size_t>(panel) + 1]++;
        last = panel;
        w_.logits[static_cast<size_t>(i)] =
            w_.found[static_cast<size_t>(at * kPanelWidth + legal.codes[i] % kPanelWidth)];
      }
    }
  }

  // The codes that may follow the first `level` ones of each item to be scored; at the root of each
  // request's first one.
  LegalCodes Children(int level) {
    const TrieView& view = trie_->View();
    const int64_t count = o_.beam_width, all = batch_ * count;
    Grow(w_.nodes, all);
    trie_->Lookup(w_.sids.data(), all, c_.levels, level, w_.nodes.data(), workers_);
    w_.legal_codes.clear();
    w_.legal_offsets.assign(1, 0);
    for (int64_t i = 0; i < all; ++i) {
      const int64_t node = w_.nodes[static_cast<size_t>(i)];
      if (node >= 0 && (level > 0 || i % count == 0)) {
        const int64_t end = view.FirstEdge(level, node + 1);
        for (int64_t edge = view.FirstEdge(level, node); edge < end; ++edge) {
          w_.legal_codes.push_back(view.Token(level, edge));
        }
      }
      w_.legal_offsets.push_back(static_cast<int64_t>(w_.legal_codes.size()));
    }
    return {w_.legal_offsets.data(), w_.legal_codes.data()};
  }

  // Adds the log-probabilities of the codes that `beams` items from `first` on have at a level,
  // given the logits of `first`. scratch: 2 codebook_size floats.
  void AddLogProbs(int level, const LegalCodes& legal, bool few, int64_t first, int64_t beams,
                   float* scratch, float* scores) const {
    const float* x = w_.logits.data() + first * c_.codebook_size;
    int64_t n = c_.codebook_size;
    const int32_t *begin = nullptr, *end = nullptr;
    if (legal.codes != nullptr) {
      begin = legal.codes + legal.offsets[first];
      end = legal.codes + legal.offsets[first + 1];
      n = end - begin;
      if (few) {
        x = w_.logits.data() + legal.offsets[first];
      } else {
        for (int64_t i = 0; i < n; ++i) scratch[i] = x[begin[i]];
        x = scratch;
      }
    }
    float log_sum = 0.0f;
    if (n > 0) {
      float* const odds = scratch + c_.codebook_size;
      std::copy_n(x, n, odds);
      const int64_t top = std::max_element(x, x + n) - x;
      f_.softmax(odds, n, 1.0f);  // the largest probability does not underflow
      log_sum = x[top] - std::log(odds[top]);
    }
    for (int64_t i = first; i < first + beams; ++i) {
      int64_t at = w_.sids[static_cast<size_t>(i * c_.levels + level)];
      if (begin != nullptr) {
        const int32_t* const found = std::lower_bound(begin, end, static_cast<int32_t>(at));
        at = found != end && *found == at ? found - begin : -1;
      }
      scores[i] += at < 0 ? -std::numeric_limits<float>::infinity() : x[at] - log_sum;
    }
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
  const Scoring scoring_;
  const int workers_;
  const GemmFunction gemm_;
  const EngineKernels f_;
  bool decodes_ = true;       // or encodes alone
  int64_t most_tokens_ = 1;   // of a history
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

namespace {

// body(workspace), with one that nobody uses.
template <class Impl, class Body>
void WithWorkspace(Impl& impl, Body&& body) {
  std::unique_ptr<Workspace> workspace;
  {
    const std::lock_guard lock(impl.mutex);
    if (!impl.idle.empty()) {
      workspace = std::move(impl.idle.back());
      impl.idle.pop_back();
    }
  }
  if (workspace == nullptr) workspace = std::make_unique<Workspace>();
  body(*workspace);
  const std::lock_guard lock(impl.mutex);
  impl.idle.push_back(std::move(workspace));
}

}  // namespace

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
  WithWorkspace(*impl_, [&](Workspace& w) {
    Call(impl_->model->impl(), impl_->trie, w, requests, batch, options).Run(result);
  });
}

void Engine::ItemScores(const EngineRequest* requests, int64_t batch, int num_threads,
                        float* scores) const {
  if (!impl_->model->Config().dense_head) {
    throw std::invalid_argument("ItemScores: the network has no dense head");
  }
  if (batch <= 0) return;
  EngineOptions options;
  options.beam_width = 1;
  options.num_threads = num_threads;
  WithWorkspace(*impl_, [&](Workspace& w) {
    Call(impl_->model->impl(), impl_->trie, w, requests, batch, options).ItemScores(scores);
  });
}

void Engine::ItemLogProbs(const EngineRequest* requests, int64_t batch, const int64_t* items,
                          int64_t count, int num_threads, float* scores) const {
  if (impl_->model->Config().n_items == 0) {
    throw std::invalid_argument("ItemLogProbs: the network does not know its items");
  }
  if (batch <= 0 || count <= 0) return;
  EngineOptions options;
  options.beam_width = count;
  options.num_threads = num_threads;
  WithWorkspace(*impl_, [&](Workspace& w) {
    Call(impl_->model->impl(), impl_->trie, w, requests, batch, options)
        .ItemLogProbs(items, scores);
  });
}

}  // namespace onerec
