// fastmeta._build_info: how the native extension was built, and what this processor offers it. No tensors here.
#include <pybind11/pybind11.h>

#include <cstdlib>
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

// The same rule as csrc/cpu/isa.cpp, which this module cannot call: it is linked against nothing.
py::dict cpu_features() {
  py::dict features;
  bool avx2 = false, avx512 = false;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
#define FEATURE(name) features[name] = bool(__builtin_cpu_supports(name))
  FEATURE("avx2");
  FEATURE("fma");
  FEATURE("avx512f");
  FEATURE("avx512vl");
  FEATURE("avx512dq");
  FEATURE("avx512bw");
#undef FEATURE
  avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
#endif
  const char* asked = std::getenv("FASTMETA_CPU_ISA");
  features["isa"] = asked && *asked ? asked : avx512 ? "avx512" : avx2 ? "avx2" : "baseline";
  return features;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How fastmeta's native extension was built, and what this processor offers it";
  m.def("build_info", &build_info, "Compiler, C++ standard, torch ABI target and CUDA, as a dict");
  m.def("cpu_features", &cpu_features, "Instruction sets of this processor, and the one the kernels use (`isa`)");
}
