#include "onerec/balanced_kmeans.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "python/bindings.h"
#include "support/error.h"

namespace py = pybind11;

namespace onerec::python {
namespace {

FloatRows Rows(uintptr_t data, int64_t rows, int64_t columns, int64_t stride) {
  return {reinterpret_cast<const float*>(data), rows, columns, stride};
}

BalancedKMeansOptions Options(int num_threads, int64_t memory_budget, int cuda_device = -1) {
  BalancedKMeansOptions options;
  options.cuda_device = cuda_device;
  options.num_threads = num_threads;
  options.memory_budget = memory_budget;
  options.on_step = [] {  // Ctrl-C stops long work
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
  return options;
}

py::dict Report(const BalancedAssignment& work) {
  py::dict report;
  report["cost"] = work.cost;
  report["dual"] = work.dual;
  report["gap"] = work.gap;
  report["moves"] = work.moves;
  report["passes"] = work.passes;
  report["sweeps"] = work.sweeps;
  report["pass_seconds"] = work.pass_seconds;
  report["price_seconds"] = work.price_seconds;
  report["finish_seconds"] = work.finish_seconds;
  return report;
}

}  // namespace

void BindBalancedKMeans(py::module_& m) {
  m.def(
      "balanced_kmeans_fit",
      [](uintptr_t x, int64_t rows, int64_t columns, int64_t stride, int64_t clusters,
         const std::string& method, int max_iter, double tolerance, uint64_t seed, int num_threads,
         int64_t memory_budget, bool centers_given, uintptr_t centers, uintptr_t prices,
         uintptr_t labels, int steps_done, double inertia_done, const py::object& on_iteration,
         int cuda_device) {
        BalancedKMeansOptions options = Options(num_threads, memory_budget, cuda_device);
        if (method == "sequential") {
          options.method = BalancedMethod::kSequential;
        } else if (method != "priced") {
          throw std::invalid_argument(WantedGot("method", "priced or sequential", method));
        }
        options.max_iter = max_iter;
        options.tolerance = tolerance;
        options.seed = seed;
        options.steps_done = steps_done;
        options.inertia_done = inertia_done;
        if (!on_iteration.is_none()) {
          options.on_iteration = [&](int steps, double inertia) {
            const py::gil_scoped_acquire gil;
            on_iteration(steps, inertia);
          };
        }
        BalancedKMeansResult result;
        {
          const py::gil_scoped_release release;
          result = BalancedKMeansFit(Rows(x, rows, columns, stride), clusters, options,
                                     centers_given, reinterpret_cast<float*>(centers),
                                     reinterpret_cast<double*>(prices),
                                     reinterpret_cast<int32_t*>(labels));
        }
        py::dict report = Report(result.work);
        report["inertia"] = result.inertia;
        report["gap"] = result.gap;
        report["iterations"] = result.iterations;
        report["converged"] = result.converged;
        return report;
      },
      py::arg("x"), py::arg("rows"), py::arg("columns"), py::arg("stride"), py::arg("clusters"),
      py::arg("method"), py::arg("max_iter"), py::arg("tolerance"), py::arg("seed"),
      py::arg("num_threads"), py::arg("memory_budget"), py::arg("centers_given"),
      py::arg("centers"), py::arg("prices"), py::arg("labels"), py::arg("steps_done"),
      py::arg("inertia_done"), py::arg("on_iteration"), py::arg("cuda_device"));
  m.def(
      "balanced_assign",
      [](uintptr_t x, int64_t rows, int64_t columns, int64_t stride, uintptr_t centers,
         int64_t clusters, uint64_t seed, int num_threads, int64_t memory_budget, bool prices_given,
         uintptr_t prices, uintptr_t labels, bool labels_given, int cuda_device) {
        BalancedKMeansOptions options = Options(num_threads, memory_budget, cuda_device);
        options.seed = seed;
        BalancedAssignment work;
        {
          const py::gil_scoped_release release;
          work = BalancedAssign(Rows(x, rows, columns, stride),
                                reinterpret_cast<const float*>(centers), clusters, options,
                                prices_given, reinterpret_cast<double*>(prices),
                                reinterpret_cast<int32_t*>(labels), labels_given);
        }
        return Report(work);
      },
      py::arg("x"), py::arg("rows"), py::arg("columns"), py::arg("stride"), py::arg("centers"),
      py::arg("clusters"), py::arg("seed"), py::arg("num_threads"), py::arg("memory_budget"),
      py::arg("prices_given"), py::arg("prices"), py::arg("labels"),
      py::arg("labels_given") = false, py::arg("cuda_device") = -1);
  m.def(
      "priced_argmin",
      [](uintptr_t x, int64_t rows, int64_t columns, int64_t stride, uintptr_t centers,
         int64_t clusters, uintptr_t prices, int num_threads, uintptr_t labels, uintptr_t distances,
         int cuda_device) {
        const BalancedKMeansOptions options =
            Options(num_threads, BalancedKMeansOptions().memory_budget, cuda_device);
        const py::gil_scoped_release release;
        PricedArgmin(Rows(x, rows, columns, stride), reinterpret_cast<const float*>(centers),
                     clusters, reinterpret_cast<const double*>(prices), options,
                     reinterpret_cast<int32_t*>(labels), reinterpret_cast<double*>(distances));
      },
      py::arg("x"), py::arg("rows"), py::arg("columns"), py::arg("stride"), py::arg("centers"),
      py::arg("clusters"), py::arg("prices"), py::arg("num_threads"), py::arg("labels"),
      py::arg("distances"), py::arg("cuda_device") = -1);
  m.def(
      "capped_assign",
      [](uintptr_t x, int64_t rows, int64_t columns, int64_t stride, uintptr_t centers,
         int64_t clusters, uintptr_t prices, uintptr_t groups, int64_t cap, int num_threads,
         uintptr_t labels) {
        const BalancedKMeansOptions options =
            Options(num_threads, BalancedKMeansOptions().memory_budget);
        const py::gil_scoped_release release;
        CappedAssign(Rows(x, rows, columns, stride), reinterpret_cast<const float*>(centers),
                     clusters, reinterpret_cast<const double*>(prices),
                     reinterpret_cast<const int64_t*>(groups), cap, options,
                     reinterpret_cast<int32_t*>(labels));
      },
      py::arg("x"), py::arg("rows"), py::arg("columns"), py::arg("stride"), py::arg("centers"),
      py::arg("clusters"), py::arg("prices"), py::arg("groups"), py::arg("cap"),
      py::arg("num_threads"), py::arg("labels"));
  m.def(
      "assign_within",
      [](uintptr_t x, int64_t rows, int64_t columns, int64_t stride, uintptr_t centers,
         int64_t clusters, uintptr_t prices, uintptr_t room, int num_threads, uintptr_t labels) {
        const BalancedKMeansOptions options =
            Options(num_threads, BalancedKMeansOptions().memory_budget);
        const py::gil_scoped_release release;
        AssignWithin(Rows(x, rows, columns, stride), reinterpret_cast<const float*>(centers),
                     clusters, reinterpret_cast<const double*>(prices),
                     reinterpret_cast<const int64_t*>(room), options,
                     reinterpret_cast<int32_t*>(labels));
      },
      py::arg("x"), py::arg("rows"), py::arg("columns"), py::arg("stride"), py::arg("centers"),
      py::arg("clusters"), py::arg("prices"), py::arg("room"), py::arg("num_threads"),
      py::arg("labels"));
}

}  // namespace onerec::python
