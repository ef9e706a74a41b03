// What a fused inner loop does to rows between its products: activations with both derivatives, losses with theirs.
#pragma once

#include <fastmeta/vmath.h>

#include "../activation_kernel.h"
#include "operands.h"
#include "gemm.h"
#include "paths.h"
#include "../kernels.h"

namespace fastmeta::FASTMETA_ISA {

FM_INLINE bool is_curved(int64_t activation) { return activation != cpu::kIdentity && activation != cpu::kRelu; }

// value = phi(z), slope = phi'(z), second = phi''(z); z may be `value`. Not relu, which goes
// with the products. n is a multiple of the vector width.
template <class T, bool kSecond>
void activate_curved(int64_t activation, const T* z, T* value, T* slope, T* second, int64_t n) {
  const auto keep = [&](int64_t i, Vec<T> v, Vec<T> first, Vec<T> then) __attribute__((always_inline)) {
    store(value + i, v);
    store(slope + i, first);
    if constexpr (kSecond) store(second + i, then);
  };
  switch (activation) {
    case cpu::kTanh:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
        const Vec<T> y = hyperbolic_tangent<T>(load(z + i)), s = 1 - y * y;
        keep(i, y, s, T(-2) * y * s);
      });
    case cpu::kSigmoid:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
        const Vec<T> y = sigmoid<T>(load(z + i)), s = y * (1 - y);
        keep(i, y, s, s * (1 - 2 * y));
      });
    case cpu::kSilu:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
        const Vec<T> x = load(z + i), s = sigmoid<T>(x), slope_of_s = s * (1 - s);
        keep(i, x * s, s + x * slope_of_s, slope_of_s * (2 + x * (1 - 2 * s)));
      });
    case cpu::kGelu:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
        const Vec<T> x = load(z + i);
        const Vec<T> below = T(0.5) * (1 + error_function<T>(x * T(0.70710678118654752440)));
        const Vec<T> density = T(0.39894228040143267794) * exponential<T>(T(-0.5) * x * x);
        keep(i, x * below, below + x * density, density * (2 - x * x));
      });
    case cpu::kSine:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
        const Vec<T> x = load(z + i), y = sine<T>(x);
        keep(i, y, cosine<T>(x), -y);
      });
    default:
      return map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
        keep(i, load(z + i), broadcast(T(1)), Vec<T>{});
      });
  }
}

// delta = b * phi'; second = b * phi'' (of phi'', null: not wanted). b may be `delta`.
template <class T>
void through_activation(const T* b, const T* slope, T* second, T* delta, int64_t n) {
  map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
    const Vec<T> g = load(b + i);
    store(delta + i, g * load(slope + i));
    if (second) store(second + i, g * load(second + i));
  });
}

// tangent of the activation; z_dot becomes what its curvature adds to the tangent of delta
template <class T>
void tangent_through_activation(T* z_dot, const T* slope, const T* second, T* value_dot, int64_t n) {
  map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
    const Vec<T> z = load(z_dot + i);
    store(value_dot + i, z * load(slope + i));
    if (second) store(z_dot + i, z * load(second + i));
  });
}

// delta_dot = b * phi' + extra; b may be `delta_dot`.
template <class T>
void tangent_of_delta(const T* b, const T* slope, const T* extra, T* delta_dot, int64_t n) {
  map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
    store(delta_dot + i, load(b + i) * load(slope + i) + load(extra + i));
  });
}

// ---- losses ---------------------------------------------------------------------------------------------------------

template <class T>
struct LossRows {
  int64_t rows, classes, ld;
  const T* logits;  // [rows, ld]
  const int64_t* labels;
  const T* target;
  const T* weight;
  T weight_scale = 1;
  bool value = false;      // whether the sum of losses is wanted
  T* delta = nullptr;      // [rows, ld], null: not wanted; zero in the padding
  T* curvature = nullptr;  // cross entropy: probabilities; else weighted second derivatives
  const cpu::Paths* paths = nullptr;
  T* room = nullptr;  // for twice as many numbers as paths
};

template <class T>
FM_INLINE IntVec<T> lanes_below(int64_t n) {
  IntVec<T> lane;
  FM_UNROLL for (int i = 0; i < kWidth<T>; ++i) lane[i] = Lane<T>(i);
  return lane < broadcast_integer<T>(Lane<T>(smaller(n, kWidth<T>)));
}

template <class T>
T cross_entropy_rows(const LossRows<T>& r) {
  constexpr int W = kWidth<T>;
  T total = 0;
  for (int64_t i = 0; i < r.rows; ++i) {
    const T* p = r.logits + i * r.ld;
    const int64_t label = r.labels[i];
    const bool valid = label >= 0 && label < r.classes;
    T* d = r.delta ? r.delta + i * r.ld : nullptr;
    T* c = r.curvature ? r.curvature + i * r.ld : nullptr;
    T most = -T(__builtin_inff());
    for (int64_t j = 0; j < r.classes; ++j) most = p[j] > most ? p[j] : most;
    Vec<T> sums = {};
    for (int64_t j = 0; j < r.classes; j += W) {
      const Vec<T> e = lanes_below<T>(r.classes - j) ? exponential<T>(load(p + j) - most) : Vec<T>{};
      sums += e;
      if (d) store(d + j, e);
    }
    const T sum = lane_sum<T>(sums);
    if (r.value && valid) total += r.weight[i] * ((most - p[label]) + T(logarithm(broadcast(sum))[0]));
    if (!d) continue;
    const T weight = valid ? r.weight[i] * r.weight_scale : T(0);
    const T inverse = 1 / sum;
    for (int64_t j = 0; j < r.ld; j += W) {
      const Vec<T> probability = load(d + j) * inverse;
      if (c) store(c + j, probability);
      store(d + j, probability * weight);
    }
    if (valid) d[label] -= weight;
  }
  return total;
}

// loss, first and second derivative of one vector of logits p with targets y
template <class T, int64_t kLoss>
FM_INLINE void elementwise_loss(Vec<T> p, Vec<T> y, T delta, Vec<T>& loss, Vec<T>& first, Vec<T>& second) {
  const Vec<T> difference = p - y;
  if constexpr (kLoss == cpu::kMse) {
    loss = difference * difference;
    first = 2 * difference;
    second = broadcast(T(2));
  } else if constexpr (kLoss == cpu::kHuber) {
    const Vec<T> size = absolute(difference), limit = broadcast(delta);
    loss = size < limit ? T(0.5) * difference * difference : limit * (size - T(0.5) * delta);
    first = difference < -limit ? -limit : difference > limit ? limit : difference;
    second = size < limit ? broadcast(T(1)) : Vec<T>{};
  } else {
    const Vec<T> e = exponential<T>(-absolute(p)), s = sigmoid<T>(p);
    loss = maximum(Vec<T>{}, p) + logarithm(1 + e) - y * p;
    first = s - y;
    second = s * (1 - s);
  }
}

template <class T, int64_t kLoss>
T elementwise_rows(const LossRows<T>& r, T huber) {
  constexpr int W = kWidth<T>;
  if (r.classes == 0) return r.rows > 0 ? T(__builtin_nanf("")) : T(0);  // a mean of nothing
  Vec<T> total = {};
  const T mean = T(1) / T(r.classes);
  for (int64_t i = 0; i < r.rows; ++i) {
    const T weight = r.weight[i] * mean * r.weight_scale;
    for (int64_t j = 0; j < r.ld; j += W) {
      const IntVec<T> inside = lanes_below<T>(r.classes - j);
      const Vec<T> y = load_first(r.target + i * r.classes + j, smaller(W, r.classes - j));
      Vec<T> loss, first, second;
      elementwise_loss<T, kLoss>(load(r.logits + i * r.ld + j), y, huber, loss, first, second);
      if (r.value) total += inside ? loss * (r.weight[i] * mean) : Vec<T>{};
      if (r.delta) store(r.delta + i * r.ld + j, inside ? first * weight : Vec<T>{});
      if (r.curvature) store(r.curvature + i * r.ld + j, inside ? second * weight : Vec<T>{});
    }
  }
  return lane_sum<T>(total);
}

// Weighted sum of the rows' losses, and what `r` asks for.
template <class T>
T row_losses(int64_t loss, T huber, const LossRows<T>& r) {
  switch (loss) {
    case cpu::kCrossEntropy: return cross_entropy_rows<T>(r);
    case cpu::kMse: return elementwise_rows<T, cpu::kMse>(r, huber);
    case cpu::kMaximumEntropy:
      return path_loss<T>(*r.paths, r.target, r.rows, r.logits, r.ld, r.weight, r.weight_scale, r.delta, r.curvature,
                          r.room);
    case cpu::kHuber: return elementwise_rows<T, cpu::kHuber>(r, huber);
    default: return elementwise_rows<T, cpu::kBinaryCrossEntropy>(r, huber);
  }
}

// The loss's Hessian times the logits' tangents, in place; `dot` is zero in the padding.
template <class T>
void times_curvature(int64_t loss, int64_t rows, int64_t ld, const T* curvature, const T* weight, T* dot) {
  constexpr int W = kWidth<T>;
  for (int64_t i = 0; i < rows; ++i, curvature += ld, dot += ld) {
    if (loss != cpu::kCrossEntropy) {
      for (int64_t j = 0; j < ld; j += W) store(dot + j, load(dot + j) * load(curvature + j));
      continue;
    }
    Vec<T> sums = {};
    for (int64_t j = 0; j < ld; j += W) sums += load(dot + j) * load(curvature + j);
    const T mean = lane_sum<T>(sums);
    for (int64_t j = 0; j < ld; j += W) store(dot + j, (load(dot + j) - mean) * load(curvature + j) * weight[i]);
  }
}

}  // namespace fastmeta::FASTMETA_ISA
