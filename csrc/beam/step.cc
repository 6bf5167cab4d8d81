#include "beam/step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "beam/step_isa.h"
#include "onerec/runtime.h"
#include "support/aligned_vector.h"
#include "support/dispatch.h"
#include "support/error.h"
#include "support/thread_pool.h"

namespace onerec {
namespace {

constexpr int64_t kFetched = 256;  // logits on their way to the cache

struct Better {
  static uint64_t Place(const Candidate& c) { return uint64_t{c.parent} << 32 | c.slot; }
  bool operator()(const Candidate& a, const Candidate& b) const {  // without a jump
    return (a.score > b.score) | ((a.score == b.score) & (Place(a) < Place(b)));
  }
};

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
  if (from != items) std::memcpy(items, from, n * sizeof *items);
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

class Stepper {
 public:
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
        scan_row_(ONEREC_DISPATCH(ScanRow)) {}

  void Run() {
    ReserveStep(work_, in_.batch, in_.rows, out_.width, trie_.codebook_size, own_ ? own_->items : 0,
                threads_);
    std::fill_n(work_.thresholds.begin(), in_.batch, kDeadScore);
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
    collector.threshold = &work_.thresholds[b];
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
    work_.sizes[at] = collector.size;
  }

  // Writes a request's best candidates in order.
  void Finish(int64_t b) {
    Collector all;
    all.items = work_.candidates.data() + b * plan_.groups * plan_.capacity;
    all.size = work_.sizes[b * plan_.groups];
    for (int64_t group = 1; group < plan_.groups; ++group) {
      const int64_t size = work_.sizes[b * plan_.groups + group];
      std::memmove(all.items + all.size, all.items + group * plan_.capacity,
                   size * sizeof(Candidate));
      all.size += size;
    }
    all.width = Width(b);
    all.threshold = &work_.thresholds[b];
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
        out_.scores[at] = kDeadScore;
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
  void (*const scan_row_)(const RowInput&, float*, Collector&);
};

}  // namespace

void ReserveStep(BeamWorkspace::Impl& w, int64_t batch, int64_t rows, int64_t width, int64_t vocab,
                 int64_t items, int num_threads) {
  const Plan plan = MakePlan(batch, rows, width, num_threads);
  Grow(w.candidates, batch * plan.groups * plan.capacity);
  Grow(w.sizes, batch * plan.groups);
  Grow(w.thresholds, batch);
  Grow(w.scratch, plan.chunks * (2 * vocab + 64));
  Grow(w.edges, plan.chunks * 2 * rows);
  Grow(w.own, plan.chunks * items);
}

void RunStep(const TrieView& trie, const BeamStepInput& input, Scoring scoring, double temperature,
             const BeamStepOutput& output, const RequestFilter* filters, const OwnItems* own,
             const int64_t* legal, BeamWorkspace::Impl& workspace, int num_threads) {
  Stepper(trie, input, scoring, temperature, output, filters, own, legal, workspace, num_threads)
      .Run();
}

void CheckTemperature(double temperature) {
  if (!(temperature > 0.0 && std::isfinite(temperature))) {
    throw std::invalid_argument(WantedGot("temperature", "a positive finite number", temperature));
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
      throw std::invalid_argument(WantedGot("widths", "0 .. " + std::to_string(most), widths[b]));
    }
  }
}

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
    made.assign(input.batch, {});
    for (int64_t b = 0; b < input.batch; ++b) {
      RequestFilter& filter = made[b];
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
  RunStep(trie, input, scoring, temperature, output, filters,
          input.paths == nullptr ? nullptr : &own, nullptr, workspace.impl(), num_threads);
}

#ifndef ONEREC_CUDA
void CudaBeamStep(const uint64_t*, int, const BeamStepInput&, Scoring, double,
                  const BeamStepOutput&, void*, void*) {
  throw std::runtime_error(GetCudaInfo().problem);
}
size_t CudaBeamStepBytes(int64_t, int64_t, int64_t) { return 0; }
#endif

}  // namespace onerec
