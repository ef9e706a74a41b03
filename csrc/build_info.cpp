// fastmeta._build_info: how the native extension was built. pybind11 fits one version of Python alone: a wheel, which
// is for all, holds what this module says as a file of Python (setup.py).
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(FASTMETA_COMPILER)
  info["compiler_command"] = FASTMETA_COMPILER;
#endif
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = std::string("gcc ") + __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#if defined(FASTMETA_FLAGS)
  info["flags"] = FASTMETA_FLAGS;
#else
  info["flags"] = py::none();
#endif
  info["cxx_standard"] = 20;
#if defined(FASTMETA_TORCH_TARGET)
  info["torch_target"] = FASTMETA_TORCH_TARGET;
#else
  info["torch_target"] = py::none();
#endif
#if defined(FASTMETA_WITH_CUDA)
  info["with_cuda"] = bool(FASTMETA_WITH_CUDA);
#else
  info["with_cuda"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How fastmeta's native extension was built";
  m.def("build_info", &build_info, "Compiler, C++ standard, torch ABI target and CUDA, as a dict");
}
