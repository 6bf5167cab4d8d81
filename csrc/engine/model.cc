#include "engine/model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "gemm/tile.h"
#include "support/bfloat16.h"
#include "support/error.h"
#include "support/int_math.h"
#include "support/sealed_file.h"

namespace onerec {
namespace {

constexpr SealedKind kModelFile{"ONERENGN", 3};

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t byte_order;
  uint64_t file_bytes;
  EngineConfig config;
  int64_t nodes[kMaxTrieLevels];
  char reserved[240 - 24 - sizeof(EngineConfig) - 8 * kMaxTrieLevels];
  uint64_t content_hash;
  uint64_t header_hash;
};
static_assert(sizeof(Header) == 256 && offsetof(Header, content_hash) == 240);

[[noreturn]] void Refuse(const std::string& why) {
  throw EngineFormatError("not a valid engine model: " + why);
}

void CheckConfig(const EngineConfig& c) {
  constexpr int64_t kLarge = int64_t{1} << 20;
  CheckRange("levels", c.levels, 1, kMaxTrieLevels);
  CheckRange("codebook_size", c.codebook_size, 1, kMaxCodebookSize);
  CheckRange("session_length", c.session_length, 1, kLarge);
  CheckRange("history_length", c.history_length, 1, kLarge);
  CheckRange("history_is_items", c.history_is_items, 0, 1);
  CheckRange("causal", c.causal, 0, c.history_is_items);
  CheckRange("n_items", c.n_items, 0, c.history_is_items ? std::numeric_limits<int32_t>::max() : 0);
  CheckRange("dense_head", c.dense_head, 0, c.n_items > 0);
  CheckRange("legal_softmax", c.legal_softmax, 0, 1);
  CheckRange("node_outputs", c.node_outputs, 0, c.legal_softmax && c.n_items > 0);
  CheckRange("decoder_start", c.decoder_start, 0, c.history_is_items);
  CheckRange("d_model", c.d_model, 1, kLarge);
  CheckRange("n_heads", c.n_heads, 1, c.d_model);
  CheckRange("encoder_layers", c.encoder_layers, 1, 4096);
  CheckRange("decoder_layers", c.decoder_layers, 1, 4096);
  CheckRange("d_ff", c.d_ff, 1, kLarge);
  CheckRange("n_experts", c.n_experts, 0, 65536);
  if (c.n_experts > 0) {
    CheckRange("experts_per_token", c.experts_per_token, 1, std::min(c.n_experts, 64));
    CheckRange("expert_d_ff", c.expert_d_ff, 1, kLarge);
  }
  CheckRange("normalize_gates", c.normalize_gates, 0, 1);
  CheckRange("activation", c.activation, 0, 3);
  CheckRange("share_codes", c.share_codes, 0, 1);
  CheckRange("bfloat16", c.bfloat16, 0, 1);
  if (c.d_model % c.n_heads != 0) throw std::invalid_argument("n_heads must divide d_model");
  if (!(c.norm_eps >= 0.0f && std::isfinite(c.norm_eps))) {
    throw std::invalid_argument("norm_eps must be finite and not negative");
  }
}

void SetTrie(EngineModel::Impl& m, const int32_t* sids) {
  const EngineConfig& c = m.config;
  m.own = Trie::Build(sids, c.n_items, c.levels, c.levels, c.codebook_size);
  const TrieView& view = m.own->View();
  m.first_codes.clear();
  for (int64_t edge = 0; edge < view.nodes[1]; ++edge) {
    m.first_codes.push_back(view.Token(0, edge));
  }
}

// Walks the tensors of a model in file order. Sizes them; where `base` is given, sets the views;
// where `source` is given, writes them too. nodes[l]: those behind level l, with node_outputs.
// Throws std::invalid_argument where the tensors would pass `most` bytes.
class Walk {
 public:
  Walk(EngineModel::Impl& model, const int64_t* nodes, char* base,
       const EngineModel::Source* source, int num_threads,
       uint64_t most = std::numeric_limits<uint64_t>::max())
      : m_(model),
        c_(model.config),
        nodes_(nodes),
        base_(base),
        source_(source),
        threads_(num_threads),
        most_(most) {}

  // Refuses, with std::invalid_argument, weights that are not finite and codes out of range.
  void Check() {
    check_ = true;
    Run();
  }

  uint64_t Run() {
    const int64_t d = c_.d_model, rows = int64_t{c_.levels} * c_.codebook_size;
    const auto type = c_.bfloat16 ? WeightType::kBFloat16 : WeightType::kFloat32;
    m_.row_bytes = d * (c_.bfloat16 ? 2 : 4);
    m_.codes = Table("codes.weight", rows);
    m_.decoder_codes = c_.share_codes ? m_.codes : Table("decoder_codes.weight", rows);
    m_.heads.resize(c_.levels);
    for (int l = 0; l < c_.levels; ++l) {
      PackedMatrix& head = m_.heads[l];
      if (c_.node_outputs) {
        Matrix(head, "nodes." + std::to_string(l), nodes_[l], 0, nodes_[l], d, type);
      } else {
        Matrix(head, "heads", rows, int64_t{l} * c_.codebook_size, c_.codebook_size, d, type);
      }
    }
    if (c_.n_items > 0) {
      Matrix(m_.items, "item_table", c_.n_items, 0, c_.n_items, d, type);
      m_.item_sids = Integers("item_sids", int64_t{c_.n_items} * c_.levels);
    }
    m_.start = Vector("start", d);
    m_.bos = Vector("bos", d);
    m_.age = Vector("age.weight", c_.history_length * d);
    m_.time = Vector("time.weight", int64_t{c_.session_length} * (c_.levels + 1) * d);
    m_.encoder.resize(c_.encoder_layers);
    for (int i = 0; i < c_.encoder_layers; ++i) {
      EncoderWeights& w = m_.encoder[i];
      const std::string name = "encoder." + std::to_string(i) + ".";
      w.attention_norm = Vector(name + "attention_norm.weight", d);
      Matrix(w.qkv, name + "attention.qkv.weight", 3 * d, 0, 3 * d, d, type);
      Matrix(w.out, name + "attention.out.weight", d, 0, d, d, type);
      w.ffn_norm = Vector(name + "ffn_norm.weight", d);
      FeedForward(w.ffn, name + "ffn.w13.weight", name + "ffn.w2.weight", 0, 1, c_.d_ff);
    }
    m_.encoder_norm = Vector("encoder_norm.weight", d);
    m_.decoder.resize(c_.decoder_layers);
    for (int i = 0; i < c_.decoder_layers; ++i) {
      DecoderWeights& w = m_.decoder[i];
      const std::string name = "decoder." + std::to_string(i) + ".";
      w.attention_norm = Vector(name + "attention_norm.weight", d);
      Matrix(w.qkv, name + "attention.qkv.weight", 3 * d, 0, 3 * d, d, type);
      Matrix(w.out, name + "attention.out.weight", d, 0, d, d, type);
      w.cross_norm = Vector(name + "cross_norm.weight", d);
      Matrix(w.cross_q, name + "cross.q.weight", d, 0, d, d, type);
      Matrix(w.cross_kv, name + "cross.kv.weight", 2 * d, 0, 2 * d, d, type);
      Matrix(w.cross_out, name + "cross.out.weight", d, 0, d, d, type);
      w.ffn_norm = Vector(name + "ffn_norm.weight", d);
      if (c_.n_experts == 0) {
        FeedForward(w.ffn, name + "ffn.w13.weight", name + "ffn.w2.weight", 0, 1, c_.d_ff);
        continue;
      }
      Matrix(w.router, name + "ffn.router", c_.n_experts, 0, c_.n_experts, d, WeightType::kFloat32);
      w.selection_bias = Vector(name + "ffn.selection_bias", c_.n_experts);
      for (int e = 0; e < c_.n_experts; ++e) {
        FeedForwardWeights expert;
        const uint64_t begin = at_;
        FeedForward(expert, name + "ffn.w13", name + "ffn.w2", e, c_.n_experts, c_.expert_d_ff);
        if (e > 0) continue;  // the others follow it
        w.experts = {expert.gate.data,
                     expert.up.data,
                     expert.down.data,
                     type,
                     static_cast<Activation>(c_.activation),
                     c_.n_experts,
                     d,
                     c_.expert_d_ff};
        w.experts.stride = static_cast<int64_t>(at_ - begin);
      }
    }
    m_.decoder_norm = Vector("decoder_norm.weight", d);
    return at_;
  }

 private:
  char* Take(int64_t bytes) {
    char* const here = base_ == nullptr ? nullptr : base_ + at_;
    at_ += RoundUp(static_cast<uint64_t>(bytes), 64);
    if (at_ > most_) throw std::invalid_argument("its tensors do not fill the file");
    return here;
  }

  // Words with all bits of the exponent set are infinite or no number.
  template <class Word>
  void CheckFinite(const std::string& name, const char* data, int64_t bytes, Word exponent) const {
    if (!check_) return;
    const auto* const words = reinterpret_cast<const Word*>(data);
    int64_t wrong = 0;
    for (int64_t i = 0; i < bytes / static_cast<int64_t>(sizeof(Word)); ++i) {
      wrong += (words[i] & exponent) == exponent;
    }
    if (wrong != 0) {
      throw std::invalid_argument(WantedGot(name, "finite weights", wrong, " others"));
    }
  }
  void CheckFinite(const std::string& name, const char* data, int64_t bytes, bool halves) const {
    if (halves) {
      CheckFinite<uint16_t>(name, data, bytes, 0x7f80);
    } else {
      CheckFinite<uint32_t>(name, data, bytes, 0x7f800000);
    }
  }

  const float* Vector(const std::string& name, int64_t n) {
    char* const here = Take(n * 4);
    if (source_ != nullptr) {
      std::memcpy(here, (*source_)(name, n), n * 4);
    }
    CheckFinite(name, here, n * 4, false);
    return reinterpret_cast<const float*>(here);
  }

  const int32_t* Integers(const std::string& name, int64_t n) {
    auto* const here = reinterpret_cast<int32_t*>(Take(n * 4));
    if (source_ != nullptr) {
      const float* const from = (*source_)(name, n);
      for (int64_t i = 0; i < n; ++i) here[i] = static_cast<int32_t>(from[i]);
    }
    for (int64_t i = 0; i < (check_ ? n : 0); ++i) {
      if (here[i] < 0 || here[i] >= c_.codebook_size) {
        throw std::invalid_argument(
            WantedGot(name, Text("codes in [0, ", c_.codebook_size, ")"), here[i]));
      }
    }
    return here;
  }

  // A table whose rows are read one at a time.
  const char* Table(const std::string& name, int64_t rows) {
    char* const here = Take(rows * m_.row_bytes);
    if (source_ != nullptr) {
      const int64_t n = rows * c_.d_model;
      const float* const from = (*source_)(name, n);
      if (c_.bfloat16) {
        auto* const to = reinterpret_cast<uint16_t*>(here);
        for (int64_t i = 0; i < n; ++i) to[i] = RoundToBFloat16(from[i]);
      } else {
        std::memcpy(here, from, n * 4);
      }
    }
    CheckFinite(name, here, rows * m_.row_bytes, c_.bfloat16 != 0);
    return here;
  }

  // Rows first .. first + n of a tensor of all_rows rows.
  void Matrix(PackedMatrix& to, const std::string& name, int64_t all_rows, int64_t first, int64_t n,
              int64_t k, WeightType type) {
    char* const here = Take(PackedBytes(n, k, type));
    to = {here, type, n, k};
    if (source_ != nullptr) {
      PackWeights((*source_)(name, all_rows * k) + first * k, n, k, k, type, here, threads_);
    }
    CheckFinite(name, here, PackedBytes(n, k, type), type == WeightType::kBFloat16);
  }

  // Expert e of `experts`; the gate half of w13 comes first.
  void FeedForward(FeedForwardWeights& to, const std::string& w13, const std::string& w2, int64_t e,
                   int64_t experts, int64_t hidden) {
    const int64_t d = c_.d_model, halves = c_.activation < 2 ? 2 : 1, rows = hidden * halves;
    const auto type = c_.bfloat16 ? WeightType::kBFloat16 : WeightType::kFloat32;
    Matrix(to.gate, w13, experts * rows, e * rows, hidden, d, type);
    if (halves == 2) Matrix(to.up, w13, experts * rows, e * rows + hidden, hidden, d, type);
    Matrix(to.down, w2, experts * d, e * d, d, hidden, type);
  }

  EngineModel::Impl& m_;
  const EngineConfig& c_;
  const int64_t* const nodes_;
  char* const base_;
  const EngineModel::Source* const source_;
  const int threads_;
  const uint64_t most_;
  bool check_ = false;
  uint64_t at_ = sizeof(Header);
};

}  // namespace

EngineModel::EngineModel() : impl_(new Impl) {}
EngineModel::~EngineModel() = default;
const EngineConfig& EngineModel::Config() const { return impl_->config; }
size_t EngineModel::Bytes() const { return impl_->block.size(); }
const int32_t* EngineModel::ItemSids() const { return impl_->item_sids; }
void EngineModel::Save(const std::string& path) const {
  SaveBytes(path, impl_->block.data(), impl_->block.size());
}

std::shared_ptr<const EngineModel> EngineModel::Build(const EngineConfig& config,
                                                      const Source& source, int num_threads) {
  CheckConfig(config);
  std::shared_ptr<EngineModel> model(new EngineModel);
  Impl& m = *model->impl_;
  m.config = config;
  Header header{};
  Name(header, kModelFile);
  header.config = config;
  if (config.node_outputs) {
    const int64_t codes = int64_t{config.n_items} * config.levels;
    const float* const from = source("item_sids", codes);
    std::vector<int32_t> sids(codes);
    for (size_t i = 0; i < sids.size(); ++i) sids[i] = static_cast<int32_t>(from[i]);
    SetTrie(m, sids.data());
    std::copy_n(m.own->View().nodes + 1, config.levels, header.nodes);
  }
  header.file_bytes = Walk(m, header.nodes, nullptr, nullptr, num_threads).Run();
  m.block = FileBlock::Allocate(header.file_bytes);
  std::memset(m.block.data(), 0, m.block.size());
  Walk(m, header.nodes, m.block.data(), &source, num_threads).Run();
  Walk(m, header.nodes, m.block.data(), nullptr, num_threads).Check();
  Seal(header, m.block.data());
  return model;
}

std::shared_ptr<const EngineModel> EngineModel::Load(const std::string& path) {
  std::shared_ptr<EngineModel> model(new EngineModel);
  Impl& m = *model->impl_;
  m.block = FileBlock::Map(path);
  const auto h = ReadHeader<Header>(m.block.data(), m.block.size(), kModelFile, Refuse);
  try {
    CheckConfig(h.config);
  } catch (const std::invalid_argument& error) {
    Refuse(error.what());
  }
  m.config = h.config;
  for (int l = 0; l < (h.config.node_outputs ? h.config.levels : 0); ++l) {
    if (h.nodes[l] < 1 || h.nodes[l] > h.config.n_items) {
      Refuse(WantedGot(Text("nodes behind level ", l), Text("1..", h.config.n_items), h.nodes[l]));
    }
  }
  try {
    Walk walk(m, h.nodes, m.block.data(), nullptr, 1, h.file_bytes);
    if (walk.Run() != h.file_bytes) Refuse("its tensors do not fill the file");
    CheckContent(h, m.block.data(), Refuse);
    Walk(m, h.nodes, m.block.data(), nullptr, 1, h.file_bytes).Check();
  } catch (const std::invalid_argument& error) {
    Refuse(error.what());
  }
  if (h.config.node_outputs) {
    SetTrie(m, m.item_sids);
    if (!std::equal(h.nodes, h.nodes + h.config.levels, m.own->View().nodes + 1)) {
      Refuse("its nodes are not those of its items");
    }
  }
  return model;
}

}  // namespace onerec
