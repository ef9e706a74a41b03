// Activations over an array, and their derivatives.
#pragma once

#include <fastmeta/vmath.h>

#include "kernels.h"

namespace fastmeta::FASTMETA_ISA {

template <class T, class F>
FM_INLINE void map_vectors(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += kWidth<T>) f(i);
}

// n is a multiple of the vector width in both.
template <class T>
void activate(int64_t activation, const T* z, T* h, int64_t n) {
  switch (activation) {
    case cpu::kRelu:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) { store(h + i, maximum(Vec<T>{}, load(z + i))); });
    case cpu::kTanh:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) { store(h + i, hyperbolic_tangent<T>(load(z + i))); });
    case cpu::kSigmoid:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) { store(h + i, sigmoid<T>(load(z + i))); });
    case cpu::kSilu:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) { store(h + i, load(z + i) * sigmoid<T>(load(z + i))); });
    case cpu::kGelu:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
        const Vec<T> x = load(z + i);
        store(h + i, T(0.5) * x * (1 + error_function<T>(x * T(0.70710678118654752440))));
      });
    case cpu::kSine:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) { store(h + i, sine<T>(load(z + i))); });
    default:
      if (h != z) memcpy(h, z, size_t(n) * sizeof(T));
  }
}

// whether the derivative needs the pre-activation, or is a function of the activation's own value
FM_INLINE bool derivative_needs_input(int64_t activation) {
  return activation == cpu::kSilu || activation == cpu::kGelu || activation == cpu::kSine;
}

// g *= derivative, with h the value and z the pre-activation (read only where `derivative_needs_input`)
template <class T>
void times_derivative(int64_t activation, const T* z, const T* h, T* g, int64_t n) {
  switch (activation) {
    case cpu::kRelu:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
        store(g + i, where_active(load(h + i), load(g + i)));
      });
    case cpu::kTanh:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
        const Vec<T> y = load(h + i);
        store(g + i, load(g + i) * (1 - y * y));
      });
    case cpu::kSigmoid:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
        const Vec<T> y = load(h + i);
        store(g + i, load(g + i) * (y * (1 - y)));
      });
    case cpu::kSilu:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
        const Vec<T> x = load(z + i), s = sigmoid<T>(x);
        store(g + i, load(g + i) * (s * (1 + x * (1 - s))));
      });
    case cpu::kGelu:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
        const Vec<T> x = load(z + i);
        const Vec<T> below = T(0.5) * (1 + error_function<T>(x * T(0.70710678118654752440)));
        const Vec<T> density = T(0.39894228040143267794) * exponential<T>(T(-0.5) * x * x);
        store(g + i, load(g + i) * (below + x * density));
      });
    case cpu::kSine:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) { store(g + i, load(g + i) * cosine<T>(load(z + i))); });
    default: return;
  }
}

}  // namespace fastmeta::FASTMETA_ISA
