// Exact beam search over a trie of semantic ids: one step, and whole sessions of items.
//
// A beam's score is the sum over its codes of x[code] / T - n(x), where x is the beam's row of
// logits and n(x) is log sum exp(x / T) over all codes (full softmax), over the legal codes (legal
// softmax) or 0 (raw). A step keeps the best beams of all legal continuations: score descending,
// then parent, then code. A NaN logit is read as -inf, and -inf is never chosen; +inf is read as
// the largest finite float. Scores are double; a sum of exponentials is made in float over 16 lanes
// in an order that no instruction set or thread count changes, so neither changes a result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "onerec/export.h"
#include "onerec/trie.h"

namespace onerec {

enum class Scoring { kFullSoftmax = 0, kLegalSoftmax = 1, kRaw = 2 };
enum class LogitType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Row r of request b starts at data + b * batch_stride + r * row_stride, in elements; its
// codebook_size elements follow one another.
struct Logits {
  const void* data = nullptr;
  LogitType type = LogitType::kFloat32;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
};

// Memory for the steps; grows when a step needs more than the ones before, and not otherwise.
// Not to be used by two steps at once.
class ONEREC_API BeamWorkspace {
 public:
  BeamWorkspace();
  ~BeamWorkspace();
  BeamWorkspace(const BeamWorkspace&) = delete;
  BeamWorkspace& operator=(const BeamWorkspace&) = delete;
  struct Impl;
  Impl& impl() { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

struct BeamStepInput {
  int64_t batch = 0;
  int64_t rows = 0;  // beams before the step
  int level = 0;     // codes that each of them has
  Logits logits;
  const double* scores = nullptr;  // [batch, rows]
  const int64_t* nodes = nullptr;  // [batch, rows], nodes of depth `level`; -1 is a dead beam
  // The rest may be null.
  const int64_t* widths = nullptr;  // [batch], most beams of a request after the step, 0 .. M
  // Edges of the level that request b must not take: dead[dead_offsets[b]] .. , ascending. The last
  // level's are leaf ids.
  const int64_t* dead = nullptr;
  const int64_t* dead_offsets = nullptr;  // [batch + 1]
  // Request b may take the edges with tags[edge] & allow[b].
  const uint64_t* tags = nullptr;   // [edges of the level]
  const uint64_t* allow = nullptr;  // [batch]
  // Items that the beams of a session have and must not reach again. The edges of item i of beam r
  // lie at paths + (b * rows + r) * path_size + i * levels.
  const int64_t* paths = nullptr;
  int64_t path_size = 0;
  int64_t items = 0;  // of every beam
  // Request b's dead leaves, whatever the level, are dead[leaf_offsets[b]] .. , ascending.
  const int64_t* leaf_offsets = nullptr;  // [batch + 1]
  // Tags of the leaves, wanted above the last level if both `paths` and `allow` are given.
  const uint64_t* leaf_tags = nullptr;
};

struct BeamStepOutput {
  int64_t width = 0;           // beams after the step, M
  int64_t* parents = nullptr;  // [batch, M], row before the step; 0 on dead rows
  int64_t* tokens = nullptr;   // [batch, M], -1 on dead rows
  int64_t* nodes =
      nullptr;  // [batch, M], nodes of depth level + 1 (leaf ids after the last level); -1
  double* scores = nullptr;  // [batch, M], descending; -inf on dead rows
  int32_t* valid = nullptr;  // [batch], live beams
};

// One step for a batch of requests.
// Throws std::invalid_argument for a size, level, temperature or node out of range, and for tags
// that are wanted and not given.
ONEREC_API void BeamStep(const TrieView& trie, const BeamStepInput& input, Scoring scoring,
                         double temperature, const BeamStepOutput& output, BeamWorkspace& workspace,
                         int num_threads);

// BeamStep on a CUDA device: every pointer is to its memory, and `stream` is a cudaStream_t.
// Nothing waits for the device and nothing is allocated, so the call can be captured in a CUDA
// graph. `trie` holds the address of a trie's bytes (Trie::Data(), aligned to 64) and, if `allow`
// is given, those of each level's tags (not read for requests with kEveryTag); `tags` and
// `leaf_tags` of the input are not read. All are read when the step runs: a captured step follows a
// change. `workspace` has CudaBeamStepBytes. A node out of range is read as a dead beam. Throws
// std::invalid_argument for more than 4096 rows or beams, std::runtime_error for an error of CUDA's
// or where onerec was built without it.
ONEREC_API void CudaBeamStep(const uint64_t* trie, int codebook_size, const BeamStepInput& input,
                             Scoring scoring, double temperature, const BeamStepOutput& output,
                             void* workspace, void* stream);
ONEREC_API size_t CudaBeamStepBytes(int64_t batch, int64_t rows, int64_t items);

struct BeamSearchOptions {
  int64_t batch = 1;
  int64_t width = 1;  // beams of a request, M; may exceed the codebook
  int64_t items = 1;  // items of a session, m
  Scoring scoring = Scoring::kFullSoftmax;
  double temperature = 1.0;
  int num_threads = 1;
  // Most beams after the first steps, 1 .. M each; M after the others.
  std::vector<int64_t> ramp;
};

// What the requests of a batch are allowed; null pointers restrict nothing.
struct BeamRequests {
  // Leaf ids denied to request b: deny[deny_offsets[b]] .. , ascending and distinct.
  const int64_t* deny = nullptr;
  const int64_t* deny_offsets = nullptr;  // [batch + 1]
  // [batch], tags that an item must have one of; kEveryTag allows all. Needs a trie with tags.
  const uint64_t* allow = nullptr;
  const int64_t* widths = nullptr;  // [batch], most beams of a request, 0 .. M
};

// The legal codes of every beam, in the order of requests, beams and codes.
struct LegalCodes {
  const int64_t* offsets = nullptr;  // [batch * M + 1], where each beam's begin
  const int32_t* codes = nullptr;    // [offsets[batch * M]]
};

// Hidden states: beam i of request b at data + b * batch_stride + i * row_stride, `size` floats.
struct HiddenRows {
  const float* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t size = 0;
  int64_t beams = 0;  // of a request, M
};

// logits[i] = the hidden state of beam rows[i] (request * M + beam) times row codes[i] of the
// output layer, at head + codes[i] * head_stride, for `count` pairs. Changes with neither threads
// nor instruction set.
ONEREC_API void LegalLogits(const HiddenRows& hidden, const float* head, int64_t head_stride,
                            const int64_t* rows, const int32_t* codes, int64_t count, float* logits,
                            int num_threads);

// Beams of `batch` requests through sessions of `items` items: after the last level a beam has an
// item and starts at the root again. A continuation is legal if it leads to an item that the trie
// has, that its request is allowed and that is not yet in its own session, so no beam meets a dead
// end.
class ONEREC_API BeamSearch {
 public:
  // Throws std::invalid_argument for an option out of range.
  BeamSearch(std::shared_ptr<const Trie> trie, const BeamSearchOptions& options);
  ~BeamSearch();
  BeamSearch(const BeamSearch&) = delete;
  BeamSearch& operator=(const BeamSearch&) = delete;

  // Starts anew, over another trie if one is given. Throws std::invalid_argument for a request out
  // of range, deny lists out of order, tags without a trie that has them, or a trie of other levels
  // or another codebook size; the search is then as it was.
  void Reset(const BeamRequests& requests, std::shared_ptr<const Trie> trie = nullptr);

  // Most rows of a request that may be live before the next step: 1 at first, then the largest of
  // the widths of the last step.
  int64_t Rows() const;
  // Extends every beam by one code; the logits have `rows` rows for a request, Rows() .. M.
  // Allocates nothing. Throws std::invalid_argument for another number of rows, std::logic_error
  // when Done().
  void Step(const Logits& logits, int64_t rows);

  // What the next step may choose from; owned by the search, valid until the next call.
  const LegalCodes& Legal();
  // Step with the logits of those codes alone, in their order: nothing else is needed under legal
  // softmax and raw scores, so a caller can multiply with the legal rows of its output layer only,
  // and give any finite logit where legal softmax leaves a beam one code. `count` is the number of
  // codes that Legal gave, which must have been called since the step before. Throws
  // std::invalid_argument for another count or full softmax, std::logic_error when Done().
  void StepLegal(const float* logits, int64_t count);

  // The last step's beams, as in BeamStepOutput; owned by the search, valid until the next call.
  const int64_t* Parents() const;
  const int64_t* Tokens() const;
  const double* Scores() const;
  const int32_t* Valid() const;
  // Copies them to the caller's arrays.
  void State(int64_t* parents, int64_t* tokens, float* scores, int32_t* valid) const;

  const std::shared_ptr<const Trie>& trie() const;
  int64_t Steps() const;             // codes that each beam has, over all items
  bool Done() const;                 // every item is finished
  void Items(int64_t* items) const;  // leaf ids [batch, M, m]; -1 if dead or not finished
  void Sids(int32_t* sids) const;    // codes [batch, M, m, L]; -1 likewise

 private:
  void Advance(const Logits& logits, bool legal_only);

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace onerec
