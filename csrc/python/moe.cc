#include "onerec/moe.h"

#include <cstdint>

#include "python/bindings.h"

namespace py = pybind11;

namespace onerec::python {

void BindMoe(py::module_& m) {
  py::class_<PackedExperts>(m, "PackedExperts")
      .def(py::init([](uintptr_t gate, uintptr_t up, uintptr_t down, int type, int activation,
                       int64_t count, int64_t width, int64_t hidden) {
        PackedExperts experts;
        experts.gate = reinterpret_cast<const void*>(gate);
        experts.up = reinterpret_cast<const void*>(up);
        experts.down = reinterpret_cast<const void*>(down);
        experts.type = static_cast<WeightType>(type);
        experts.activation = static_cast<Activation>(activation);
        experts.count = count;
        experts.width = width;
        experts.hidden = hidden;
        return experts;
      }))
      .def("workspace", [](const PackedExperts& experts, int64_t tokens,
                           int64_t slots) { return MoeWorkspaceBytes(tokens, slots, experts); })
      .def(
          "forward",
          [](PackedExperts experts, uintptr_t x, int64_t tokens, int64_t x_stride, uintptr_t ids,
             uintptr_t gates, int64_t slots, int64_t first, uintptr_t workspace, uintptr_t y,
             int num_threads) {
            experts.first = first;
            MoeForward(reinterpret_cast<const float*>(x), tokens, x_stride,
                       reinterpret_cast<const int64_t*>(ids), reinterpret_cast<const float*>(gates),
                       slots, experts, reinterpret_cast<void*>(workspace),
                       reinterpret_cast<float*>(y), experts.width, false, num_threads);
          },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace onerec::python
