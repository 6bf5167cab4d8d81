// One call of the engine: what it works on, and its parts, which lie in files of their own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/kernels_isa.h"
#include "engine/model.h"
#include "gemm/tile.h"
#include "onerec/engine.h"
#include "support/aligned_vector.h"
#include "support/int_math.h"
#include "support/thread_pool.h"

namespace onerec::engine {

inline constexpr int64_t kMostRows = 48;    // rows that one piece of work takes through a sublayer
inline constexpr int64_t kFewestRows = 6;   // of a block of the matrix product on AVX2
inline constexpr int64_t kMostPending = 4;  // tokens that a beam may have waiting

// Rows [begin, end) of one request.
struct Piece {
  int64_t request, begin, end;
};

// Keys and values of one layer and request, packed as matrices for each head.
struct Context {
  char* keys;    // heads times [T, dh]
  char* values;  // heads times [dh, T]
  int64_t tokens;
};

struct AtNode {
  int64_t node, beam;
};

// Beams of `at_nodes` that are at one node, and the panels that have its children.
struct NodeGroup {
  int64_t begin, end, first_panel, panels;
  int64_t found;  // where its products begin in Workspace::found, a row a beam
};

// Buffers of one call; kept for the next.
struct Workspace {
  LineVector<float> x, normed, qkv, gates, last, logits;
  LineVector<float> states;          // [batch, d], of the encoder at the latest item
  std::vector<char> experts;         // of MoeForward
  LineVector<char> context[2];       // encoder self-attention, this layer's and the next one's
  LineVector<char> cross;            // [decoder layers]
  LineVector<float> keys, values;    // [decoder layers, batch, times, width, d]
  LineVector<float> scratch;         // [workers, scratch_size]
  std::vector<int64_t> offsets;      // [workers, times]
  LineVector<float> found;           // [pairs of a beam and a panel, 16], of legal codes' panels
  std::vector<int32_t> panel_rows;   // [pairs], rows of `last`; with node_outputs [beams]
  std::vector<int32_t> beams;        // [batch, width], the beams that a pass runs come first
  std::vector<int32_t> last_row;     // [batch, width], a beam's row of `last`
  std::vector<int64_t> panel_begin;  // [panels + 2], pairs before each panel
  std::vector<int32_t> slots, next_slots;      // [batch, width, times]
  std::vector<int32_t> pending, next_pending;  // [batch, width, kMostPending]
  std::vector<int64_t> ids;                    // [rows, experts_per_token]
  std::vector<int64_t> live, taken, first_row, rows_of, tokens_of, token_begin, key_begin,
      value_begin;
  std::vector<int64_t> deny, deny_offsets;
  std::vector<uint64_t> allow;
  std::vector<int32_t> sids, legal_codes;  // of items to be scored, and the codes beside theirs
  std::vector<int64_t> legal_offsets;
  std::vector<int64_t> nodes, next_nodes;  // [batch, width], where each beam's unfinished item is
  std::vector<AtNode> at_nodes;            // beams that want logits, in the order of their nodes
  std::vector<NodeGroup> groups;           // of beams at one node
  std::vector<Piece> pieces;
  std::unique_ptr<BeamSearch> search;
  BeamSearchOptions search_options;
};

class Call {
 public:
  Call(const EngineModel::Impl& model, const std::shared_ptr<const Trie>& trie, Workspace& w,
       const EngineRequest* requests, int64_t batch, const EngineOptions& options);

  void Run(const EngineResult& result);

  void ItemScores(float* scores);

  // Item i of request b is a beam that is given its codes.
  void ItemLogProbs(const int64_t* items, float* scores);

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

  // Preparation: checks, and buffers as large as the call needs.

  void PrepareHistories();

  // Buffers for at most `pending` tokens of a beam at once; 0: for the encoder alone.
  void PrepareDecoder(int64_t pending);

  void PrepareSearch();

  // Parts of layers (layers.cc).

  // y [m, w.n] = or += x W^T on this thread.
  void Multiply(const float* x, int64_t x_stride, int64_t m, const PackedMatrix& w, float* y,
                int64_t y_stride, bool add) const;

  void Norm(const float* x, const float* weight, int64_t rows, float* out) const;

  // Cuts each request's rows into pieces of whole multiples of `unit`.
  void Cut(int64_t rows_all, int64_t unit, const std::vector<int64_t>& counts);

  Context ContextOf(char* base, int64_t b) const {
    const auto at = b, all = batch_;
    return {base + w_.key_begin[at], base + w_.key_begin[all] + w_.value_begin[at],
            w_.tokens_of[at]};
  }

  // Puts the keys and values of token t, d floats each, into their panels.
  void PackToken(const Context& to, int64_t t, const float* key, const float* value) const;

  // out [rows, d] = attention of queries (row stride q_stride) to the first tokens of a context:
  // `seen` of them for the first row and `more` for each next one. scores: [rows, tokens].
  void Attend(const float* q, int64_t q_stride, int64_t rows, const Context& context, int64_t seen,
              int64_t more, float* scores, float* out) const;

  // x += w2 act(w13 x), the norm included; scratch: 2 d_ff + d floats a row.
  void DenseFeedForward(const FeedForwardWeights& w, const float* norm, int64_t rows, float* x,
                        float* scratch) const;

  void AddCode(float* x, const char* table, int64_t level, int64_t code) const;

  // Encoder (encoder.cc).

  // Positions count from the latest item, which is 0 for everybody; in a causal encoder, which must
  // not know how long the history is, from the oldest.
  void EmbedHistory(const EngineRequest& r, int64_t t, float* x) const;

  // One sweep a layer: it finishes layer `layer - 1` for its rows (embeds them before the first)
  // and makes the keys and values of this one, or of the decoder's cross-attentions at the end (or
  // leaves the state of each history's last token in `last`).
  void Encode();

  // Decoder (decoder.cc).

  void Decode();

  // Takes the live beams, or those of them that are not forced; returns how many.
  int64_t TakeBeams(const LegalCodes* legal);

  // Whether the tokens of all beams had better wait for a later pass. The beams that are not
  // forced, which are taken, then run apart for their logits, and once more with the others; after
  // the last code nobody does.
  bool MayWait(const LegalCodes& legal, int64_t waiting);

  // Goes on with the beams that the last step kept: ancestors and waiting tokens follow.
  void Choose(int64_t start, int64_t waiting);

  // Runs the waiting tokens, q a beam, of the beams that are taken through the layers; leaves the
  // normed state of each one's last in `last`.
  void Forward(int64_t start, int64_t q);

  int64_t FirstRow(const Piece& p) const { return w_.first_row[p.request] + p.begin; }

  // The beam of a row of a request.
  int64_t BeamOf(int64_t request, int64_t row, int64_t q) const {
    return w_.beams[request * o_.beam_width + row / q];
  }

  // A decoder layer for some rows, all but its experts; a dense layer is finished. The last layer
  // goes on in `last`, with the last token of each beam alone.
  void Attention(int64_t l, const Piece& p, int64_t start, int64_t q, int64_t worker);

  void EmbedSession(int64_t request, int64_t row, int64_t start, int64_t q, float* x);

  // The best experts by probability plus bias, ties to the lower id; gates are probabilities.
  void Route(const DecoderWeights& w, float* logits, int64_t* ids, float* gates) const;

  // Output layer (head.cc).

  // Whether a beam needs no logits: under the legal softmax an only code has probability 1.
  bool Forced(const LegalCodes& legal, int64_t beam) const {
    return scoring_ == Scoring::kLegalSoftmax && legal.offsets[beam + 1] - legal.offsets[beam] <= 1;
  }

  // Whether the legal codes are so few that their panels are less work than all of them.
  // With node_outputs they always are, but for the root's.
  bool Few(int level, const LegalCodes& legal) const;

  // Logits of all codes of a level, for all live beams; with node_outputs -inf for those that are
  // no children of the beam's node.
  void AllLogits(int level);

  // Logits of all rows of a head, for all live beams.
  void Head(const PackedMatrix& head);

  // States of a request's beams.
  const float* LastOf(int64_t b) const { return w_.last.data() + w_.first_row[b] / tokens_ * d_; }

  // Logits of the legal codes alone, in their order: each panel that has one is multiplied with the
  // beams that want it. A forced code's is 0.
  void LegalHead(int level, const LegalCodes& legal);

  // The same of children of the beams' nodes: their vectors lie together.
  void NodeHead(int level, const LegalCodes& legal);

  // The node behind a code of a node, both being the network's.
  int64_t Child(int level, int64_t node, int64_t code) const;

  // The codes that follow the nodes of all live beams in a trie.
  LegalCodes Children(const TrieView& view, int level);

  // Adds the log-probabilities of the codes that `beams` items from `first` on have at a level,
  // given the logits of `first`. scratch: 2 codebook_size floats.
  void AddLogProbs(int level, const LegalCodes& legal, bool few, int64_t first, int64_t beams,
                   float* scratch, float* scores) const;

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
  const WeightType context_type_;  // of the keys and values of a context
  const Scoring scoring_;
  const int workers_;
  const GemmFunction gemm_;
  const EngineKernels f_;
  bool decodes_ = true;       // or encodes alone
  int64_t most_tokens_ = 1;   // of a history
  int64_t context_size_ = 0;  // bytes of the keys and values of one layer
  int64_t cache_size_ = 0;    // decoder keys of one layer
  int64_t scratch_size_ = 0;
  int64_t head_panels_ = 0;
  int64_t tokens_ = 1;  // of each beam in the last forward pass
};

}  // namespace onerec::engine
