// The whole network on the CPU: a history in, the best sessions of items out, in one call.
//
// A model is one read-only block of bytes, the same in memory and in a file, so that processes
// share the pages of a mapped file. A result depends on its own request alone, bit for bit: not on
// the other requests of a call, nor on the number of threads.
//
// File format, version 3, little endian: char[8] "ONERENGN", u32 version, u32 0x01020304, u64 size
// of the file, EngineConfig, i64[8] nodes behind each level of the items' trie (zeros without
// node_outputs), zeros up to byte 240, u64 XXH64 (seed 0) of bytes 256 .. end, u64 XXH64 of bytes
// 0 .. 248; then the tensors in the order and the packed form that the config and the nodes imply
// (csrc/engine/model.cc), each at the next multiple of 64.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "onerec/beam_search.h"
#include "onerec/export.h"
#include "onerec/trie.h"

namespace onerec {

// A file that is no valid model or catalogue: truncated, corrupt, of another version or byte order.
class ONEREC_API EngineFormatError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What the network is made of; the fields of onerec.OneRecConfig that decoding needs.
struct EngineConfig {
  int32_t levels = 3;
  int32_t codebook_size = 0;
  int32_t session_length = 1;    // most items of a session
  int32_t history_length = 1;    // most items of a history
  int32_t history_is_items = 0;  // 1: the encoder reads a token an item; 0: a token a code
  int32_t causal = 0;   // 1: a history item sees earlier ones alone, and its position is its place
  int32_t n_items = 0;  // above 0 the network knows its items: a history is their indices
  int32_t dense_head = 0;     // 1: it has scores for each of them too
  int32_t legal_softmax = 0;  // 1: trained with the softmax over legal codes, Scoring's default
  // 1: the output vectors are those of the nodes of the items' trie in place of the codes'; needs
  // n_items and legal_softmax.
  int32_t node_outputs = 0;
  int32_t decoder_start = 0;  // what a BOS reads: 0 its vector, 1 the encoder's last state too
  int32_t d_model = 0;
  int32_t n_heads = 1;
  int32_t encoder_layers = 1;
  int32_t decoder_layers = 1;
  int32_t d_ff = 0;
  int32_t n_experts = 0;  // 0: dense decoder
  int32_t experts_per_token = 0;
  int32_t expert_d_ff = 0;
  int32_t normalize_gates = 0;
  int32_t activation = 0;   // 0 swiglu, 1 geglu, 2 gelu, 3 relu
  int32_t share_codes = 1;  // encoder and decoder read one code table
  // Matrices in bfloat16. Sums are float always; activations too, but for the dot products of
  // onerec/packed_gemm.h, with which the keys and values of histories are bfloat16 as well.
  int32_t bfloat16 = 0;
  float norm_eps = 1e-6f;
};

class ONEREC_API EngineModel {
 public:
  // Gives the float32 values of a tensor of the PyTorch network, contiguous, by its name in the
  // state dict ("encoder.0.attention.qkv.weight") and number of elements.
  using Source = std::function<const float*(const std::string& name, int64_t elements)>;

  // Packs a network. Throws std::invalid_argument for a config out of range, and what `source`
  // throws.
  // With n_items, "item_table" [n_items, d_model] holds the vectors of the dense head, which are
  // also what the encoder reads, and "item_sids" [n_items, levels] the items' codes. With
  // node_outputs "nodes.0" [nodes, d_model] and so on hold the output vectors of the nodes behind
  // each level, in lexicographic order of their codes.
  static std::shared_ptr<const EngineModel> Build(const EngineConfig& config, const Source& source,
                                                  int num_threads);
  // Maps a file and checks header, sizes and hashes. Throws EngineFormatError for a bad file,
  // std::runtime_error if it cannot be read.
  static std::shared_ptr<const EngineModel> Load(const std::string& path);
  ~EngineModel();
  EngineModel(const EngineModel&) = delete;
  EngineModel& operator=(const EngineModel&) = delete;

  // Writes beside `path` and renames. Throws std::runtime_error if it cannot be written.
  void Save(const std::string& path) const;
  const EngineConfig& Config() const;
  size_t Bytes() const;
  // [n_items, levels], the semantic ids of its items; null without any.
  const int32_t* ItemSids() const;

  struct Impl;
  const Impl& impl() const { return *impl_; }

 private:
  EngineModel();
  std::unique_ptr<Impl> impl_;
};

struct EngineRequest {
  // Oldest first: [items, levels] codes, or [items] indices for a network with n_items.
  const int32_t* history = nullptr;
  int64_t items = 0;              // 0 .. history_length
  const int64_t* deny = nullptr;  // leaf ids never to give, ascending and distinct
  int64_t denied = 0;
  uint64_t allow = kEveryTag;  // an item must have one of these tags; needs a trie with tags
};

struct EngineOptions {
  int64_t beam_width = 128;
  int64_t session_length = 1;      // items of every session, at most the model's
  std::optional<Scoring> scoring;  // none: the softmax that the network was trained with
  double temperature = 1.0;
  int num_threads = 1;
};

// The caller's arrays; rows past `valid` hold -1 and -inf.
struct EngineResult {
  int64_t* items = nullptr;  // [batch, beam_width, session_length], leaf ids, best session first
  int32_t* sids = nullptr;   // [batch, beam_width, session_length, levels]; may be null
  float* scores = nullptr;   // [batch, beam_width]
  int32_t* valid = nullptr;  // [batch]
};

// A model and a catalogue's trie. Threads may share one engine: a call takes a workspace of its
// own, which is kept for later calls and grows when one is larger. The steps of a call allocate
// nothing under full softmax; with the other scorings the list of legal codes may grow.
class ONEREC_API Engine {
 public:
  // Throws std::invalid_argument if levels or codebook sizes differ, or, for a network with
  // node_outputs, if the trie has a live leaf that is none of the network's items.
  Engine(std::shared_ptr<const EngineModel> model, std::shared_ptr<const Trie> trie);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Throws std::invalid_argument for an option, a code or a leaf out of range.
  void Run(const EngineRequest* requests, int64_t batch, const EngineOptions& options,
           const EngineResult& result) const;

  // scores [batch, n_items]: the dense head's logits of every item as the next one. Reads `history`
  // and `items` of a request. Throws std::invalid_argument for a network without a dense head or an
  // index out of range.
  void ItemScores(const EngineRequest* requests, int64_t batch, int num_threads,
                  float* scores) const;
  // scores [batch, count]: log-probabilities of items [batch, count] (indices) as the first of the
  // session, by their codes and the softmax that the network was trained with. Throws
  // std::invalid_argument for a network without n_items or an index out of range.
  void ItemLogProbs(const EngineRequest* requests, int64_t batch, const int64_t* items,
                    int64_t count, int num_threads, float* scores) const;

  const EngineModel& Model() const;
  const Trie& GetTrie() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace onerec
