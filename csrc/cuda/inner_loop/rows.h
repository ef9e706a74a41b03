// What a fused inner loop does to rows between its products: activations with both derivatives, losses with theirs.
#pragma once

#include "../curve.h"
#include "products.h"

#include <fastmeta/launch_inner_loop.h>

namespace fastmeta::cuda {

// The derivative from what is kept: of relu and identity the value itself, of the others the derivative.
template <class A>
__device__ __forceinline__ A slope_of(Activation activation, A kept) {
  if (activation == Activation::relu) return kept <= 0 ? A(0) : A(1);
  return activation == Activation::identity ? A(1) : kept;
}

// Loss of one row of logits p [classes]. With `delta` (maybe p itself): its gradient times `scale` too, plus `extra`
// where given, zero up to `padded`. With `curve`: what `times_curvature` needs.
template <class A>
struct LossRow {
  int classes, padded;
  A weight, scale, huber;
  int64_t label;
  const A* target;
  A* delta;
  A* curve;
  const A* extra;
};

template <class A>
__device__ __forceinline__ A cross_entropy_row(const LossRow<A>& r, const A* p) {
  const bool valid = r.label >= 0 && r.label < r.classes;
  A most = -A(INFINITY), sum = 0;
  for (int j = 0; j < r.classes; ++j) most = p[j] > most ? p[j] : most;
  for (int j = 0; j < r.classes; ++j) sum += exp(p[j] - most);
  const A loss = valid ? r.weight * ((most - p[r.label]) + log(sum)) : A(0);
  if (!r.delta) return loss;
  const A weight = valid ? r.weight * r.scale : A(0);
  for (int j = 0; j < r.classes; ++j) {
    const A probability = exp(p[j] - most) / sum;
    if (r.curve) r.curve[j] = probability;
    r.delta[j] = weight * (probability - (j == r.label ? A(1) : A(0))) + (r.extra ? r.extra[j] : A(0));
  }
  return loss;
}

template <class A>
__device__ __forceinline__ A elementwise_loss_row(Loss kind, const LossRow<A>& r, const A* p) {
  const A mean = r.weight / A(r.classes);
  A total = 0;
  for (int j = 0; j < r.classes; ++j) {
    const A z = p[j], y = r.target[j], difference = z - y;
    A loss, first, second;
    if (kind == Loss::mse) {
      loss = difference * difference;
      first = A(2) * difference;
      second = A(2);
    } else if (kind == Loss::huber) {
      const A size = difference < 0 ? -difference : difference;
      const bool near = size <= r.huber;
      loss = near ? A(0.5) * difference * difference : r.huber * (size - A(0.5) * r.huber);
      first = difference < -r.huber ? -r.huber : difference > r.huber ? r.huber : difference;
      second = near ? A(1) : A(0);
    } else {
      const A s = sigmoid(z);
      loss = (z > 0 ? z : A(0)) + log1p(exp(z < 0 ? z : -z)) - y * z;
      first = s - y;
      second = s * (A(1) - s);
    }
    total += loss;
    if (!r.delta) continue;
    r.delta[j] = mean * r.scale * first + (r.extra ? r.extra[j] : A(0));
    if (r.curve) r.curve[j] = mean * r.scale * second;
  }
  return mean * total;
}

template <class A>
__device__ __forceinline__ A loss_row(Loss kind, const LossRow<A>& r, const A* p) {
  const A loss = kind == Loss::cross_entropy ? cross_entropy_row(r, p) : elementwise_loss_row(kind, r, p);
  if (r.delta)
    for (int j = r.classes; j < r.padded; ++j) r.delta[j] = A(0);
  return loss;
}

// The Hessian of a row's loss times the tangent of its logits, in the place of `curve`, zero up to `padded`.
template <class A>
__device__ __forceinline__ void times_curvature(Loss kind, int classes, int padded, A weight, A* curve, const A* dot) {
  A mean = 0;
  if (kind == Loss::cross_entropy)
    for (int j = 0; j < classes; ++j) mean += dot[j] * curve[j];
  const A factor = kind == Loss::cross_entropy ? weight : A(1);
  for (int j = 0; j < classes; ++j) curve[j] = (dot[j] - mean) * curve[j] * factor;
  for (int j = classes; j < padded; ++j) curve[j] = A(0);
}

}  // namespace fastmeta::cuda
