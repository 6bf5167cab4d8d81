#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/beam_search_isa.h"
#include "cpu/thread_pool.h"
#include "onerec/beam_search.h"
#include "onerec/runtime.h"

namespace onerec {
namespace {

constexpr double kDead = -std::numeric_limits<double>::infinity();

bool Better(const Candidate& a, const Candidate& b) {
  if (a.score != b.score) return a.score > b.score;
  if (a.parent != b.parent) return a.parent < b.parent;
  return a.slot < b.slot;
}

using ScanRowFunction = void (*)(const RowInput&, float*, Collector&);

ScanRowFunction ScanRowFor(Isa isa) {
#ifdef ONEREC_X86
  if (isa == Isa::kAvx512) return &avx512::ScanRow;
  if (isa == Isa::kAvx2) return &avx2::ScanRow;
#endif
  (void)isa;
  return &baseline::ScanRow;
}

// The node of depth `level` that has `edge` of that level.
int64_t NodeOf(const TrieView& trie, int level, int64_t edge) {
  int64_t low = 0, high = trie.nodes[level];
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (trie.FirstEdge(level, middle) <= edge ? low : high) = middle;
  }
  return low;
}

// What the beams of a step must not reach.
class Bans {
 public:
  // Edges of this level, ascending, below which every leaf is denied to request b.
  const int64_t* DeadBegin(int64_t b) const { return dead + dead_offsets[b]; }
  const int64_t* DeadEnd(int64_t b) const { return dead + dead_offsets[b + 1]; }

  // Writes the edges of [first, last) that this beam's own items, alone or with the denied leaves,
  // use up; returns how many (at most `items`).
  int64_t Own(const TrieView& trie, int level, int64_t b, int64_t row, int64_t first, int64_t last,
              int64_t* edges) const {
    const int64_t* path = paths + (b * width + row) * path_size;
    const int64_t* const denied = deny + deny_offsets[b];
    const int64_t* const denied_end = deny + deny_offsets[b + 1];
    int64_t count = 0;
    for (int64_t i = 0; i < items; ++i) {
      const int64_t edge = path[i * trie.levels + level];
      if (edge < first || edge >= last) continue;
      const int64_t begin = trie.FirstLeaf(level + 1, edge);
      const int64_t end = trie.FirstLeaf(level + 1, edge + 1);
      int64_t left = end - begin;
      if (left > items + (denied_end - denied)) continue;
      for (int64_t j = 0; j < items; ++j) {
        const int64_t leaf = path[j * trie.levels + trie.levels - 1];
        left -= leaf >= begin && leaf < end;
      }
      left -=
          std::lower_bound(denied, denied_end, end) - std::lower_bound(denied, denied_end, begin);
      if (left == 0) edges[count++] = edge;
    }
    return count;
  }

  const int64_t* dead = nullptr;
  const int64_t* dead_offsets = nullptr;
  const int64_t* deny = nullptr;
  const int64_t* deny_offsets = nullptr;
  const int64_t* paths = nullptr;  // [batch, width, path_size], edges of each item, level by level
  int64_t width = 0;
  int64_t path_size = 0;
  int64_t items = 0;  // finished items of every beam
};

std::string WantedGot(const char* name, const char* wanted, int64_t got) {
  return std::string(name) + ": wanted " + wanted + ", got " + std::to_string(got);
}

}  // namespace

void Compact(Collector& collector) {
  if (collector.size <= collector.width) return;
  Candidate* const last = collector.items + collector.width - 1;
  std::nth_element(collector.items, last, collector.items + collector.size, Better);
  collector.size = collector.width;
  double seen;
  __atomic_load(collector.threshold, &seen, __ATOMIC_RELAXED);
  double wanted = last->score;
  while (seen < wanted && !__atomic_compare_exchange(collector.threshold, &seen, &wanted, true,
                                                     __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

struct BeamWorkspace::Impl {
  std::vector<Candidate> candidates;  // [batch, groups, capacity]
  std::vector<int64_t> sizes;         // [batch, groups]
  std::vector<double> thresholds;     // [batch]
  std::vector<float> scratch;         // [chunks, vocab + 32]
  std::vector<int64_t> edges;         // [chunks, 2, rows]
  std::vector<int64_t> own;           // [chunks, items]

  template <class T>
  static void Grow(std::vector<T>& v, int64_t size) {
    if (static_cast<int64_t>(v.size()) < size) v.resize(static_cast<size_t>(size));
  }
};

BeamWorkspace::BeamWorkspace() : impl_(new Impl) {}
BeamWorkspace::~BeamWorkspace() = default;

namespace {

struct Plan {
  int64_t groups;    // parts that the rows of a request are cut into
  int64_t chunks;    // parts that the groups of all requests are cut into
  int64_t capacity;  // candidates of a group
};

Plan MakePlan(int64_t batch, int64_t rows, int64_t width, int num_threads) {
  Plan plan;
  const int64_t parts = num_threads > 1 ? int64_t{4} * num_threads : 1;
  plan.groups = std::clamp<int64_t>((parts + batch - 1) / std::max<int64_t>(batch, 1), 1,
                                    std::max<int64_t>(rows / 8, 1));
  plan.chunks = std::min(parts, batch * plan.groups);
  plan.capacity = 2 * width + 256;
  return plan;
}

void Reserve(BeamWorkspace::Impl& w, const Plan& plan, int64_t batch, int64_t rows, int64_t vocab,
             int64_t items) {
  w.Grow(w.candidates, batch * plan.groups * plan.capacity);
  w.Grow(w.sizes, batch * plan.groups);
  w.Grow(w.thresholds, batch);
  w.Grow(w.scratch, plan.chunks * (vocab + 32));
  w.Grow(w.edges, plan.chunks * 2 * rows);
  w.Grow(w.own, plan.chunks * items);
}

class Stepper {
 public:
  Stepper(const TrieView& trie, const BeamStepInput& input, Scoring scoring, double temperature,
          const BeamStepOutput& output, const Bans* bans, BeamWorkspace::Impl& workspace,
          int num_threads)
      : trie_(trie),
        in_(input),
        out_(output),
        scoring_(scoring),
        temperature_(temperature),
        bans_(bans),
        work_(workspace),
        plan_(MakePlan(input.batch, input.rows, output.width, num_threads)),
        threads_(num_threads),
        scan_row_(ScanRowFor(CurrentIsa())) {}

  void Run() {
    Reserve(work_, plan_, in_.batch, in_.rows, trie_.codebook_size, bans_ ? bans_->items : 0);
    std::fill_n(work_.thresholds.begin(), in_.batch, kDead);
    const int64_t parts = in_.batch * plan_.groups;
    ParallelFor(plan_.chunks, threads_, [&](int64_t chunk) {
      const int64_t end = (chunk + 1) * parts / plan_.chunks;
      for (int64_t part = chunk * parts / plan_.chunks; part < end; ++part) {
        Scan(chunk, part / plan_.groups, part % plan_.groups);
        if (plan_.groups == 1) Finish(part);
      }
    });
    if (plan_.groups > 1) ParallelFor(in_.batch, threads_, [&](int64_t b) { Finish(b); });
  }

 private:
  // Collects the candidates of one group of a request's rows.
  void Scan(int64_t chunk, int64_t b, int64_t group) {
    const int64_t begin = group * in_.rows / plan_.groups;
    const int64_t end = (group + 1) * in_.rows / plan_.groups;
    const int64_t* nodes = in_.nodes + b * in_.rows;
    const double* scores = in_.scores + b * in_.rows;
    const int level = in_.level;
    const int64_t element = in_.logits.type == LogitType::kFloat32 ? 4 : 2;
    const char* logits =
        static_cast<const char*>(in_.logits.data) + b * in_.logits.batch_stride * element;
    const char* tokens = static_cast<const char*>(trie_.tokens[level]);
    int64_t* first = work_.edges.data() + chunk * 2 * in_.rows;
    int64_t* last = first + in_.rows;
    // Two sweeps ahead of the work, so that the misses of different rows overlap.
    for (int64_t r = begin; r < end; ++r) {
      if (nodes[r] < -1 || nodes[r] >= trie_.nodes[level]) {
        throw std::invalid_argument(WantedGot("nodes", "-1 or a node of the level", nodes[r]));
      }
      const bool live = nodes[r] >= 0 && std::isfinite(scores[r]);
      first[r] = live ? trie_.FirstEdge(level, nodes[r]) : 0;
      last[r] = live ? trie_.FirstEdge(level, nodes[r] + 1) : 0;
    }
    for (int64_t r = begin; r < end; ++r) __builtin_prefetch(tokens + first[r] * trie_.token_bytes);

    const int64_t at = b * plan_.groups + group;
    Collector collector;
    collector.items = work_.candidates.data() + at * plan_.capacity;
    collector.size = 0;
    collector.capacity = plan_.capacity;
    collector.width = out_.width;
    collector.threshold = &work_.thresholds[static_cast<size_t>(b)];
    float* scratch = work_.scratch.data() + chunk * (trie_.codebook_size + 32);
    RowInput row;
    row.type = static_cast<int>(in_.logits.type);
    row.vocab = trie_.codebook_size;
    row.token_bytes = trie_.token_bytes;
    row.scoring = static_cast<int>(scoring_);
    row.temperature = temperature_;
    for (int64_t r = begin; r < end; ++r) {
      row.degree = last[r] - first[r];
      if (row.degree == 0) continue;
      row.logits = logits + r * in_.logits.row_stride * element;
      row.tokens = tokens + first[r] * trie_.token_bytes;
      row.first_edge = first[r];
      row.score = scores[r];
      row.parent = static_cast<uint32_t>(r);
      row.banned_count[0] = row.banned_count[1] = 0;
      if (bans_ != nullptr) {
        const int64_t* const dead_end = bans_->DeadEnd(b);
        row.banned[0] = std::lower_bound(bans_->DeadBegin(b), dead_end, first[r]);
        row.banned_count[0] = std::lower_bound(row.banned[0], dead_end, last[r]) - row.banned[0];
        int64_t* const own = work_.own.data() + chunk * bans_->items;
        row.banned[1] = own;
        row.banned_count[1] = bans_->Own(trie_, level, b, r, first[r], last[r], own);
      }
      scan_row_(row, scratch, collector);
    }
    work_.sizes[static_cast<size_t>(at)] = collector.size;
  }

  // Writes a request's best candidates in order.
  void Finish(int64_t b) {
    Collector all;
    all.items = work_.candidates.data() + b * plan_.groups * plan_.capacity;
    all.size = work_.sizes[static_cast<size_t>(b * plan_.groups)];
    for (int64_t group = 1; group < plan_.groups; ++group) {
      const int64_t size = work_.sizes[static_cast<size_t>(b * plan_.groups + group)];
      std::memmove(all.items + all.size, all.items + group * plan_.capacity,
                   static_cast<size_t>(size) * sizeof(Candidate));
      all.size += size;
    }
    all.width = out_.width;
    all.threshold = &work_.thresholds[static_cast<size_t>(b)];
    Compact(all);
    std::sort(all.items, all.items + all.size, Better);

    const int64_t* nodes = in_.nodes + b * in_.rows;
    for (int64_t i = 0; i < out_.width; ++i) {
      const int64_t at = b * out_.width + i;
      if (i < all.size) {
        const Candidate& c = all.items[i];
        const int64_t edge = trie_.FirstEdge(in_.level, nodes[c.parent]) + c.slot;
        out_.parents[at] = c.parent;
        out_.tokens[at] = trie_.Token(in_.level, edge);
        out_.nodes[at] = edge;
        out_.scores[at] = c.score;
      } else {
        out_.parents[at] = 0;
        out_.tokens[at] = out_.nodes[at] = -1;
        out_.scores[at] = kDead;
      }
    }
    out_.valid[b] = static_cast<int32_t>(all.size);
  }

  const TrieView& trie_;
  const BeamStepInput& in_;
  const BeamStepOutput& out_;
  const Scoring scoring_;
  const double temperature_;
  const Bans* const bans_;
  BeamWorkspace::Impl& work_;
  const Plan plan_;
  const int threads_;
  const ScanRowFunction scan_row_;
};

void CheckTemperature(double temperature) {
  if (!(temperature > 0.0 && std::isfinite(temperature))) {
    throw std::invalid_argument("temperature: wanted a positive finite number, got " +
                                std::to_string(temperature));
  }
}

void CheckWidth(int64_t width) {
  if (width < 1 || width >= int64_t{1} << 31) {
    throw std::invalid_argument(WantedGot("width", "1 .. 2^31 - 1", width));
  }
}

}  // namespace

void BeamStep(const TrieView& trie, const BeamStepInput& input, Scoring scoring, double temperature,
              const BeamStepOutput& output, BeamWorkspace& workspace, int num_threads) {
  if (input.batch < 0) throw std::invalid_argument(WantedGot("batch", "0 or more", input.batch));
  if (input.rows < 0) throw std::invalid_argument(WantedGot("rows", "0 or more", input.rows));
  CheckWidth(output.width);
  CheckTemperature(temperature);
  if (input.level < 0 || input.level >= trie.levels) {
    throw std::invalid_argument(WantedGot("level", "a level of the trie", input.level));
  }
  Stepper(trie, input, scoring, temperature, output, nullptr, workspace.impl(), num_threads).Run();
}

struct BeamSearch::Impl {
  Impl(std::shared_ptr<const Trie> t, const BeamSearchOptions& o)
      : trie(std::move(t)), options(o), levels(trie->View().levels) {
    const auto beams = static_cast<size_t>(o.batch * o.width);
    path_size = o.items * levels;
    for (int side = 0; side < 2; ++side) {
      scores[side].resize(beams);
      nodes[side].resize(beams);
      paths[side].resize(beams * static_cast<size_t>(path_size));
    }
    parents.resize(beams);
    tokens.resize(beams);
    valid.resize(static_cast<size_t>(o.batch));
    deny_offsets.resize(static_cast<size_t>(o.batch) + 1);
    for (int l = 0; l < levels; ++l) dead_offsets[l].resize(static_cast<size_t>(o.batch) + 1);
    Reserve(workspace.impl(), MakePlan(o.batch, o.width, o.width, o.num_threads), o.batch, o.width,
            trie->View().codebook_size, o.items);
  }

  // dead[l] of a request from dead[l + 1]: an edge all of whose children are dead.
  void Propagate(int64_t b) {
    const TrieView& view = trie->View();
    const auto at = static_cast<size_t>(b);
    for (int l = levels - 2; l >= 0; --l) {
      const std::vector<int64_t>& below = dead[l + 1];
      int64_t i = dead_offsets[l + 1][at];
      const int64_t end = static_cast<int64_t>(below.size());
      while (i < end) {
        const int64_t node = NodeOf(view, l + 1, below[static_cast<size_t>(i)]);
        const int64_t first = view.FirstEdge(l + 1, node), last = view.FirstEdge(l + 1, node + 1);
        int64_t count = 0;
        for (; i < end && below[static_cast<size_t>(i)] < last; ++i) ++count;
        if (count == last - first) dead[l].push_back(node);
      }
      dead_offsets[l][at + 1] = static_cast<int64_t>(dead[l].size());
    }
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
  std::vector<int64_t> deny_offsets;
  std::vector<int64_t> dead[kMaxTrieLevels];  // the last one is the deny lists themselves
  std::vector<int64_t> dead_offsets[kMaxTrieLevels];
  BeamWorkspace workspace;
};

BeamSearch::BeamSearch(std::shared_ptr<const Trie> trie, const BeamSearchOptions& options) {
  if (options.batch < 0)
    throw std::invalid_argument(WantedGot("batch", "0 or more", options.batch));
  CheckWidth(options.width);
  if (options.items < 1)
    throw std::invalid_argument(WantedGot("items", "1 or more", options.items));
  CheckTemperature(options.temperature);
  impl_.reset(new Impl(std::move(trie), options));
  Reset(nullptr, nullptr);
}

BeamSearch::~BeamSearch() = default;

void BeamSearch::Reset(const int64_t* deny, const int64_t* deny_offsets) {
  Impl& s = *impl_;
  const int64_t leaves = s.trie->View().Leaves();
  const int last = s.levels - 1;
  for (int l = 0; l < s.levels; ++l) s.dead[l].clear();
  for (int64_t b = 0; b < s.options.batch; ++b) {
    const auto at = static_cast<size_t>(b);
    if (deny != nullptr) {
      for (int64_t i = deny_offsets[b]; i < deny_offsets[b + 1]; ++i) {
        if (deny[i] < 0 || deny[i] >= leaves || (i > deny_offsets[b] && deny[i] <= deny[i - 1])) {
          throw std::invalid_argument(
              WantedGot("deny", "ascending distinct leaf ids of the trie", deny[i]));
        }
        s.dead[last].push_back(deny[i]);
      }
    }
    s.dead_offsets[last][at + 1] = static_cast<int64_t>(s.dead[last].size());
    s.Propagate(b);
  }
  s.deny_offsets = s.dead_offsets[last];
  s.steps = 0;
  s.side = 0;
  std::fill(s.scores[0].begin(), s.scores[0].end(), kDead);
  std::fill(s.nodes[0].begin(), s.nodes[0].end(), -1);
  std::fill(s.parents.begin(), s.parents.end(), 0);
  std::fill(s.tokens.begin(), s.tokens.end(), -1);
  std::fill(s.valid.begin(), s.valid.end(), 1);
  for (int side : {0, 1}) std::fill(s.paths[side].begin(), s.paths[side].end(), -1);
  for (int64_t b = 0; b < s.options.batch; ++b) {
    const auto root = static_cast<size_t>(b * s.options.width);
    s.scores[0][root] = 0.0;
    s.nodes[0][root] = 0;
  }
}

void BeamSearch::Step(const Logits& logits, int64_t rows) {
  Impl& s = *impl_;
  if (Done()) throw std::logic_error("Step: every item of the session is finished");
  const int64_t width = s.options.width;
  if (rows != width && !(rows == 1 && s.steps == 0)) {
    throw std::invalid_argument(WantedGot("rows", std::to_string(width).c_str(), rows));
  }
  const int level = static_cast<int>(s.steps % s.levels);
  const int64_t item = s.steps / s.levels;
  const int next = 1 - s.side;

  Logits at = logits;
  if (rows == 1) at.row_stride = 0;  // the rows of dead beams are never read
  BeamStepInput input{s.options.batch,       width, level, at, s.scores[s.side].data(),
                      s.nodes[s.side].data()};
  BeamStepOutput output{
      width,         s.parents.data(), s.tokens.data(), s.nodes[next].data(), s.scores[next].data(),
      s.valid.data()};
  Bans bans;
  bans.dead = s.dead[level].data();
  bans.dead_offsets = s.dead_offsets[level].data();
  bans.deny = s.dead[s.levels - 1].data();
  bans.deny_offsets = s.deny_offsets.data();
  bans.paths = s.paths[s.side].data();
  bans.width = width;
  bans.path_size = s.path_size;
  bans.items = item;
  Stepper(s.trie->View(), input, s.options.scoring, s.options.temperature, output, &bans,
          s.workspace.impl(), s.options.num_threads)
      .Run();

  // The edges so far follow their beams.
  ParallelFor(s.options.batch, s.options.num_threads, [&](int64_t b) {
    for (int64_t i = 0; i < width; ++i) {
      const int64_t beam = b * width + i;
      int64_t* to = s.paths[next].data() + beam * s.path_size;
      if (i >= s.valid[static_cast<size_t>(b)]) {
        std::fill_n(to, s.path_size, -1);
        continue;
      }
      const int64_t parent = b * width + s.parents[static_cast<size_t>(beam)];
      std::memcpy(to, s.paths[s.side].data() + parent * s.path_size,
                  static_cast<size_t>(s.steps) * sizeof(int64_t));
      to[s.steps] = s.nodes[next][static_cast<size_t>(beam)];
      if (level + 1 == s.levels) s.nodes[next][static_cast<size_t>(beam)] = 0;
    }
  });
  s.side = next;
  ++s.steps;
}

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
      items[i * s.options.items + j] =
          s.paths[s.side][static_cast<size_t>(i * s.path_size + (j + 1) * s.levels - 1)];
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
