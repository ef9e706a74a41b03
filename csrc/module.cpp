// The module fastmeta._C. Importing it loads the library, which registers its kernels as torch.ops.fastmeta_native;
// it tells besides what this processor offers them. It keeps to Python's limited API: one binary serves every version.
#include <Python.h>

#include <exception>
#include <string>

#include "cpu/kernels.h"

#if defined(__GLIBC__)
// libstdc++'s headers ask this variable of glibc 2.32 whether there is but one thread. A wheel is for older systems
// too: here it always says no.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif

namespace {

std::string chosen_isa() {
  try {
    return fastmeta::cpu::isa().name;
  } catch (const std::exception& error) {
    return error.what();
  }
}

PyObject* cpu_features(PyObject*, PyObject*) {
  const std::string isa = chosen_isa();
#if FASTMETA_X86
  __builtin_cpu_init();
#define FEATURE(name) name, PyBool_FromLong(__builtin_cpu_supports(name) != 0)
  return Py_BuildValue("{s:N,s:N,s:N,s:N,s:N,s:N,s:s}", FEATURE("avx2"), FEATURE("fma"), FEATURE("avx512f"),
                       FEATURE("avx512vl"), FEATURE("avx512dq"), FEATURE("avx512bw"), "isa", isa.c_str());
#undef FEATURE
#else
  return Py_BuildValue("{s:s}", "isa", isa.c_str());
#endif
}

PyMethodDef methods[] = {
    {"cpu_features", cpu_features, METH_NOARGS,
     "Instruction sets of this processor, and `isa`: the one that the kernels use, or why there is none."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "Kernels of fastmeta, registered as torch.ops.fastmeta_native", -1, methods,
      nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
