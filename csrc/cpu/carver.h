// Arrays in the scratch memory of a worker thread.
#pragma once

#include <fastmeta/simd.h>

namespace fastmeta::FASTMETA_ISA {

// Carves aligned arrays out of a buffer: once with a null base to learn the size, once to take.
struct Carver {
  char* base;
  size_t used = 0;
  template <class E>
  E* take(int64_t n) {
    E* p = reinterpret_cast<E*>(base + used);
    used += (size_t(n > 0 ? n : 0) * sizeof(E) + 63) / 64 * 64;
    return p;
  }
};

}  // namespace fastmeta::FASTMETA_ISA
