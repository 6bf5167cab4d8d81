// The beam step on a CUDA device: a pass over the rows, then a radix select in each request.
//
// Nothing is planned on the host and nothing waits for the device, so a step can be captured in a
// graph; the trie is found through an address in device memory, so that a captured step follows a
// swap. Sums are made in an order that depends on the row alone.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "onerec/beam_search.h"
#include "support/cuda/device.h"
#include "support/error.h"

namespace onerec {
namespace {

constexpr int kRowThreads = 256;
constexpr int kSelectThreads = 1024;
constexpr int kMaxRows = 4096;
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr unsigned kAll = 0xFFFFFFFFu;  // lanes of a warp
constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 0x1.fffffep127f;

// What the row pass finds out about a row.
struct Row {
  int64_t first;  // edge of its first child
  double score;
  double norm;
  const int64_t* used;  // [items], edges that the beam's own items use up; -1 for none
  int degree;           // 0 if nothing can follow
  int dead;             // where the dead edges among its children begin
  int dead_count;
};

struct Step {
  const uint64_t* trie;  // addresses of the trie's bytes and of each level's tags
  int level, vocab, scoring;
  int64_t rows, width;
  double temperature;
  float scale;  // log2(e) / temperature
  const void* logits;
  int64_t batch_stride, row_stride;
  const double* scores;
  const int64_t* nodes;
  const int64_t* widths;
  const int64_t* dead;
  const int64_t* dead_offsets;
  const uint64_t* allow;
  const int64_t* paths;
  int64_t path_size;
  const int64_t* leaf_offsets;
  int items;
  int64_t* used;  // [batch, rows, items]
  Row* row_info;  // [batch, rows]
  BeamStepOutput out;
  int capacity;  // candidates that the select sorts, a power of two
  int cached;    // candidates whose keys it has room to keep
};

// One level of the trie whose bytes begin at `data`; the offsets are those of onerec/trie.h.
struct Level {
  __device__ Level(const Step& s, int level) {
    const char* const data = reinterpret_cast<const char*>(*s.trie);
    levels = *reinterpret_cast<const int*>(data + 24);
    pointer_bytes = *reinterpret_cast<const uint32_t*>(data + 36);
    nodes = *reinterpret_cast<const int64_t*>(data + 40 + 8 * level);
    tokens = data + *reinterpret_cast<const uint64_t*>(data + 112 + 8 * level);
    pointers = data + *reinterpret_cast<const uint64_t*>(data + 176 + 8 * level);
    token_bytes = s.vocab <= 256 ? 1 : 2;
    tags = s.allow == nullptr ? nullptr : Tags(s, level);
  }
  __device__ static const uint64_t* Tags(const Step& s, int level) {
    return reinterpret_cast<const uint64_t*>(s.trie[1 + level]);
  }
  __device__ int64_t FirstEdge(int64_t node) const {
    return pointer_bytes == 4
               ? static_cast<int64_t>(reinterpret_cast<const uint32_t*>(pointers)[node])
               : reinterpret_cast<const int64_t*>(pointers)[node];
  }
  __device__ int Token(int64_t edge) const {
    return token_bytes == 1 ? reinterpret_cast<const uint8_t*>(tokens)[edge]
                            : reinterpret_cast<const uint16_t*>(tokens)[edge];
  }
  const char* tokens;
  const char* pointers;
  const uint64_t* tags;  // null if every tag is allowed to all
  int64_t nodes;
  uint32_t pointer_bytes;
  int token_bytes;
  int levels;  // of the trie
};

__device__ float ToFloat(float x) { return x; }
__device__ float ToFloat(__half x) { return __half2float(x); }
__device__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

// A logit by the rule of onerec/beam_search.h.
__device__ float Readable(float x) { return isnan(x) ? -kInfinity : fminf(x, kLargest); }

template <class T>
__device__ const T* RowOf(const Step& s, int64_t b, int64_t r) {
  return static_cast<const T*>(s.logits) + b * s.batch_stride + r * s.row_stride;
}

__device__ int64_t LowerBound(const int64_t* values, int64_t begin, int64_t end, int64_t wanted) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (values[middle] < wanted) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

__device__ uint64_t Allowed(const Step& s, int64_t b) {
  return s.allow == nullptr ? kEveryTag : s.allow[b];
}

__device__ bool Legal(const Step& s, const Level& level, const Row& row, int64_t b, int64_t edge) {
  if (row.dead_count > 0) {
    const int64_t* const dead = s.dead + s.dead_offsets[b] + row.dead;
    const int64_t at = LowerBound(dead, 0, row.dead_count, edge);
    if (at < row.dead_count && dead[at] == edge) return false;
  }
  for (int i = 0; i < s.items; ++i) {
    if (row.used[i] == edge) return false;
  }
  const uint64_t allow = Allowed(s, b);
  return allow == kEveryTag || (level.tags[edge] & allow) != 0;
}

// First leaf below a node of `depth`.
__device__ int64_t FirstLeaf(const Step& s, int levels, int depth, int64_t node) {
  for (; depth < levels; ++depth) node = Level(s, depth).FirstEdge(node);
  return node;
}

// Whether dead leaves and the beam's own items are all that lies below an edge of the level.
__device__ bool UsedUp(const Step& s, int levels, const int64_t* path, int64_t b, int64_t edge) {
  const int64_t begin = FirstLeaf(s, levels, s.level + 1, edge);
  const int64_t end = FirstLeaf(s, levels, s.level + 1, edge + 1);
  int64_t left = end - begin;
  if (s.dead != nullptr && s.leaf_offsets != nullptr) {
    const int64_t first = s.leaf_offsets[b], last = s.leaf_offsets[b + 1];
    left -= LowerBound(s.dead, first, last, end) - LowerBound(s.dead, first, last, begin);
  }
  for (int i = 0; i < s.items; ++i) {
    const int64_t leaf = path[(i + 1) * levels - 1];
    left -= leaf >= begin && leaf < end;
  }
  return left <= 0;
}

// The same where not every leaf is allowed; all lanes of a warp must call it.
__device__ bool AllowedUsedUp(const Step& s, int levels, const int64_t* path, int64_t b,
                              int64_t edge) {
  const int64_t end = FirstLeaf(s, levels, s.level + 1, edge + 1);
  const uint64_t* const tags = Level::Tags(s, levels - 1);
  const bool some_dead = s.dead != nullptr && s.leaf_offsets != nullptr;
  for (int64_t first = FirstLeaf(s, levels, s.level + 1, edge); first < end; first += 32) {
    const int64_t leaf = first + static_cast<int64_t>(threadIdx.x) % 32;
    bool left = leaf < end && (tags[leaf] & s.allow[b]) != 0;
    if (left && some_dead) {
      const int64_t last = s.leaf_offsets[b + 1];
      const int64_t at = LowerBound(s.dead, s.leaf_offsets[b], last, leaf);
      left = at == last || s.dead[at] != leaf;
    }
    for (int i = 0; i < s.items; ++i) left = left && path[(i + 1) * levels - 1] != leaf;
    if (__ballot_sync(kAll, left) != 0) return false;
  }
  return true;
}

// sum exp(x / T) of the logits that a thread has seen, relative to the largest of them.
struct Exponentials {
  template <int kCount>
  __device__ void Take(const float (&x)[kCount], float scale) {
    float top = largest;
    ONEREC_UNROLL
    for (int i = 0; i < kCount; ++i) top = fmaxf(top, x[i]);
    if (top == -kInfinity) return;
    sum *= exp2f((largest - top) * scale);
    ONEREC_UNROLL
    for (int i = 0; i < kCount; ++i) sum += exp2f((x[i] - top) * scale);
    largest = top;
  }
  float largest = -kInfinity;
  float sum = 0;
};

// Log sum exp over a block; all threads must call it, thread 0 gets the result.
__device__ double LogSum(const Exponentials& mine, const Step& s) {
  constexpr int kWarps = kRowThreads / 32;
  __shared__ float tops[kWarps];
  __shared__ double sums[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float top = mine.largest;
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, step));
  if (threadIdx.x % 32 == 0) tops[warp] = top;
  __syncthreads();
  for (int other = 0; other < kWarps; ++other) top = fmaxf(top, tops[other]);
  if (top == -kInfinity) return -static_cast<double>(kInfinity);
  double sum = mine.sum * exp2f((mine.largest - top) * s.scale);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  if (threadIdx.x % 32 == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return 0;
  for (int other = 1; other < kWarps; ++other) sum += sums[other];
  return static_cast<double>(top) / s.temperature + log(sum);
}

// One block a row: the children that it has, and the logarithm that normalises it.
template <class T>
__global__ void __launch_bounds__(kRowThreads, 4) RowPass(Step s) {
  const int64_t at = blockIdx.x, b = at / s.rows;
  const Level level(s, s.level);
  const int64_t node = s.nodes[at];
  Row row{};
  row.score = s.scores[at];
  const bool wanted = s.widths == nullptr || s.widths[b] > 0;
  if (node >= 0 && node < level.nodes && isfinite(row.score) && wanted) {
    row.first = level.FirstEdge(node);
    row.degree = static_cast<int>(level.FirstEdge(node + 1) - row.first);
  }
  if (row.degree > 0 && s.dead != nullptr) {
    const int64_t begin = s.dead_offsets[b], end = s.dead_offsets[b + 1];
    const int64_t from = LowerBound(s.dead, begin, end, row.first);
    row.dead = static_cast<int>(from - begin);
    row.dead_count = static_cast<int>(LowerBound(s.dead, from, end, row.first + row.degree) - from);
  }
  row.used = s.used + at * s.items;
  if (row.degree > 0 && s.items > 0) {
    const int64_t* const path = s.paths + at * s.path_size;
    const bool tagged = Allowed(s, b) != kEveryTag;
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread / 32; i < s.items; i += kRowThreads / 32) {  // a warp an item
      const int64_t edge = path[i * level.levels + s.level];
      const bool own = edge >= row.first && edge < row.first + row.degree;
      const bool gone = own && (tagged ? AllowedUsedUp(s, level.levels, path, b, edge)
                                       : UsedUp(s, level.levels, path, b, edge));
      if (thread % 32 == 0) s.used[at * s.items + i] = gone ? edge : -1;
    }
    __syncthreads();
  }
  if (row.degree > 0 && s.scoring != static_cast<int>(Scoring::kRaw)) {
    const T* const logits = RowOf<T>(s, b, at % s.rows);
    Exponentials mine;
    if (s.scoring == static_cast<int>(Scoring::kFullSoftmax)) {
      constexpr int kGroup = 16 / sizeof(T);
      const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
      for (int i = static_cast<int>(threadIdx.x) * kGroup; i < s.vocab; i += kRowThreads * kGroup) {
        alignas(16) T group[kGroup];
        if (aligned && i + kGroup <= s.vocab) {
          *reinterpret_cast<uint4*>(group) = *reinterpret_cast<const uint4*>(logits + i);
        } else {
          for (int j = 0; j < kGroup; ++j) {
            group[j] = i + j < s.vocab ? logits[i + j] : T(-kInfinity);
          }
        }
        float values[kGroup];
        ONEREC_UNROLL
        for (int j = 0; j < kGroup; ++j) values[j] = Readable(ToFloat(group[j]));
        mine.Take(values, s.scale);
      }
    } else {
      for (int i = static_cast<int>(threadIdx.x); i < row.degree; i += kRowThreads) {
        if (!Legal(s, level, row, b, row.first + i)) continue;
        const float value[] = {Readable(ToFloat(logits[level.Token(row.first + i)]))};
        mine.Take(value, s.scale);
      }
    }
    row.norm = LogSum(mine, s);
    if (isinf(row.norm)) row.degree = 0;
  }
  if (threadIdx.x == 0) s.row_info[at] = row;
}

struct Candidate {
  uint64_t key;  // greater is better; 0 is none
  uint32_t parent, slot;
};

__device__ bool Before(const Candidate& a, const Candidate& b) {
  if (a.key != b.key) return a.key > b.key;
  return a.parent != b.parent ? a.parent < b.parent : a.slot < b.slot;
}

// Numbers in the order of the scores; no score gives 0.
__device__ uint64_t Key(double score) {
  const auto bits = static_cast<uint64_t>(__double_as_longlong(score + 0.0));  // no negative zero
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}
__device__ double Score(uint64_t key) {
  return __longlong_as_double(
      static_cast<long long>(key >> 63 ? key & ~(uint64_t{1} << 63) : ~key));
}

// The candidates of a request: the children of its rows, one row after the other.
template <class T>
struct Candidates {
  // Candidate i, without its key.
  __device__ Candidate Find(int i) const {
    int low = 0, high = static_cast<int>(s.rows);  // offsets[low] <= i < offsets[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (offsets[middle] <= i) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return {0, static_cast<uint32_t>(low), static_cast<uint32_t>(i - offsets[low])};
  }
  __device__ uint64_t KeyOf(const Candidate& candidate) const {
    const Row& row = rows[candidate.parent];
    const int64_t edge = row.first + candidate.slot;
    if (!Legal(s, level, row, b, edge)) return 0;
    const float x = Readable(ToFloat(RowOf<T>(s, b, candidate.parent)[level.Token(edge)]));
    if (x == -kInfinity) return 0;
    return Key(row.score + (static_cast<double>(x) / s.temperature - row.norm));
  }
  __device__ uint64_t KeyAt(int i) const { return i < s.cached ? keys[i] : KeyOf(Find(i)); }

  const Step& s;
  const Level& level;
  const Row* rows;
  const int* offsets;    // [rows + 1]
  const uint64_t* keys;  // [cached], of the first candidates
  int64_t b;
};

// The highest bin at which the counts from the top reach `wanted`, and the count above it; warp 0
// calls it. Bin 0 if they never do.
__device__ void FindBin(const int* counts, int wanted, int* bin, int* above) {
  constexpr int kEach = kBins / 32;
  const int lane = static_cast<int>(threadIdx.x);
  const int top = kBins - lane * kEach;  // this lane's bins are top - kEach .. top
  int own = 0;
  for (int i = 1; i <= kEach; ++i) own += counts[top - i];
  int before = own;  // inclusive sum over the lanes
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAll, before, step);
    if (lane >= step) before += other;
  }
  const unsigned reached = __ballot_sync(kAll, before >= wanted);
  const int chosen = reached == 0 ? 31 : __ffs(static_cast<int>(reached)) - 1;
  if (lane != chosen) return;
  int sum = before - own, at = top - 1;
  while (at > top - kEach && sum + counts[at] < wanted) sum += counts[at--];
  *bin = at;
  *above = sum;
}

// One block a request: the best candidates in order.
template <class T>
__global__ void __launch_bounds__(kSelectThreads) Select(Step s) {
  auto* const best = DynamicShared<Candidate>();                      // [capacity]
  auto* const keys = reinterpret_cast<uint64_t*>(best + s.capacity);  // [cached]
  auto* const offsets = reinterpret_cast<int*>(keys + s.cached);      // [rows + 1]
  __shared__ int counts[kBins];
  __shared__ int bin, above, found;
  __shared__ int warps[kSelectThreads / 32];
  __shared__ uint64_t ones[kSelectThreads / 32], all_ones[kSelectThreads / 32];
  const int64_t b = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const Row* const rows = s.row_info + b * s.rows;
  const Level level(s, s.level);
  const int wanted = static_cast<int>(s.widths == nullptr ? s.width : s.widths[b]);

  if (thread < 32) {  // where each row's candidates begin
    int sum = 0;
    for (int r = 0; r < s.rows; r += 32) {
      const int degree = r + thread < s.rows ? rows[r + thread].degree : 0;
      int inclusive = degree;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kAll, inclusive, step);
        if (thread >= step) inclusive += other;
      }
      if (r + thread < s.rows) offsets[r + thread] = sum + inclusive - degree;
      sum += __shfl_sync(kAll, inclusive, 31);
    }
    if (thread == 0) {
      offsets[s.rows] = sum;
      found = 0;
    }
  }
  __syncthreads();
  const int total = offsets[s.rows];
  const Candidates<T> candidates{s, level, rows, offsets, keys, b};

  // Every key once; the bits that some have and those that all have.
  uint64_t some = 0, all = ~uint64_t{0};
  ONEREC_UNROLL_BY(4)
  for (int i = thread; i < total; i += kSelectThreads) {
    const uint64_t key = candidates.KeyOf(candidates.Find(i));
    if (i < s.cached) keys[i] = key;
    if (key == 0) continue;
    some |= key;
    all &= key;
  }
  for (int step = 16; step > 0; step /= 2) {
    some |= __shfl_xor_sync(kAll, some, step);
    all &= __shfl_xor_sync(kAll, all, step);
  }
  if (thread % 32 == 0) {
    ones[thread / 32] = some;
    all_ones[thread / 32] = all;
  }
  __syncthreads();
  for (int warp = 0; warp < kSelectThreads / 32; ++warp) {
    some |= ones[warp];
    all &= all_ones[warp];
  }

  // Digit by digit below the bits that all keys share, until what is as good as the threshold can
  // be sorted.
  uint64_t threshold = 0, decided = 0;
  int missing = wanted, better = 0, shift = 0;
  if (wanted > 0 && total > s.capacity) {
    while (shift < 64 && (some ^ all) >> shift != 0) ++shift;
    decided = shift == 64 ? 0 : ~uint64_t{0} << shift;
    threshold = all & decided;
  }
  while (shift > 0) {
    const int bits = min(kDigitBits, shift);
    shift -= bits;
    for (int i = thread; i < kBins; i += kSelectThreads) counts[i] = 0;
    __syncthreads();
    for (int i = thread; i < total; i += kSelectThreads) {
      const uint64_t key = candidates.KeyAt(i);
      if (key != 0 && (key & decided) == threshold) {
        atomicAdd(&counts[(key >> shift) & ((uint64_t{1} << bits) - 1)], 1);
      }
    }
    __syncthreads();
    if (thread < 32) FindBin(counts, missing, &bin, &above);
    __syncthreads();
    threshold |= static_cast<uint64_t>(bin) << shift;
    decided |= ((uint64_t{1} << bits) - 1) << shift;
    better += above;
    missing -= above;
    const bool few = better + counts[bin] <= s.capacity;
    __syncthreads();  // counts and bin are read before the next round writes them
    if (few) {
      decided = 0;
      break;
    }
  }
  // `decided` is whole only if more candidates are equal to the threshold than can be sorted: then
  // the first `missing` of them are taken in their order.
  const bool tied = decided == ~uint64_t{0};
  for (int i = thread; i < total && wanted > 0; i += kSelectThreads) {
    const uint64_t key = candidates.KeyAt(i);
    if (key == 0 || (tied ? key <= threshold : key < threshold)) continue;
    Candidate& candidate = best[atomicAdd(&found, 1)];
    candidate = candidates.Find(i);
    candidate.key = key;
  }
  __syncthreads();
  if (tied) {
    int taken = 0;
    for (int begin = 0; begin < total && taken < missing; begin += kSelectThreads) {
      const int i = begin + thread;
      const bool equal = i < total && candidates.KeyAt(i) == threshold;
      const unsigned mask = __ballot_sync(kAll, equal);
      if (thread % 32 == 0) warps[thread / 32] = __popc(mask);
      __syncthreads();
      int place = taken + __popc(mask & ((1u << (thread % 32)) - 1)), all = 0;
      for (int warp = 0; warp < kSelectThreads / 32; ++warp) {
        if (warp < thread / 32) place += warps[warp];
        all += warps[warp];
      }
      if (equal && place < missing) {
        best[better + place] = candidates.Find(i);
        best[better + place].key = threshold;
      }
      taken += all;
      __syncthreads();
    }
    if (thread == 0) found = better + min(taken, missing);
    __syncthreads();
  }

  int size = 1;  // bitonic sort
  while (size < found) size *= 2;
  for (int i = found + thread; i < size; i += kSelectThreads) best[i] = {0, ~0u, ~0u};
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int i = thread; i < size / 2; i += kSelectThreads) {
        const int low = i / step * 2 * step + i % step, high = low + step;
        const Candidate a = best[low], z = best[high];
        if (Before(z, a) == ((low & run) == 0)) {
          best[low] = z;
          best[high] = a;
        }
      }
      __syncthreads();
    }
  }

  const int live = min(found, wanted);
  for (int i = thread; i < s.width; i += kSelectThreads) {
    const int64_t at = b * s.width + i;
    if (i < live) {
      const Candidate candidate = best[i];
      const int64_t edge = rows[candidate.parent].first + candidate.slot;
      s.out.parents[at] = candidate.parent;
      s.out.tokens[at] = level.Token(edge);
      s.out.nodes[at] = edge;
      s.out.scores[at] = Score(candidate.key);
    } else {
      s.out.parents[at] = 0;
      s.out.tokens[at] = s.out.nodes[at] = -1;
      s.out.scores[at] = -static_cast<double>(kInfinity);
    }
  }
  if (thread == 0) s.out.valid[b] = live;
}

template <class T>
void Run(Step s, int64_t batch, cudaStream_t stream) {
  if (s.rows > 0) {
    Launch("beam step, rows", RowPass<T>, static_cast<unsigned>(batch * s.rows), kRowThreads, 0,
           stream, s);
  }
  const size_t room = SharedRoom("beam step, select", Select<T>);
  const size_t fixed = s.capacity * sizeof(Candidate) + (s.rows + 1) * sizeof(int);
  if (room < fixed) {
    throw std::invalid_argument(WantedGot("rows and width",
                                          Text("few enough for ", room, " bytes of shared memory"),
                                          s.rows, " and ", s.width));
  }
  s.cached =
      static_cast<int>(std::min<int64_t>(s.rows * s.vocab, (room - fixed) / sizeof(uint64_t)));
  const size_t bytes = fixed + s.cached * sizeof(uint64_t);
  // Not `bytes`: another thread that needs fewer would take them away before the launch.
  AllowShared("beam step, select", Select<T>, room);
  Launch("beam step, select", Select<T>, static_cast<unsigned>(batch), kSelectThreads, bytes,
         stream, s);
}

}  // namespace

size_t CudaBeamStepBytes(int64_t batch, int64_t rows, int64_t items) {
  return (batch * rows) * (sizeof(Row) + items * sizeof(int64_t));
}

void CudaBeamStep(const uint64_t* trie, int codebook_size, const BeamStepInput& input,
                  Scoring scoring, double temperature, const BeamStepOutput& output,
                  void* workspace, void* stream) {
  if (input.rows > kMaxRows || output.width > kMaxRows) {
    throw std::invalid_argument(WantedGot("rows and width", Text("at most ", kMaxRows, " on CUDA"),
                                          input.rows, " and ", output.width));
  }
  if (input.batch == 0) return;
  Step s{};
  s.trie = trie;
  s.level = input.level;
  s.vocab = codebook_size;
  s.scoring = static_cast<int>(scoring);
  s.rows = input.rows;
  s.width = output.width;
  s.temperature = temperature;
  s.scale = static_cast<float>(std::min(1.4426950408889634 / temperature, 0x1.fffffep127));
  s.logits = input.logits.data;
  s.batch_stride = input.logits.batch_stride;
  s.row_stride = input.logits.row_stride;
  s.scores = input.scores;
  s.nodes = input.nodes;
  s.widths = input.widths;
  s.dead = input.dead;
  s.dead_offsets = input.dead_offsets;
  s.allow = input.allow;
  s.paths = input.paths;
  s.path_size = input.path_size;
  s.leaf_offsets = input.leaf_offsets;
  s.items = input.paths == nullptr ? 0 : static_cast<int>(input.items);
  s.row_info = static_cast<Row*>(workspace);
  s.used = reinterpret_cast<int64_t*>(s.row_info + input.batch * input.rows);
  s.out = output;
  s.capacity = 1024;
  while (s.capacity < 2 * output.width) s.capacity *= 2;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (input.logits.type) {
    case LogitType::kFloat32:
      return Run<float>(s, input.batch, on);
    case LogitType::kFloat16:
      return Run<__half>(s, input.batch, on);
    case LogitType::kBFloat16:
      return Run<__nv_bfloat16>(s, input.batch, on);
  }
}

}  // namespace onerec
