// Inner loops of balanced k-means, one copy for each instruction set.
#pragma once

#include <cstdint>

#include "support/dispatch.h"

namespace onerec {

// Rows of lists are padded to a multiple of this many entries.
constexpr int64_t kListPad = 8;

struct KMeansKernels {
  int64_t mr;  // rows of the register tile
  int64_t nr;  // columns of the register tile: width of a packed panel of centres

  // out[r, k] = bias[k] + sum_j a[r, j] * packed(j, k) for `rows` rows (a multiple of mr) of `a`
  // ([rows, d], dense) and `columns` columns (a multiple of nr). packed holds [columns / nr] panels
  // of [d, nr]. Each sum is one chain of fused multiply-adds in the order of j (multiply, then add
  // on the baseline), so AVX2 and AVX-512 give the same bits.
  void (*cost_tile)(const float* a, int64_t rows, int64_t d, const float* packed, const float* bias,
                    int64_t columns, float* out);

  // Smallest of v[0..n), n a multiple of nr.
  float (*row_min)(const float* v, int64_t n);

  // least[g] = smallest of v[offset[g]..offset[g + 1]) for each of `groups` groups, none empty.
  void (*group_min)(const float* v, const int32_t* offset, int64_t groups, float* least);

  // The first position with v[i] <= limit; there is one.
  int64_t (*find)(const float* v, int64_t n, float limit);

  // Writes the positions with v[i] <= limit to `where`, in order, and returns their number. There
  // must be room for n rounded up to whole vectors.
  int64_t (*collect)(const float* v, int64_t n, float limit, int32_t* where);

  // The same with v[i] - base < limits[i], for any n.
  int64_t (*collect_each)(const float* v, float base, const float* limits, int64_t n,
                          int32_t* where);

  // One row of an entropic sweep over all columns: column[k] += weight * share[k], share being
  // the softmax over k of -(v[k] + p[k]) / eps. n is a multiple of nr; padding columns have v =
  // +huge. Returns min(v + p) and, in *sum, the sum of exp(-(v[k] + p[k] - min) / eps).
  float (*soft_row)(const float* v, const float* p, int64_t n, float inverse_eps, float weight,
                    float* share, float* column, float* sum);

  // The same over one row of a list (n a multiple of kListPad, padded with rel = +huge).
  float (*soft_list)(const float* rel, const int32_t* code, const float* p, int64_t n,
                     float inverse_eps, float weight, float* share, float* column, float* sum);

  // Position of the smallest rel + p[code] of a list row; the first of equals.
  int64_t (*list_argmin)(const float* rel, const int32_t* code, const float* p, int64_t n,
                         float* smallest);

  // The same of those whose code is not `own`, -1 if there is none.
  int64_t (*list_other)(const float* rel, const int32_t* code, const float* p, int64_t n,
                        int32_t own, float* smallest);

  // Writes the rows r of `rows` list rows, which begin at offset[r], that have an entry with
  // rel + p[code] < limits[r] whose code is not own[r] to `where`, in order; returns their number.
  int64_t (*lists_below)(const float* rel, const int32_t* code, const int64_t* offset,
                         const float* p, const int32_t* own, const float* limits, int64_t rows,
                         int32_t* where);

  // Squared distance in float64, summed over eight lanes and then pairwise: the same bits on every
  // instruction set.
  double (*exact_cost)(const float* x, const float* c, int64_t d);

  // The same from the mean, with x less the mean in `centred`.
  double (*centre)(const float* x, const float* mean, int64_t d, float* centred);

  // Squared distance in float32, relative error below (d + 8) * 2^-24.
  float (*near_cost)(const float* x, const float* c, int64_t d);
};

ONEREC_EACH_ISA(extern const KMeansKernels kKMeansKernels;)

}  // namespace onerec
