// Activations of one number and their first derivatives, on the host and in device code.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FM_HD __host__ __device__ __forceinline__
#else
#define FM_HD inline
#endif

namespace fastmeta {

// The numbers are those that Python hands over: never reorder.
enum class Activation : int { identity, relu, tanh, sigmoid, silu, gelu, sine };
constexpr int kActivationCount = 7;

// Both branches exponentiate a number that is not positive: no overflow at either end.
template <class A>
FM_HD A sigmoid(A z) {
  const A e = exp(z < 0 ? z : -z);
  return (z < 0 ? e : A(1)) / (A(1) + e);
}

template <class A>
FM_HD A activate(Activation activation, A z) {
  switch (activation) {
    case Activation::relu: return z < 0 ? A(0) : z;  // in this order NaN stays NaN
    case Activation::tanh: return tanh(z);
    case Activation::sigmoid: return sigmoid(z);
    case Activation::silu: return z * sigmoid(z);
    case Activation::gelu: return A(0.5) * z * (A(1) + erf(z * A(0.70710678118654752440)));
    case Activation::sine: return sin(z);
    default: return z;
  }
}

// Whether the derivative needs the pre-activation, or follows from the activation's own value.
FM_HD bool derivative_needs_input(Activation activation) {
  return activation == Activation::silu || activation == Activation::gelu || activation == Activation::sine;
}

// The derivative from `v`: the pre-activation where `derivative_needs_input`, else the activation's value.
template <class A>
FM_HD A derivative(Activation activation, A v) {
  switch (activation) {
    case Activation::relu: return v <= 0 ? A(0) : A(1);  // as in torch, NaN is active
    case Activation::tanh: return A(1) - v * v;
    case Activation::sigmoid: return v * (A(1) - v);
    case Activation::silu: {
      const A s = sigmoid(v);
      return s * (A(1) + v * (A(1) - s));
    }
    case Activation::gelu:
      return A(0.5) * (A(1) + erf(v * A(0.70710678118654752440))) +
             v * A(0.39894228040143267794) * exp(A(-0.5) * v * v);
    case Activation::sine: return cos(v);
    default: return A(1);
  }
}

}  // namespace fastmeta
