#include "onerec/packed_gemm.h"

#include <cstdint>

#include "python/bindings.h"

namespace py = pybind11;

namespace onerec::python {

void BindPackedGemm(py::module_& m) {
  m.def("packed_bytes", [](int64_t n, int64_t k, int type) {
    return PackedBytes(n, k, static_cast<WeightType>(type));
  });
  m.def("advise_large_pages", [](uintptr_t data, int64_t bytes) {
    AdviseLargePages(reinterpret_cast<void*>(data), bytes);
  });
  m.def(
      "pack_weights",
      [](uintptr_t w, int64_t n, int64_t k, int64_t row_stride, int type, uintptr_t packed,
         int num_threads) {
        PackWeights(reinterpret_cast<const float*>(w), n, k, row_stride,
                    static_cast<WeightType>(type), reinterpret_cast<void*>(packed), num_threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "packed_gemm",
      [](uintptr_t x, int64_t rows, int64_t x_stride, uintptr_t packed, int64_t n, int64_t k,
         int type, uintptr_t y, int64_t y_stride, bool add, int num_threads) {
        const PackedMatrix w{reinterpret_cast<const void*>(packed), static_cast<WeightType>(type),
                             n, k};
        PackedGemm(reinterpret_cast<const float*>(x), rows, x_stride, w,
                   reinterpret_cast<float*>(y), y_stride, add, num_threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace onerec::python
