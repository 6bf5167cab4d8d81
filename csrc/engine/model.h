// A model's tensors where they lie in its block of bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "onerec/engine.h"
#include "onerec/moe.h"
#include "onerec/packed_gemm.h"
#include "onerec/trie.h"
#include "support/file_block.h"

namespace onerec {

// act(gate x) * (up x), then down; `up` has no data for the plain activations.
struct FeedForwardWeights {
  PackedMatrix gate, up, down;
};

struct EncoderWeights {
  const float* attention_norm = nullptr;
  PackedMatrix qkv, out;
  const float* ffn_norm = nullptr;
  FeedForwardWeights ffn;
};

struct DecoderWeights {
  const float* attention_norm = nullptr;
  PackedMatrix qkv, out;
  const float* cross_norm = nullptr;
  PackedMatrix cross_q, cross_kv, cross_out;
  const float* ffn_norm = nullptr;
  PackedMatrix router;  // float always
  const float* selection_bias = nullptr;
  PackedExperts experts;
  FeedForwardWeights ffn;  // of a dense layer
};

struct EngineModel::Impl {
  FileBlock block;
  EngineConfig config;
  const char* codes = nullptr;          // [levels * codebook_size, d], row_bytes each
  const char* decoder_codes = nullptr;  // the same table where it is shared
  int64_t row_bytes = 0;
  PackedMatrix items;                  // [n_items, d]
  const int32_t* item_sids = nullptr;  // [n_items, levels]
  const float* start = nullptr;        // [d]
  const float* bos = nullptr;          // [d]
  const float* age = nullptr;          // [history_length, d]
  const float* time = nullptr;         // [session_length * (levels + 1), d]
  // A level's output vectors, [codebook_size, d], or with node_outputs those of the nodes behind
  // it, [nodes, d]: row e is edge e of `own`.
  std::vector<PackedMatrix> heads;
  std::shared_ptr<const Trie> own;   // of the items, with node_outputs
  std::vector<int32_t> first_codes;  // of its first level
  std::vector<EncoderWeights> encoder;
  const float* encoder_norm = nullptr;
  std::vector<DecoderWeights> decoder;
  const float* decoder_norm = nullptr;
};

}  // namespace onerec
