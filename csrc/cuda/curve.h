// Activations with both their derivatives.
#pragma once

#include "device.h"

namespace fastmeta::cuda {

// phi(z), phi'(z) and phi''(z)
template <class A>
struct Curve {
  A value, slope, bend;
};

inline __host__ __device__ bool is_curved(Activation a) { return a != Activation::identity && a != Activation::relu; }

template <class A>
__device__ __forceinline__ Curve<A> curve_at(Activation activation, A z) {
  switch (activation) {
    case Activation::tanh: {
      const A y = tanh(z), s = A(1) - y * y;
      return {y, s, A(-2) * y * s};
    }
    case Activation::sigmoid: {
      const A y = sigmoid(z), s = y * (A(1) - y);
      return {y, s, s * (A(1) - A(2) * y)};
    }
    case Activation::silu: {
      const A y = sigmoid(z), s = y * (A(1) - y);
      return {z * y, y + z * s, s * (A(2) + z * (A(1) - A(2) * y))};
    }
    case Activation::gelu: {
      const A below = A(0.5) * (A(1) + erf(z * A(0.70710678118654752440)));
      const A density = A(0.39894228040143267794) * exp(A(-0.5) * z * z);
      return {z * below, below + z * density, density * (A(2) - z * z)};
    }
    case Activation::sine: {
      const A y = sin(z);
      return {y, cos(z), -y};
    }
    default: return {activate(activation, z), A(1), A(0)};
  }
}

}  // namespace fastmeta::cuda
