#include "engine/call.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "onerec/moe.h"
#include "onerec/runtime.h"
#include "support/error.h"

namespace onerec::engine {

Call::Call(const EngineModel::Impl& model, const std::shared_ptr<const Trie>& trie, Workspace& w,
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
      context_type_(c_.bfloat16 != 0 && CurrentIsa() == Isa::kAvx512Bf16 ? WeightType::kBFloat16
                                                                         : WeightType::kFloat32),
      scoring_(options.scoring.value_or(c_.legal_softmax ? Scoring::kLegalSoftmax
                                                         : Scoring::kFullSoftmax)),
      workers_(std::max(options.num_threads, 1)),
      gemm_(CurrentGemm()),
      f_(CurrentEngineKernels()) {}

void Call::Run(const EngineResult& result) {
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

void Call::ItemScores(float* scores) {
  PrepareHistories();
  PrepareDecoder(0);
  Encode();
  PackedGemm(w_.last.data(), batch_, d_, m_.items, scores, c_.n_items, false, workers_);
}

void Call::ItemLogProbs(const int64_t* items, float* scores) {
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
    w_.live.assign(batch_, live);
    for (int64_t i = 0; level > 0 && i < all; ++i) {
      w_.pending[i * kMostPending] = w_.sids[i * levels + level - 1];
    }
    TakeBeams(nullptr);
    Forward(level, 1);
    LegalCodes legal;
    if (scoring_ == Scoring::kLegalSoftmax) {
      const Trie& trie = c_.node_outputs ? *m_.own : *trie_;
      trie.Lookup(w_.sids.data(), all, levels, level, w_.nodes.data(), workers_);
      legal = Children(trie.View(), level);
    }
    const bool few = legal.codes != nullptr && Few(level, legal);
    few ? LegalHead(level, legal) : AllLogits(level);
    Parallel(batch_ * live, [&](int64_t worker, int64_t row) {
      const int64_t first = row / live * count + row % live;
      const int64_t beams = level == 0 ? count : 1;
      AddLogProbs(level, legal, few, first, beams, Scratch(worker), scores);
    });
  }
}

void Call::PrepareHistories() {
  const int64_t columns = c_.n_items > 0 ? 1 : c_.levels;
  const int64_t values = c_.n_items > 0 ? c_.n_items : c_.codebook_size;
  w_.tokens_of.assign(batch_, 0);
  w_.token_begin.assign(batch_ + 1, 0);
  w_.key_begin.assign(batch_ + 1, 0);
  w_.value_begin.assign(batch_ + 1, 0);
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
    const size_t at = b;
    const int64_t tokens = 1 + r.items * (c_.history_is_items ? 1 : c_.levels);
    w_.tokens_of[at] = tokens;
    w_.token_begin[at + 1] = w_.token_begin[at] + tokens;
    w_.key_begin[at + 1] = w_.key_begin[at] + heads_ * PackedBytes(tokens, dh_, context_type_);
    w_.value_begin[at + 1] = w_.value_begin[at] + heads_ * PackedBytes(dh_, tokens, context_type_);
    most_tokens_ = std::max(most_tokens_, tokens);
  }
  const size_t last = batch_;
  context_size_ = w_.key_begin[last] + w_.value_begin[last];
}

void Call::PrepareDecoder(int64_t pending) {
  const int64_t beams = batch_ * o_.beam_width, decoder_rows = beams * pending;
  const int64_t rows = std::max(w_.token_begin[batch_], decoder_rows);
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
  Grow(w_.nodes, beams);
  Grow(w_.next_nodes, beams);
  Grow(w_.states, batch_ * d_);
  Grow(w_.beams, beams);
  Grow(w_.last_row, beams);
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
  w_.live.assign(batch_, 1);
  w_.taken.assign(batch_, 0);
  w_.first_row.assign(batch_, 0);
  w_.rows_of.assign(batch_, 0);
  w_.pieces.reserve(rows + batch_);
}

void Call::PrepareSearch() {
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

}  // namespace onerec::engine
