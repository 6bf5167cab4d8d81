#include "onerec/engine.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "engine/call.h"
#include "support/error.h"

namespace onerec {

using engine::Call;
using engine::Workspace;

struct Engine::Impl {
  std::shared_ptr<const EngineModel> model;
  std::shared_ptr<const Trie> trie;
  std::mutex mutex;
  std::vector<std::unique_ptr<Workspace>> idle;
};

namespace {

// Refuses live leaves of a trie that are none of the network's items, which have no output vectors.
void CheckKnown(const Trie& own, const Trie& trie) {
  if (own.Bytes() == trie.Bytes() && std::memcmp(own.Data(), trie.Data(), own.Bytes()) == 0) return;
  const TrieView& view = trie.View();
  const int levels = view.levels;
  const std::vector<int64_t>& dead = trie.Dead(levels - 1);
  std::vector<int32_t> sid(levels);
  for (int64_t leaf = 0; leaf < view.Leaves(); ++leaf) {
    int64_t node = 0;
    trie.LeafSids(&leaf, 1, sid.data());
    own.Lookup(sid.data(), 1, levels, levels, &node, 1);
    if (node >= 0 || std::binary_search(dead.begin(), dead.end(), leaf)) continue;
    std::string codes;
    for (int32_t code : sid) codes += (codes.empty() ? "" : ", ") + std::to_string(code);
    throw std::invalid_argument(
        "trie: wanted semantic ids of the network's items, which alone have output vectors, got [" +
        codes + "]");
  }
}

}  // namespace

Engine::Engine(std::shared_ptr<const EngineModel> model, std::shared_ptr<const Trie> trie)
    : impl_(new Impl) {
  const EngineConfig& c = model->Config();
  const TrieView& t = trie->View();
  if (c.levels != t.levels || c.codebook_size != t.codebook_size) {
    throw std::invalid_argument(
        WantedGot("trie", Text(c.levels, " levels of ", c.codebook_size, " codes as the model"),
                  t.levels, " of ", t.codebook_size));
  }
  if (c.node_outputs) CheckKnown(*model->impl().own, *trie);
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
