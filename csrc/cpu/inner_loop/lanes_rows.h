// Losses of rows with a lane for each task, and their derivatives.
#pragma once

#include "rows.h"

namespace fastmeta::FASTMETA_ISA {

// Every number is a vector.
template <class T>
struct LaneLoss {
  int64_t rows, classes;
  const T* logits;  // [rows, classes]
  const T* target;  // cross entropy: [rows], the label as a number; else [rows, classes]
  const T* weight;  // [rows]
  const T* scale = nullptr;  // of the derivatives, a number of each task; none: 1
  bool value = false;      // whether the sum of losses is wanted
  T* delta = nullptr;      // [rows, classes], null: not wanted
  T* curvature = nullptr;  // cross entropy: probabilities; else weighted second derivatives
};

template <class T>
Vec<T> cross_entropy_lanes(const LaneLoss<T>& r) {
  constexpr int64_t W = kWidth<T>;
  const Vec<T> classes = broadcast(T(r.classes));
  Vec<T> total = {};
  for (int64_t i = 0; i < r.rows; ++i) {
    const T* z = r.logits + i * r.classes * W;
    const Vec<T> label = load(r.target + i * W);
    const IntVec<T> valid = (label >= 0) & (label < classes);
    const Vec<T> weight = valid ? load(r.weight + i * W) : Vec<T>{};
    Vec<T> most = load(z), own = {}, sum = {};
    for (int64_t j = 1; j < r.classes; ++j) most = maximum(most, load(z + j * W));
    for (int64_t j = 0; j < r.classes; ++j) {
      const Vec<T> logit = load(z + j * W), e = exponential<T>(logit - most);
      own = label == broadcast(T(j)) ? logit : own;
      sum += e;
      if (r.delta) store(r.delta + (i * r.classes + j) * W, e);
    }
    if (r.value) total += valid ? weight * ((most - own) + logarithm(sum)) : Vec<T>{};
    if (!r.delta) continue;
    const Vec<T> inverse = 1 / sum, scaled = r.scale ? weight * load(r.scale) : weight;
    for (int64_t j = 0; j < r.classes; ++j) {
      T* d = r.delta + (i * r.classes + j) * W;
      const Vec<T> probability = load(d) * inverse;
      if (r.curvature) store(r.curvature + (i * r.classes + j) * W, probability);
      store(d, (label == broadcast(T(j)) ? probability - 1 : probability) * scaled);
    }
  }
  return total;
}

template <class T, int64_t kLoss>
Vec<T> elementwise_lanes(const LaneLoss<T>& r, T huber) {
  constexpr int64_t W = kWidth<T>;
  const T mean = T(1) / T(r.classes);
  Vec<T> total = {};
  for (int64_t i = 0; i < r.rows; ++i) {
    const Vec<T> weight = load(r.weight + i * W) * mean, scaled = r.scale ? weight * load(r.scale) : weight;
    for (int64_t at = i * r.classes * W, end = at + r.classes * W; at < end; at += W) {
      Vec<T> loss, first, second;
      elementwise_loss<T, kLoss>(load(r.logits + at), load(r.target + at), huber, loss, first, second);
      if (r.value) total += loss * weight;
      if (r.delta) store(r.delta + at, first * scaled);
      if (r.curvature) store(r.curvature + at, second * scaled);
    }
  }
  return total;
}

// Weighted sums of the rows' losses, and what `r` asks for.
template <class T>
Vec<T> lane_losses(int64_t loss, T huber, const LaneLoss<T>& r) {
  switch (loss) {
    case cpu::kCrossEntropy: return cross_entropy_lanes<T>(r);
    case cpu::kMse: return elementwise_lanes<T, cpu::kMse>(r, huber);
    case cpu::kHuber: return elementwise_lanes<T, cpu::kHuber>(r, huber);
    default: return elementwise_lanes<T, cpu::kBinaryCrossEntropy>(r, huber);
  }
}

// The loss's Hessian times the logits' tangents, in place.
template <class T>
void lane_curvature(int64_t loss, int64_t rows, int64_t classes, const T* curvature, const T* weight, T* dot) {
  constexpr int64_t W = kWidth<T>;
  if (loss != cpu::kCrossEntropy)
    return map_vectors<T>(rows * classes * W, [&](int64_t i) __attribute__((always_inline)) {
      store(dot + i, load(dot + i) * load(curvature + i));
    });
  for (int64_t i = 0; i < rows; ++i, curvature += classes * W, dot += classes * W) {
    Vec<T> mean = {};
    for (int64_t j = 0; j < classes * W; j += W) mean += load(dot + j) * load(curvature + j);
    const Vec<T> own = load(weight + i * W);
    for (int64_t j = 0; j < classes * W; j += W)
      store(dot + j, (load(dot + j) - mean) * load(curvature + j) * own);
  }
}

}  // namespace fastmeta::FASTMETA_ISA
