#include <pybind11/pybind11.h>

#include "python/bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of onerec; addresses in, nothing kept. Use the functions of onerec.ops.";
  onerec::python::BindRuntime(m);
  onerec::python::BindBalancedKMeans(m);
  onerec::python::BindTrie(m);
  onerec::python::BindBeamSearch(m);
  onerec::python::BindPackedGemm(m);
  onerec::python::BindMoe(m);
  onerec::python::BindEngine(m);
}
