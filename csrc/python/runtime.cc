#include "onerec/runtime.h"

#include <stdexcept>
#include <string>

#include "python/bindings.h"
#include "support/error.h"

namespace py = pybind11;

namespace onerec::python {

void BindRuntime(py::module_& m) {
  m.def("version", &Version);
  m.def("isa", [] { return IsaName(CurrentIsa()); });
  m.def("isas", [] {
    py::list names;
    for (Isa isa : kIsas) {
      if (IsaAvailable(isa)) names.append(IsaName(isa));
    }
    return names;
  });
  m.def("set_isa", [](const std::string& name) {
    for (Isa isa : kIsas) {
      if (name == IsaName(isa)) return SetIsa(isa);
    }
    throw std::invalid_argument(WantedGot("isa", "baseline, avx2, avx512 or avx512_bf16", name));
  });
  m.def("cuda_info", [] {
    const CudaInfo info = GetCudaInfo();
    py::dict result;
    result["built"] = info.built;
    result["devices"] = info.devices;
    result["problem"] = info.problem;
    return result;
  });
}

}  // namespace onerec::python
