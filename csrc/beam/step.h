// What the search over sessions takes from the step.
#pragma once

#include <cstdint>
#include <limits>

#include "beam/filter.h"
#include "onerec/beam_search.h"

namespace onerec {

inline constexpr double kDeadScore = -std::numeric_limits<double>::infinity();

// Errors of type std::invalid_argument.
void CheckTemperature(double temperature);
void CheckWidth(int64_t width);
void CheckWidths(const int64_t* widths, int64_t batch, int64_t most);

// Makes room for steps of up to so many rows and `items` finished items a beam.
void ReserveStep(BeamWorkspace::Impl& workspace, int64_t batch, int64_t rows, int64_t width,
                 int64_t vocab, int64_t items, int num_threads);

// BeamStep with checked arguments. filters: [batch] or null. own: null, or paths whose edges of
// finished items lie at beam * path_size. legal: null, or where each beam's logits begin when they
// are those of its legal children alone.
void RunStep(const TrieView& trie, const BeamStepInput& input, Scoring scoring, double temperature,
             const BeamStepOutput& output, const RequestFilter* filters, const OwnItems* own,
             const int64_t* legal, BeamWorkspace::Impl& workspace, int num_threads);

}  // namespace onerec
