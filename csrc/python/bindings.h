// One Bind function per capability; module.cc calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace onerec::python {

void BindRuntime(pybind11::module_& m);
void BindBalancedKMeans(pybind11::module_& m);
void BindTrie(pybind11::module_& m);
void BindBeamSearch(pybind11::module_& m);
void BindPackedGemm(pybind11::module_& m);
void BindMoe(pybind11::module_& m);
void BindEngine(pybind11::module_& m);

}  // namespace onerec::python
