#include "onerec/engine.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "onerec/recommender.h"
#include "python/bindings.h"
#include "recommender/mixture.h"
#include "support/error.h"

namespace py = pybind11;

namespace onerec::python {
namespace {

// Name and address of every field of the config.
template <class Config, class Visit>
void EachField(Config& c, Visit&& visit) {
  visit("levels", c.levels);
  visit("codebook_size", c.codebook_size);
  visit("session_length", c.session_length);
  visit("history_length", c.history_length);
  visit("history_is_items", c.history_is_items);
  visit("causal", c.causal);
  visit("n_items", c.n_items);
  visit("dense_head", c.dense_head);
  visit("legal_softmax", c.legal_softmax);
  visit("node_outputs", c.node_outputs);
  visit("decoder_start", c.decoder_start);
  visit("d_model", c.d_model);
  visit("n_heads", c.n_heads);
  visit("encoder_layers", c.encoder_layers);
  visit("decoder_layers", c.decoder_layers);
  visit("d_ff", c.d_ff);
  visit("n_experts", c.n_experts);
  visit("experts_per_token", c.experts_per_token);
  visit("expert_d_ff", c.expert_d_ff);
  visit("normalize_gates", c.normalize_gates);
  visit("activation", c.activation);
  visit("share_codes", c.share_codes);
  visit("bfloat16", c.bfloat16);
  visit("norm_eps", c.norm_eps);
}

// Requests of nothing but a history: b has elements offsets[b] .. of `history`.
std::vector<EngineRequest> Histories(const Engine& engine, uintptr_t history, uintptr_t offsets,
                                     int64_t batch) {
  const EngineConfig& c = engine.Model().Config();
  const auto* const begin = reinterpret_cast<const int64_t*>(offsets);
  std::vector<EngineRequest> requests(batch);
  for (int64_t b = 0; b < batch; ++b) {
    EngineRequest& request = requests[b];
    request.history =
        reinterpret_cast<const int32_t*>(history) + begin[b] * (c.n_items > 0 ? 1 : c.levels);
    request.items = begin[b + 1] - begin[b];
  }
  return requests;
}

// pybind11 holds no pointers to const; every method that it binds below is const.
std::shared_ptr<EngineModel> Mutable(std::shared_ptr<const EngineModel> model) {
  return std::const_pointer_cast<EngineModel>(std::move(model));
}

}  // namespace

void BindEngine(py::module_& m) {
  py::register_exception<EngineFormatError>(m, "EngineFormatError", PyExc_RuntimeError);
  py::class_<EngineModel, std::shared_ptr<EngineModel>>(m, "EngineModel")
      .def_static("build",
                  [](const py::dict& fields, const py::dict& tensors, int num_threads) {
                    EngineConfig config;
                    EachField(config, [&](const char* name, auto& field) {
                      field = fields[name].cast<std::remove_reference_t<decltype(field)>>();
                    });
                    // Tensor -> (address, elements).
                    const auto source = [&](const std::string& name, int64_t elements) {
                      if (!tensors.contains(name)) {
                        throw std::invalid_argument("no tensor " + name);
                      }
                      const py::tuple found = tensors[py::str(name)];
                      if (found[1].cast<int64_t>() != elements) {
                        throw std::invalid_argument(
                            WantedGot(name, Text(elements, " elements"), found[1].cast<int64_t>()));
                      }
                      return reinterpret_cast<const float*>(found[0].cast<uintptr_t>());
                    };
                    return Mutable(EngineModel::Build(config, source, num_threads));
                  })
      .def_static(
          "load", [](const std::string& path) { return Mutable(EngineModel::Load(path)); },
          py::call_guard<py::gil_scoped_release>())
      .def("save", &EngineModel::Save, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("nbytes", &EngineModel::Bytes)
      .def_property_readonly(
          "item_sids",
          [](const EngineModel& model) { return reinterpret_cast<uintptr_t>(model.ItemSids()); })
      .def_property_readonly("config", [](const EngineModel& model) {
        py::dict fields;
        EachField(model.Config(), [&](const char* name, auto value) { fields[name] = value; });
        return fields;
      });
  m.def(
      "save_catalog",
      [](const std::string& path, int64_t n, int64_t leaves, uintptr_t leaf_of_item, bool text,
         uintptr_t ids, uintptr_t offsets, uintptr_t tags, uint64_t engine, uint64_t trie,
         uint64_t mixture) {
        SaveCatalog(path, n, leaves, reinterpret_cast<const int64_t*>(leaf_of_item), text,
                    reinterpret_cast<const void*>(ids), reinterpret_cast<const int64_t*>(offsets),
                    reinterpret_cast<const uint64_t*>(tags), engine, trie, mixture);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("save_mixture",
        [](const std::string& path, int64_t n, uintptr_t place, const std::vector<double>& masked,
           const std::vector<double>& unmasked, const std::vector<std::array<uintptr_t, 3>>& lists,
           const std::vector<std::array<uintptr_t, 6>>& parts) {
          std::vector<CountList> kept_lists;
          for (const auto& [offsets, items, weights] : lists) {
            kept_lists.push_back({reinterpret_cast<const int64_t*>(offsets),
                                  reinterpret_cast<const int32_t*>(items),
                                  reinterpret_cast<const float*>(weights)});
          }
          std::vector<CountPart> kept_parts;
          for (const auto& [list, ages, recency, constants, items, weights] : parts) {
            kept_parts.push_back({static_cast<int64_t>(list),
                                  {reinterpret_cast<const double*>(recency), ages},
                                  {reinterpret_cast<const int64_t*>(items), constants},
                                  {reinterpret_cast<const double*>(weights), constants}});
          }
          SaveMixture(path, n, reinterpret_cast<const int64_t*>(place), masked.data(),
                      unmasked.data(), kept_lists, kept_parts);
        });
  py::class_<Engine>(m, "Engine")
      .def(py::init([](std::shared_ptr<EngineModel> model, std::shared_ptr<Trie> trie) {
        return std::make_unique<Engine>(std::move(model), std::move(trie));
      }))
      .def(
          "run",
          [](const Engine& engine, uintptr_t history, uintptr_t offsets, uintptr_t deny,
             uintptr_t deny_offsets, uintptr_t allow, int64_t batch, int64_t width,
             int64_t session_length, int scoring, double temperature, int num_threads,
             uintptr_t items, uintptr_t sids, uintptr_t scores, uintptr_t valid) {
            std::vector<EngineRequest> requests = Histories(engine, history, offsets, batch);
            const auto* const leaves = reinterpret_cast<const int64_t*>(deny);
            const auto* const first = reinterpret_cast<const int64_t*>(deny_offsets);
            for (int64_t b = 0; b < batch; ++b) {
              EngineRequest& request = requests[b];
              request.deny = leaves + first[b];
              request.denied = first[b + 1] - first[b];
              request.allow = reinterpret_cast<const uint64_t*>(allow)[b];
            }
            engine.Run(
                requests.data(), batch,
                {width, session_length, static_cast<Scoring>(scoring), temperature, num_threads},
                {reinterpret_cast<int64_t*>(items), reinterpret_cast<int32_t*>(sids),
                 reinterpret_cast<float*>(scores), reinterpret_cast<int32_t*>(valid)});
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "item_scores",
          [](const Engine& engine, uintptr_t history, uintptr_t offsets, int64_t batch,
             int num_threads, uintptr_t scores) {
            engine.ItemScores(Histories(engine, history, offsets, batch).data(), batch, num_threads,
                              reinterpret_cast<float*>(scores));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "item_log_probs",
          [](const Engine& engine, uintptr_t history, uintptr_t offsets, int64_t batch,
             uintptr_t items, int64_t count, int num_threads, uintptr_t scores) {
            engine.ItemLogProbs(Histories(engine, history, offsets, batch).data(), batch,
                                reinterpret_cast<const int64_t*>(items), count, num_threads,
                                reinterpret_cast<float*>(scores));
          },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace onerec::python
