#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "beam/step.h"
#include "onerec/beam_search.h"
#include "support/error.h"
#include "support/thread_pool.h"

namespace onerec {

struct BeamSearch::Impl {
  Impl(std::shared_ptr<const Trie> t, const BeamSearchOptions& o)
      : trie(std::move(t)), options(o), levels(trie->View().levels) {
    const size_t beams = o.batch * o.width;
    path_size = o.items * levels;
    for (int side = 0; side < 2; ++side) {
      scores[side].resize(beams);
      nodes[side].resize(beams);
      paths[side].resize(beams * path_size);
    }
    parents.resize(beams);
    tokens.resize(beams);
    valid.resize(o.batch);
    widths.resize(o.batch);
    step_widths.resize(o.batch);
    filters.resize(o.batch);
    ReserveStep(workspace.impl(), o.batch, o.width, o.width, trie->View().codebook_size, o.items,
                o.num_threads);
  }

  int64_t Ramp(int64_t step) const {
    return step < static_cast<int64_t>(options.ramp.size()) ? options.ramp[step] : options.width;
  }

  OwnItems Own() const {
    return {&trie->View(), trie.get(), nullptr, paths[side].data(), path_size, steps / levels};
  }

  std::shared_ptr<const Trie> trie;
  BeamSearchOptions options;
  int levels;
  int64_t path_size;
  int64_t steps = 0;
  int side = 0;  // of the current beams
  std::vector<double> scores[2];
  std::vector<int64_t> nodes[2];
  std::vector<int64_t> paths[2];
  std::vector<int64_t> parents, tokens;
  std::vector<int32_t> valid;
  std::vector<int64_t> widths;       // of the requests
  std::vector<int64_t> step_widths;  // of the step at hand
  std::vector<RequestFilter> filters;
  std::vector<int64_t> dead[kMaxTrieLevels];  // of the requests that have filters of their own
  LegalCodes legal;
  bool legal_is_new = false;
  std::vector<int64_t> legal_offsets;
  std::vector<int32_t> legal_codes;
  BeamWorkspace workspace;
};

BeamSearch::BeamSearch(std::shared_ptr<const Trie> trie, const BeamSearchOptions& options) {
  if (options.batch < 0)
    throw std::invalid_argument(WantedGot("batch", "0 or more", options.batch));
  CheckWidth(options.width);
  if (options.items < 1)
    throw std::invalid_argument(WantedGot("items", "1 or more", options.items));
  CheckTemperature(options.temperature);
  for (int64_t width : options.ramp) {
    if (width < 1 || width > options.width) {
      throw std::invalid_argument(
          WantedGot("ramp", "1 .. " + std::to_string(options.width), width));
    }
  }
  impl_.reset(new Impl(std::move(trie), options));
  Reset({});
}

BeamSearch::~BeamSearch() = default;

void BeamSearch::Reset(const BeamRequests& requests, std::shared_ptr<const Trie> trie) {
  Impl& s = *impl_;
  if (trie == nullptr) trie = s.trie;
  const TrieView& view = trie->View();
  if (view.levels != s.levels || view.codebook_size != s.trie->View().codebook_size) {
    throw std::invalid_argument(
        WantedGot("trie", Text(s.levels, " levels of ", s.trie->View().codebook_size, " codes"),
                  view.levels, " of ", view.codebook_size));
  }
  const int64_t batch = s.options.batch;
  if (requests.widths != nullptr) CheckWidths(requests.widths, batch, s.options.width);
  std::vector<int64_t> dead[kMaxTrieLevels];
  std::vector<std::array<int64_t, kMaxTrieLevels>> begins(batch + 1);
  std::vector<int64_t> leaves;
  for (int64_t b = 0; b < batch; ++b) {
    for (int l = 0; l < s.levels; ++l) begins[b][l] = dead[l].size();
    leaves.clear();
    if (requests.deny != nullptr) {
      leaves.assign(requests.deny + requests.deny_offsets[b],
                    requests.deny + requests.deny_offsets[b + 1]);
    }
    for (size_t i = 0; i < leaves.size(); ++i) {
      if (leaves[i] < 0 || leaves[i] >= view.Leaves() || (i > 0 && leaves[i] <= leaves[i - 1])) {
        throw std::invalid_argument(
            WantedGot("deny", "ascending distinct leaf ids of the trie", leaves[i]));
      }
    }
    const uint64_t allow = requests.allow != nullptr ? requests.allow[b] : kEveryTag;
    if (allow != kEveryTag && trie->Tags(0) == nullptr) {
      throw std::invalid_argument("allow: the trie has no tags");
    }
    if (!leaves.empty() || allow != kEveryTag) trie->AppendDead(allow, leaves, dead);
  }
  for (int l = 0; l < s.levels; ++l) begins[batch][l] = dead[l].size();

  s.trie = std::move(trie);
  for (int l = 0; l < s.levels; ++l) s.dead[l].swap(dead[l]);
  for (int64_t b = 0; b < batch; ++b) {
    const size_t at = b;
    RequestFilter& filter = s.filters[at];
    filter.allow = requests.allow != nullptr ? requests.allow[b] : kEveryTag;
    const bool own =
        filter.allow != kEveryTag ||
        (requests.deny != nullptr && requests.deny_offsets[b + 1] > requests.deny_offsets[b]);
    for (int l = 0; l < s.levels; ++l) {
      if (own) {
        filter.dead[l] = {s.dead[l].data() + begins[at][l], s.dead[l].data() + begins[at + 1][l]};
      } else {
        const std::vector<int64_t>& shared = s.trie->Dead(l);
        filter.dead[l] = {shared.data(), shared.data() + shared.size()};
      }
    }
    s.widths[at] = requests.widths != nullptr ? requests.widths[b] : s.options.width;
  }
  s.steps = 0;
  s.side = 0;
  s.legal_is_new = false;
  std::fill(s.scores[0].begin(), s.scores[0].end(), kDeadScore);
  std::fill(s.nodes[0].begin(), s.nodes[0].end(), -1);
  std::fill(s.parents.begin(), s.parents.end(), 0);
  std::fill(s.tokens.begin(), s.tokens.end(), -1);
  for (int side : {0, 1}) std::fill(s.paths[side].begin(), s.paths[side].end(), -1);
  for (int64_t b = 0; b < batch; ++b) {
    const size_t root = b * s.options.width;
    const bool live = s.widths[b] > 0;
    s.scores[0][root] = live ? 0.0 : kDeadScore;
    s.nodes[0][root] = live ? 0 : -1;
    s.valid[b] = live;
  }
}

int64_t BeamSearch::Rows() const {
  const Impl& s = *impl_;
  if (s.steps == 0) return 1;
  int64_t most = 1;
  for (int64_t width : s.widths) most = std::max(most, std::min(width, s.Ramp(s.steps - 1)));
  return most;
}

void BeamSearch::Step(const Logits& logits, int64_t rows) {
  if (Done()) throw std::logic_error("Step: every item of the session is finished");
  if (rows < Rows() || rows > impl_->options.width) {
    throw std::invalid_argument(WantedGot(
        "rows", std::to_string(Rows()) + " .. " + std::to_string(impl_->options.width), rows));
  }
  Advance(logits, false);
}

const LegalCodes& BeamSearch::Legal() {
  Impl& s = *impl_;
  const TrieView& view = s.trie->View();
  const int level = static_cast<int>(s.steps % s.levels);
  const OwnItems own = s.Own();
  std::vector<int64_t> used(own.items);
  s.legal_offsets.clear();
  s.legal_codes.clear();
  for (int64_t beam = 0; beam < s.options.batch * s.options.width; ++beam) {
    s.legal_offsets.push_back(static_cast<int64_t>(s.legal_codes.size()));
    const int64_t node = s.nodes[s.side][beam];
    if (node < 0 || Done() || !std::isfinite(s.scores[s.side][beam])) continue;
    const RequestFilter& filter = s.filters[beam / s.options.width];
    const uint64_t* const tags = filter.allow == kEveryTag ? nullptr : s.trie->Tags(level);
    const int64_t first = view.FirstEdge(level, node), last = view.FirstEdge(level, node + 1);
    const Edges& dead = filter.dead[level];
    const int64_t* gone = std::lower_bound(dead.begin, dead.end, first);
    const auto used_end = used.begin() + own.UsedUp(level, filter, beam, first, last, used.data());
    for (int64_t edge = first; edge < last; ++edge) {
      if (gone != dead.end && *gone == edge) {
        ++gone;
      } else if ((tags == nullptr || (tags[edge] & filter.allow) != 0) &&
                 std::find(used.begin(), used_end, edge) == used_end) {
        s.legal_codes.push_back(view.Token(level, edge));
      }
    }
  }
  s.legal_offsets.push_back(static_cast<int64_t>(s.legal_codes.size()));
  s.legal = {s.legal_offsets.data(), s.legal_codes.data()};
  s.legal_is_new = true;
  return s.legal;
}

void BeamSearch::StepLegal(const float* logits, int64_t count) {
  const Impl& s = *impl_;
  if (Done()) throw std::logic_error("StepLegal: every item of the session is finished");
  if (s.options.scoring == Scoring::kFullSoftmax) {
    throw std::invalid_argument("StepLegal: full softmax needs the logits of all codes");
  }
  if (!s.legal_is_new) throw std::invalid_argument("StepLegal: Legal was not called for this step");
  if (count != s.legal_offsets.back()) {
    throw std::invalid_argument(WantedGot("count", std::to_string(s.legal_offsets.back()), count));
  }
  Advance({logits, LogitType::kFloat32, 0, 0}, true);
}

// One step, from the logits of all codes or of the legal ones alone.
void BeamSearch::Advance(const Logits& logits, bool legal_only) {
  Impl& s = *impl_;
  const int64_t width = s.options.width;
  const int level = static_cast<int>(s.steps % s.levels);
  const int next = 1 - s.side;
  for (size_t b = 0; b < s.widths.size(); ++b) {
    s.step_widths[b] = std::min(s.widths[b], s.Ramp(s.steps));
  }

  BeamStepInput input;
  input.batch = s.options.batch;
  input.rows = width;
  input.level = level;
  input.logits = logits;
  input.scores = s.scores[s.side].data();
  input.nodes = s.nodes[s.side].data();
  input.widths = s.step_widths.data();
  input.tags = s.trie->Tags(level);
  BeamStepOutput output{
      width,         s.parents.data(), s.tokens.data(), s.nodes[next].data(), s.scores[next].data(),
      s.valid.data()};
  const OwnItems own = s.Own();
  RunStep(s.trie->View(), input, s.options.scoring, s.options.temperature, output, s.filters.data(),
          &own, legal_only ? s.legal_offsets.data() : nullptr, s.workspace.impl(),
          s.options.num_threads);

  // The edges so far follow their beams.
  ParallelFor(s.options.batch, s.options.num_threads, [&](int64_t b) {
    for (int64_t i = 0; i < width; ++i) {
      const int64_t beam = b * width + i;
      int64_t* to = s.paths[next].data() + beam * s.path_size;
      if (i >= s.valid[b]) {
        std::fill_n(to, s.path_size, -1);
        continue;
      }
      const int64_t parent = b * width + s.parents[beam];
      std::memcpy(to, s.paths[s.side].data() + parent * s.path_size, s.steps * sizeof(int64_t));
      to[s.steps] = s.nodes[next][beam];
      if (level + 1 == s.levels) s.nodes[next][beam] = 0;
    }
  });
  s.side = next;
  s.legal_is_new = false;
  ++s.steps;
}

const std::shared_ptr<const Trie>& BeamSearch::trie() const { return impl_->trie; }
const int64_t* BeamSearch::Parents() const { return impl_->parents.data(); }
const int64_t* BeamSearch::Tokens() const { return impl_->tokens.data(); }
const double* BeamSearch::Scores() const { return impl_->scores[impl_->side].data(); }
const int32_t* BeamSearch::Valid() const { return impl_->valid.data(); }
void BeamSearch::State(int64_t* parents, int64_t* tokens, float* scores, int32_t* valid) const {
  const Impl& s = *impl_;
  std::copy(s.parents.begin(), s.parents.end(), parents);
  std::copy(s.tokens.begin(), s.tokens.end(), tokens);
  std::copy(s.valid.begin(), s.valid.end(), valid);
  const double* const from = Scores();
  for (size_t i = 0; i < s.parents.size(); ++i) scores[i] = static_cast<float>(from[i]);
}

int64_t BeamSearch::Steps() const { return impl_->steps; }
bool BeamSearch::Done() const { return impl_->steps == impl_->path_size; }

void BeamSearch::Items(int64_t* items) const {
  const Impl& s = *impl_;
  const int64_t beams = s.options.batch * s.options.width;
  for (int64_t i = 0; i < beams; ++i) {
    for (int64_t j = 0; j < s.options.items; ++j) {
      items[i * s.options.items + j] = s.paths[s.side][i * s.path_size + (j + 1) * s.levels - 1];
    }
  }
}

void BeamSearch::Sids(int32_t* sids) const {
  const Impl& s = *impl_;
  const TrieView& view = s.trie->View();
  const int64_t items = s.options.batch * s.options.width * s.options.items;
  for (int64_t i = 0; i < items; ++i) {
    const int64_t* path = s.paths[s.side].data() + i * s.levels;
    const bool finished = path[s.levels - 1] >= 0;
    for (int l = 0; l < s.levels; ++l) {
      sids[i * s.levels + l] = finished ? view.Token(l, path[l]) : -1;
    }
  }
}

}  // namespace onerec
