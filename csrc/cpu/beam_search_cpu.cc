#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/beam_search_isa.h"
#include "cpu/line_vector.h"
#include "cpu/thread_pool.h"
#include "onerec/beam_search.h"
#include "onerec/runtime.h"

namespace onerec {
namespace {

constexpr double kDead = -std::numeric_limits<double>::infinity();
constexpr int64_t kFetched = 256;  // logits on their way to the cache

struct Better {
  static uint64_t Place(const Candidate& c) { return uint64_t{c.parent} << 32 | c.slot; }
  bool operator()(const Candidate& a, const Candidate& b) const {  // without a jump
    return (a.score > b.score) | ((a.score == b.score) & (Place(a) < Place(b)));
  }
};

using ScanRowFunction = void (*)(const RowInput&, float*, Collector&);

ScanRowFunction ScanRowFor(Isa isa) {
#ifdef ONEREC_X86
  if (isa >= Isa::kAvx512) return &avx512::ScanRow;
  if (isa == Isa::kAvx2) return &avx2::ScanRow;
#endif
  (void)isa;
  return &baseline::ScanRow;
}

// Ascending edges of one level.
struct Edges {
  const int64_t* begin = nullptr;
  const int64_t* end = nullptr;
  int64_t size() const { return end - begin; }
  bool Has(int64_t edge) const { return std::binary_search(begin, end, edge); }
  // The first that is not below `edge`; without a jump, which would be guessed wrong half the time.
  const int64_t* From(int64_t edge) const {
    const int64_t* at = begin;
    for (int64_t left = size(); left > 0; left /= 2) {
      const int64_t half = (left + 1) / 2;
      at += at[half - 1] < edge ? half : 0;
    }
    return at;
  }
};

// What one request's beams must not reach, at each level.
struct RequestFilter {
  Edges dead[kMaxTrieLevels];  // no live leaf below; of the last level, the leaves
  uint64_t allow = kEveryTag;
};

// The finished items of the beams of a step, which they must not reach again.
class OwnItems {
 public:
  // Writes the edges of [first, last) that the beam's own items use up, alone or with what the
  // filter takes; returns how many (at most `items`).
  int64_t UsedUp(int level, const RequestFilter& filter, int64_t beam, int64_t first, int64_t last,
                 int64_t* edges) const {
    const int64_t* const path = paths + beam * path_size;
    int64_t count = 0;
    for (int64_t i = 0; i < items; ++i) {
      const int64_t edge = path[i * view->levels + level];
      if (edge >= first && edge < last && !AnyLeft(level, edge, filter, path))
        edges[count++] = edge;
    }
    return count;
  }

  const TrieView* view = nullptr;
  const Trie* trie = nullptr;           // for its tags, or
  const uint64_t* leaf_tags = nullptr;  // the leaves'; both may be null if filters allow every tag
  const int64_t* paths = nullptr;       // [beams, path_size], edges of each item, level by level
  int64_t path_size = 0;
  int64_t items = 0;  // finished items of every beam

 private:
  bool AnyLeft(int level, int64_t edge, const RequestFilter& filter, const int64_t* path) const {
    const int bottom = view->levels - 1;
    if (filter.allow == kEveryTag) {  // every leaf counts: no need to look at them
      const Edges& gone = filter.dead[bottom];
      const int64_t begin = view->FirstLeaf(level + 1, edge);
      const int64_t end = view->FirstLeaf(level + 1, edge + 1);
      int64_t left = end - begin;
      if (left > items + gone.size()) return true;
      left -= std::lower_bound(gone.begin, gone.end, end) -
              std::lower_bound(gone.begin, gone.end, begin);
      for (int64_t i = 0; i < items; ++i) {
        const int64_t leaf = path[i * view->levels + bottom];
        left -= leaf >= begin && leaf < end;
      }
      return left > 0;
    }
    if (level == bottom) return false;  // it is one of the items
    if (trie == nullptr) {
      const int64_t end = view->FirstLeaf(level + 1, edge + 1);
      for (int64_t leaf = view->FirstLeaf(level + 1, edge); leaf < end; ++leaf) {
        if ((leaf_tags[leaf] & filter.allow) == 0 || filter.dead[bottom].Has(leaf)) continue;
        bool own = false;
        for (int64_t i = 0; i < items; ++i) own |= path[i * view->levels + bottom] == leaf;
        if (!own) return true;
      }
      return false;
    }
    const uint64_t* const tags = trie->Tags(level + 1);
    const int64_t end = view->FirstEdge(level + 1, edge + 1);
    for (int64_t child = view->FirstEdge(level + 1, edge); child < end; ++child) {
      if ((tags[child] & filter.allow) == 0 || filter.dead[level + 1].Has(child)) continue;
      bool own = false;
      for (int64_t i = 0; i < items; ++i) own |= path[i * view->levels + level + 1] == child;
      if (!own || AnyLeft(level + 1, child, filter, path)) return true;
    }
    return false;
  }
};

std::string WantedGot(const char* name, const char* wanted, int64_t got) {
  return std::string(name) + ": wanted " + wanted + ", got " + std::to_string(got);
}

}  // namespace

void Raise(Collector& collector, double score) {
  double seen;
  __atomic_load(collector.threshold, &seen, __ATOMIC_RELAXED);
  while (seen < score && !__atomic_compare_exchange(collector.threshold, &seen, &score, true,
                                                    __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

void Compact(Collector& collector) {
  if (collector.size <= collector.width) return;
  Candidate* const last = collector.items + collector.width - 1;
  std::nth_element(collector.items, last, collector.items + collector.size, Better());
  collector.size = collector.width;
  Raise(collector, last->score);
}

namespace {

// Sorts by merging, without jumps that depend on the scores; `spare` holds n more.
void Sort(Candidate* items, int64_t n, Candidate* spare) {
  Candidate *from = items, *to = spare;
  for (int64_t run = 1; run < n; run *= 2) {
    for (int64_t begin = 0; begin < n; begin += 2 * run) {
      const Candidate* a = from + begin;
      const Candidate* const a_end = from + std::min(begin + run, n);
      const Candidate* b = a_end;
      const Candidate* const b_end = from + std::min(begin + 2 * run, n);
      for (Candidate *at = to + begin, *end = at + (b_end - a); at < end; ++at) {
        const bool second = (b < b_end) & ((a == a_end) | Better()(*b, *a));
        *at = *(second ? b : a);
        b += second;
        a += !second;
      }
    }
    std::swap(from, to);
  }
  if (from != items) std::memcpy(items, from, static_cast<size_t>(n) * sizeof *items);
}

}  // namespace

float NthLargest(float* values, int64_t n, int64_t nth) {
  std::nth_element(values, values + nth - 1, values + n, std::greater<float>());
  return values[nth - 1];
}

struct BeamWorkspace::Impl {
  std::vector<RequestFilter> filters;  // [batch], for BeamStep
  std::vector<Candidate> candidates;   // [batch, groups, capacity]
  std::vector<int64_t> sizes;          // [batch, groups]
  std::vector<double> thresholds;      // [batch]
  LineVector<float> scratch;           // [chunks, 2 * vocab + 64]
  std::vector<int64_t> edges;          // [chunks, 2, rows]
  std::vector<int64_t> own;            // [chunks, items]

  template <class T>
  static void Grow(T& v, int64_t size) {
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
  plan.capacity = 2 * width + 256;  // and so room to sort in
  return plan;
}

void Reserve(BeamWorkspace::Impl& w, const Plan& plan, int64_t batch, int64_t rows, int64_t vocab,
             int64_t items) {
  w.Grow(w.candidates, batch * plan.groups * plan.capacity);
  w.Grow(w.sizes, batch * plan.groups);
  w.Grow(w.thresholds, batch);
  w.Grow(w.scratch, plan.chunks * (2 * vocab + 64));
  w.Grow(w.edges, plan.chunks * 2 * rows);
  w.Grow(w.own, plan.chunks * items);
}

class Stepper {
 public:
  // filters: [batch] or null. own: null, or paths whose edges of finished items lie at
  // beam * path_size. legal: null, or where each beam's logits begin when they are those of its
  // legal children alone.
  Stepper(const TrieView& trie, const BeamStepInput& input, Scoring scoring, double temperature,
          const BeamStepOutput& output, const RequestFilter* filters, const OwnItems* own,
          const int64_t* legal, BeamWorkspace::Impl& workspace, int num_threads)
      : trie_(trie),
        in_(input),
        out_(output),
        scoring_(scoring),
        temperature_(temperature),
        filters_(filters),
        own_(own),
        legal_(legal),
        work_(workspace),
        plan_(MakePlan(input.batch, input.rows, output.width, num_threads)),
        threads_(num_threads),
        scan_row_(ScanRowFor(CurrentIsa())) {}

  void Run() {
    Reserve(work_, plan_, in_.batch, in_.rows, trie_.codebook_size, own_ ? own_->items : 0);
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
  int64_t Width(int64_t b) const { return in_.widths == nullptr ? out_.width : in_.widths[b]; }

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
      const bool live = nodes[r] >= 0 && std::isfinite(scores[r]) && Width(b) > 0;
      first[r] = live ? trie_.FirstEdge(level, nodes[r]) : 0;
      last[r] = live ? trie_.FirstEdge(level, nodes[r] + 1) : 0;
    }
    for (int64_t r = begin; r < end; ++r) __builtin_prefetch(tokens + first[r] * trie_.token_bytes);

    const int64_t at = b * plan_.groups + group;
    Collector collector;
    collector.items = work_.candidates.data() + at * plan_.capacity;
    collector.size = 0;
    collector.capacity = plan_.capacity;
    collector.width = Width(b);
    collector.threshold = &work_.thresholds[static_cast<size_t>(b)];
    float* scratch = work_.scratch.data() + chunk * (2 * trie_.codebook_size + 64);
    RowInput row;
    row.type = legal_ ? kLegalOnly : static_cast<int>(in_.logits.type);
    row.vocab = trie_.codebook_size;
    row.token_bytes = trie_.token_bytes;
    row.scoring = static_cast<int>(scoring_);
    row.temperature = temperature_;
    row.scale = static_cast<float>(
        std::min<double>(1.4426950408889634 / temperature_, std::numeric_limits<float>::max()));
    row.tags = nullptr;
    row.banned_count[0] = row.banned_count[1] = 0;
    const RequestFilter* const filter = filters_ ? filters_ + b : nullptr;
    const uint64_t* tags = nullptr;
    if (filter != nullptr && filter->allow != kEveryTag) {
      tags = in_.tags;
      row.allow = filter->allow;
    }
    int64_t ahead = begin, fetched = 0;  // rows below it, and their children not yet scored
    for (int64_t r = begin; r < end; ++r) {
      row.degree = last[r] - first[r];
      if (row.degree == 0) continue;
      row.logits = legal_ ? static_cast<const float*>(in_.logits.data) + legal_[b * in_.rows + r]
                          : static_cast<const void*>(logits + r * in_.logits.row_stride * element);
      row.tokens = tokens + first[r] * trie_.token_bytes;
      if (legal_ == nullptr && scoring_ != Scoring::kFullSoftmax) {  // only the children's are read
        for (ahead = std::max(ahead, r); ahead < end && fetched < kFetched; ++ahead) {
          fetched += last[ahead] - first[ahead];
          if (last[ahead] - first[ahead] > trie_.codebook_size / 16) continue;
          const char* const codes = logits + ahead * in_.logits.row_stride * element;
          for (int64_t edge = first[ahead]; edge < last[ahead]; ++edge) {
            __builtin_prefetch(codes + trie_.Token(level, edge) * element);
          }
        }
        fetched -= row.degree;
      }
      row.first_edge = first[r];
      row.score = scores[r];
      row.parent = static_cast<uint32_t>(r);
      if (tags != nullptr) row.tags = tags + first[r];
      if (filter != nullptr) {
        const int64_t* gone = filter->dead[level].From(first[r]);
        row.banned[0] = gone;
        while (gone < filter->dead[level].end && *gone < last[r]) ++gone;
        row.banned_count[0] = gone - row.banned[0];
      }
      if (own_ != nullptr) {
        int64_t* const used = work_.own.data() + chunk * own_->items;
        row.banned[1] = used;
        row.banned_count[1] =
            own_->UsedUp(level, *filter, b * in_.rows + r, first[r], last[r], used);
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
    all.width = Width(b);
    all.threshold = &work_.thresholds[static_cast<size_t>(b)];
    Compact(all);
    Sort(all.items, all.size, all.items + all.size);

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
  const RequestFilter* const filters_;
  const OwnItems* const own_;
  const int64_t* const legal_;
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

void CheckWidths(const int64_t* widths, int64_t batch, int64_t most) {
  for (int64_t b = 0; b < batch; ++b) {
    if (widths[b] < 0 || widths[b] > most) {
      throw std::invalid_argument(
          WantedGot("widths", ("0 .. " + std::to_string(most)).c_str(), widths[b]));
    }
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
  const RequestFilter* filters = nullptr;
  if (input.widths != nullptr) CheckWidths(input.widths, input.batch, output.width);
  if (input.dead != nullptr || input.allow != nullptr || input.paths != nullptr) {
    auto& made = workspace.impl().filters;
    made.assign(static_cast<size_t>(input.batch), {});
    for (int64_t b = 0; b < input.batch; ++b) {
      RequestFilter& filter = made[static_cast<size_t>(b)];
      if (input.dead != nullptr) {
        filter.dead[input.level] = {input.dead + input.dead_offsets[b],
                                    input.dead + input.dead_offsets[b + 1]};
      }
      if (input.dead != nullptr && input.leaf_offsets != nullptr) {
        filter.dead[trie.levels - 1] = {input.dead + input.leaf_offsets[b],
                                        input.dead + input.leaf_offsets[b + 1]};
      }
      if (input.allow != nullptr) filter.allow = input.allow[b];
      if (filter.allow != kEveryTag && input.tags == nullptr) {
        throw std::invalid_argument("allow: wanted the tags of the level's edges too");
      }
      if (filter.allow != kEveryTag && input.paths != nullptr && input.leaf_tags == nullptr &&
          input.level + 1 < trie.levels) {
        throw std::invalid_argument("paths: with allow, wanted the tags of the leaves too");
      }
    }
    filters = made.data();
  }
  const OwnItems own{&trie, nullptr, input.leaf_tags, input.paths, input.path_size, input.items};
  Stepper(trie, input, scoring, temperature, output, filters,
          input.paths == nullptr ? nullptr : &own, nullptr, workspace.impl(), num_threads)
      .Run();
}

#ifndef ONEREC_CUDA
void CudaBeamStep(const uint64_t*, int, const BeamStepInput&, Scoring, double,
                  const BeamStepOutput&, void*, void*) {
  throw std::runtime_error(GetCudaInfo().problem);
}
size_t CudaBeamStepBytes(int64_t, int64_t, int64_t) { return 0; }
#endif

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
    widths.resize(static_cast<size_t>(o.batch));
    step_widths.resize(static_cast<size_t>(o.batch));
    filters.resize(static_cast<size_t>(o.batch));
    Reserve(workspace.impl(), MakePlan(o.batch, o.width, o.width, o.num_threads), o.batch, o.width,
            trie->View().codebook_size, o.items);
  }

  int64_t Ramp(int64_t step) const {
    return step < static_cast<int64_t>(options.ramp.size())
               ? options.ramp[static_cast<size_t>(step)]
               : options.width;
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
          WantedGot("ramp", ("1 .. " + std::to_string(options.width)).c_str(), width));
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
    throw std::invalid_argument("trie: wanted " + std::to_string(s.levels) + " levels of " +
                                std::to_string(s.trie->View().codebook_size) + " codes, got " +
                                std::to_string(view.levels) + " of " +
                                std::to_string(view.codebook_size));
  }
  const int64_t batch = s.options.batch;
  if (requests.widths != nullptr) CheckWidths(requests.widths, batch, s.options.width);
  std::vector<int64_t> dead[kMaxTrieLevels];
  std::vector<std::array<int64_t, kMaxTrieLevels>> begins(static_cast<size_t>(batch) + 1);
  std::vector<int64_t> leaves;
  for (int64_t b = 0; b < batch; ++b) {
    for (int l = 0; l < s.levels; ++l) begins[static_cast<size_t>(b)][l] = dead[l].size();
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
  for (int l = 0; l < s.levels; ++l) begins[static_cast<size_t>(batch)][l] = dead[l].size();

  s.trie = std::move(trie);
  for (int l = 0; l < s.levels; ++l) s.dead[l].swap(dead[l]);
  for (int64_t b = 0; b < batch; ++b) {
    const auto at = static_cast<size_t>(b);
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
  std::fill(s.scores[0].begin(), s.scores[0].end(), kDead);
  std::fill(s.nodes[0].begin(), s.nodes[0].end(), -1);
  std::fill(s.parents.begin(), s.parents.end(), 0);
  std::fill(s.tokens.begin(), s.tokens.end(), -1);
  for (int side : {0, 1}) std::fill(s.paths[side].begin(), s.paths[side].end(), -1);
  for (int64_t b = 0; b < batch; ++b) {
    const auto root = static_cast<size_t>(b * s.options.width);
    const bool live = s.widths[static_cast<size_t>(b)] > 0;
    s.scores[0][root] = live ? 0.0 : kDead;
    s.nodes[0][root] = live ? 0 : -1;
    s.valid[static_cast<size_t>(b)] = live;
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
        "rows", (std::to_string(Rows()) + " .. " + std::to_string(impl_->options.width)).c_str(),
        rows));
  }
  Advance(logits, false);
}

const LegalCodes& BeamSearch::Legal() {
  Impl& s = *impl_;
  const TrieView& view = s.trie->View();
  const int level = static_cast<int>(s.steps % s.levels);
  const OwnItems own = s.Own();
  std::vector<int64_t> used(static_cast<size_t>(own.items));
  s.legal_offsets.clear();
  s.legal_codes.clear();
  for (int64_t beam = 0; beam < s.options.batch * s.options.width; ++beam) {
    s.legal_offsets.push_back(static_cast<int64_t>(s.legal_codes.size()));
    const int64_t node = s.nodes[s.side][static_cast<size_t>(beam)];
    if (node < 0 || Done() || !std::isfinite(s.scores[s.side][static_cast<size_t>(beam)])) continue;
    const RequestFilter& filter = s.filters[static_cast<size_t>(beam / s.options.width)];
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
    throw std::invalid_argument(
        WantedGot("count", std::to_string(s.legal_offsets.back()).c_str(), count));
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
  Stepper(s.trie->View(), input, s.options.scoring, s.options.temperature, output, s.filters.data(),
          &own, legal_only ? s.legal_offsets.data() : nullptr, s.workspace.impl(),
          s.options.num_threads)
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
