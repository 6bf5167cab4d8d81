#include "onerec/trie.h"

#include <pybind11/numpy.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "onerec/live_trie.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace onerec::python {
namespace {

// pybind11 holds no pointers to const; every method that it binds below is const.
std::shared_ptr<Trie> Mutable(std::shared_ptr<const Trie> trie) {
  return std::const_pointer_cast<Trie>(std::move(trie));
}

}  // namespace

void BindTrie(py::module_& m) {
  py::register_exception<TrieFormatError>(m, "TrieFormatError", PyExc_RuntimeError);
  py::class_<Trie, std::shared_ptr<Trie>>(m, "Trie")
      .def_static(
          "build",
          [](uintptr_t sids, int64_t n, int64_t row_stride, int levels, int codebook_size) {
            return Mutable(Trie::Build(reinterpret_cast<const int32_t*>(sids), n, row_stride,
                                       levels, codebook_size));
          },
          py::call_guard<py::gil_scoped_release>())
      .def_static(
          "load", [](const std::string& path) { return Mutable(Trie::Load(path)); },
          py::call_guard<py::gil_scoped_release>())
      .def_static("from_bytes",
                  [](const py::bytes& bytes) {
                    const std::string_view view = bytes;
                    return Mutable(Trie::FromBytes(view.data(), view.size()));
                  })
      .def("save", &Trie::Save, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("levels", [](const Trie& t) { return t.View().levels; })
      .def_property_readonly("codebook_size", [](const Trie& t) { return t.View().codebook_size; })
      .def_property_readonly("n_leaves", [](const Trie& t) { return t.View().Leaves(); })
      .def_property_readonly("address",
                             [](const Trie& t) { return reinterpret_cast<uintptr_t>(t.Data()); })
      .def_property_readonly("nbytes", &Trie::Bytes)
      .def("level_stats",
           [](const Trie& t, int level) {
             const TrieLevelStats s = t.LevelStats(level);
             return py::make_tuple(s.nodes, s.edges, s.max_degree, s.single_child);
           })
      .def_property_readonly("n_live", &Trie::LiveLeaves)
      .def_property_readonly("has_tags", [](const Trie& t) { return t.Tags(0) != nullptr; })
      .def("removed",
           [](const Trie& t) {
             const std::vector<int64_t>& leaves = t.Dead(t.View().levels - 1);
             return py::array_t<int64_t>(static_cast<py::ssize_t>(leaves.size()), leaves.data());
           })
      .def("tags",
           [](const Trie& t, int level) {
             const auto size = static_cast<py::ssize_t>(t.View().nodes[level + 1]);
             return py::array_t<uint64_t>(t.Tags(level) == nullptr ? 0 : size, t.Tags(level));
           })
      .def(
          "without",
          [](const Trie& t, uintptr_t leaves, int64_t n) {
            return Mutable(t.Without(reinterpret_cast<const int64_t*>(leaves), n));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "with_tags",
          [](const Trie& t, uintptr_t tags) {
            return Mutable(t.WithTags(reinterpret_cast<const uint64_t*>(tags)));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "with_sids",
          [](const Trie& t, uintptr_t sids, int64_t n, int64_t row_stride, uintptr_t tags) {
            return Mutable(t.With(reinterpret_cast<const int32_t*>(sids), n, row_stride,
                                  reinterpret_cast<const uint64_t*>(tags)));
          },
          py::call_guard<py::gil_scoped_release>())
      .def("dead_edges",
           [](const Trie& t, int level, uint64_t allow, uintptr_t leaves, int64_t n) {
             const auto* const begin = reinterpret_cast<const int64_t*>(leaves);
             std::vector<int64_t> dead[kMaxTrieLevels];
             t.AppendDead(allow, {begin, begin + n}, dead);
             return py::array_t<int64_t>(static_cast<py::ssize_t>(dead[level].size()),
                                         dead[level].data());
           })
      .def(
          "lookup",
          [](const Trie& t, uintptr_t prefixes, int64_t n, int64_t row_stride, int depth,
             uintptr_t nodes, int num_threads) {
            t.Lookup(reinterpret_cast<const int32_t*>(prefixes), n, row_stride, depth,
                     reinterpret_cast<int64_t*>(nodes), num_threads);
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "bitmask",
          [](const Trie& t, uintptr_t nodes, int64_t n, int depth, uintptr_t words) {
            t.Bitmask(reinterpret_cast<const int64_t*>(nodes), n, depth,
                      reinterpret_cast<uint32_t*>(words));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "leaf_sids",
          [](const Trie& t, uintptr_t leaves, int64_t n, uintptr_t sids) {
            t.LeafSids(reinterpret_cast<const int64_t*>(leaves), n,
                       reinterpret_cast<int32_t*>(sids));
          },
          py::call_guard<py::gil_scoped_release>());
  py::class_<LiveTrie>(m, "LiveTrie")
      .def(py::init(
          [](std::shared_ptr<Trie> trie) { return std::make_unique<LiveTrie>(std::move(trie)); }))
      .def("pin",
           [](const LiveTrie& t) {
             LiveTrie::Epoch epoch = t.Pin();
             return std::make_pair(epoch.id, Mutable(std::move(epoch.trie)));
           })
      .def(
          "insert",
          [](LiveTrie& t, uintptr_t sids, int64_t n, int64_t row_stride, uintptr_t tags) {
            return t.Insert(reinterpret_cast<const int32_t*>(sids), n, row_stride,
                            reinterpret_cast<const uint64_t*>(tags));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "remove",
          [](LiveTrie& t, uintptr_t sids, int64_t n, int64_t row_stride) {
            return t.Remove(reinterpret_cast<const int32_t*>(sids), n, row_stride);
          },
          py::call_guard<py::gil_scoped_release>())
      .def("fold", &LiveTrie::Fold, py::call_guard<py::gil_scoped_release>())
      .def(
          "swap", [](LiveTrie& t, std::shared_ptr<Trie> trie) { return t.Swap(std::move(trie)); },
          py::call_guard<py::gil_scoped_release>())
      .def("rollback", &LiveTrie::Rollback, py::call_guard<py::gil_scoped_release>());
}

}  // namespace onerec::python
