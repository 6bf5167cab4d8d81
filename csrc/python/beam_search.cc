#include "onerec/beam_search.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "python/bindings.h"

namespace py = pybind11;

namespace onerec::python {
namespace {

Logits MakeLogits(uintptr_t data, int type, int64_t batch_stride, int64_t row_stride) {
  return {reinterpret_cast<const void*>(data), static_cast<LogitType>(type), batch_stride,
          row_stride};
}

}  // namespace

void BindBeamSearch(py::module_& m) {
  m.def(
      "beam_step",
      [](uintptr_t trie, size_t trie_bytes, int level, uintptr_t logits, int type,
         int64_t batch_stride, int64_t row_stride, int64_t batch, int64_t rows, uintptr_t scores,
         uintptr_t nodes, uintptr_t widths, uintptr_t dead, uintptr_t dead_offsets, uintptr_t tags,
         uintptr_t allow, uintptr_t paths, int64_t path_size, int64_t items, uintptr_t leaf_offsets,
         uintptr_t leaf_tags, int scoring, double temperature, int64_t width, uintptr_t out_parents,
         uintptr_t out_tokens, uintptr_t out_nodes, uintptr_t out_scores, uintptr_t out_valid,
         int num_threads) {
        thread_local BeamWorkspace workspace;
        const BeamStepInput input{batch,
                                  rows,
                                  level,
                                  MakeLogits(logits, type, batch_stride, row_stride),
                                  reinterpret_cast<const double*>(scores),
                                  reinterpret_cast<const int64_t*>(nodes),
                                  reinterpret_cast<const int64_t*>(widths),
                                  reinterpret_cast<const int64_t*>(dead),
                                  reinterpret_cast<const int64_t*>(dead_offsets),
                                  reinterpret_cast<const uint64_t*>(tags),
                                  reinterpret_cast<const uint64_t*>(allow),
                                  reinterpret_cast<const int64_t*>(paths),
                                  path_size,
                                  items,
                                  reinterpret_cast<const int64_t*>(leaf_offsets),
                                  reinterpret_cast<const uint64_t*>(leaf_tags)};
        const BeamStepOutput output{width,
                                    reinterpret_cast<int64_t*>(out_parents),
                                    reinterpret_cast<int64_t*>(out_tokens),
                                    reinterpret_cast<int64_t*>(out_nodes),
                                    reinterpret_cast<double*>(out_scores),
                                    reinterpret_cast<int32_t*>(out_valid)};
        BeamStep(ViewTrie(reinterpret_cast<const void*>(trie), trie_bytes), input,
                 static_cast<Scoring>(scoring), temperature, output, workspace, num_threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "legal_logits",
      [](uintptr_t hidden, int64_t batch_stride, int64_t row_stride, int64_t size, int64_t beams,
         uintptr_t head, int64_t head_stride, uintptr_t rows, uintptr_t codes, int64_t count,
         uintptr_t logits, int num_threads) {
        LegalLogits({reinterpret_cast<const float*>(hidden), batch_stride, row_stride, size, beams},
                    reinterpret_cast<const float*>(head), head_stride,
                    reinterpret_cast<const int64_t*>(rows), reinterpret_cast<const int32_t*>(codes),
                    count, reinterpret_cast<float*>(logits), num_threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("cuda_beam_step_bytes", &CudaBeamStepBytes);
  m.def("cuda_beam_step",
        [](uintptr_t trie, int codebook_size, int level, uintptr_t logits, int type,
           int64_t batch_stride, int64_t row_stride, int64_t batch, int64_t rows, uintptr_t scores,
           uintptr_t nodes, uintptr_t widths, uintptr_t dead, uintptr_t dead_offsets,
           uintptr_t tags, uintptr_t allow, uintptr_t paths, int64_t path_size, int64_t items,
           uintptr_t leaf_offsets, uintptr_t leaf_tags, int scoring, double temperature,
           int64_t width, uintptr_t out_parents, uintptr_t out_tokens, uintptr_t out_nodes,
           uintptr_t out_scores, uintptr_t out_valid, uintptr_t workspace, uintptr_t stream) {
          CudaBeamStep(
              reinterpret_cast<const uint64_t*>(trie), codebook_size,
              {batch, rows, level, MakeLogits(logits, type, batch_stride, row_stride),
               reinterpret_cast<const double*>(scores), reinterpret_cast<const int64_t*>(nodes),
               reinterpret_cast<const int64_t*>(widths), reinterpret_cast<const int64_t*>(dead),
               reinterpret_cast<const int64_t*>(dead_offsets),
               reinterpret_cast<const uint64_t*>(tags), reinterpret_cast<const uint64_t*>(allow),
               reinterpret_cast<const int64_t*>(paths), path_size, items,
               reinterpret_cast<const int64_t*>(leaf_offsets),
               reinterpret_cast<const uint64_t*>(leaf_tags)},
              static_cast<Scoring>(scoring), temperature,
              {width, reinterpret_cast<int64_t*>(out_parents),
               reinterpret_cast<int64_t*>(out_tokens), reinterpret_cast<int64_t*>(out_nodes),
               reinterpret_cast<double*>(out_scores), reinterpret_cast<int32_t*>(out_valid)},
              reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream));
        });
  py::class_<BeamSearch>(m, "BeamSearch")
      .def(py::init([](std::shared_ptr<Trie> trie, int64_t batch, int64_t width, int64_t items,
                       int scoring, double temperature, int num_threads,
                       std::vector<int64_t> ramp) {
        return std::make_unique<BeamSearch>(
            std::move(trie), BeamSearchOptions{batch, width, items, static_cast<Scoring>(scoring),
                                               temperature, num_threads, std::move(ramp)});
      }))
      .def(
          "reset",
          [](BeamSearch& s, uintptr_t deny, uintptr_t offsets, uintptr_t allow, uintptr_t widths,
             std::shared_ptr<Trie> trie) {
            s.Reset(
                {reinterpret_cast<const int64_t*>(deny), reinterpret_cast<const int64_t*>(offsets),
                 reinterpret_cast<const uint64_t*>(allow),
                 reinterpret_cast<const int64_t*>(widths)},
                std::move(trie));
          },
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("rows", &BeamSearch::Rows)
      .def("legal",
           [](BeamSearch& s) {
             const LegalCodes& legal = s.Legal();
             return py::make_tuple(reinterpret_cast<uintptr_t>(legal.offsets),
                                   reinterpret_cast<uintptr_t>(legal.codes));
           })
      .def(
          "step_legal",
          [](BeamSearch& s, uintptr_t logits, int64_t count) {
            s.StepLegal(reinterpret_cast<const float*>(logits), count);
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "step",
          [](BeamSearch& s, uintptr_t logits, int type, int64_t batch_stride, int64_t row_stride,
             int64_t rows) { s.Step(MakeLogits(logits, type, batch_stride, row_stride), rows); },
          py::call_guard<py::gil_scoped_release>())
      .def("state",
           [](const BeamSearch& s, uintptr_t parents, uintptr_t tokens, uintptr_t scores,
              uintptr_t valid) {
             s.State(reinterpret_cast<int64_t*>(parents), reinterpret_cast<int64_t*>(tokens),
                     reinterpret_cast<float*>(scores), reinterpret_cast<int32_t*>(valid));
           })
      .def("items",
           [](const BeamSearch& s, uintptr_t items) { s.Items(reinterpret_cast<int64_t*>(items)); })
      .def("sids",
           [](const BeamSearch& s, uintptr_t sids) { s.Sids(reinterpret_cast<int32_t*>(sids)); });
}

}  // namespace onerec::python
