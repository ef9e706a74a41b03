// The metrics, and how each is put together from sums over features. Host and device.
#pragma once

#include "activations.h"

namespace fastmeta {

// The numbers are those that Python hands over: never reorder.
enum class Metric : int { sqeuclidean, euclidean, cosine, dot, manhattan };
constexpr int kMetricCount = 5;

// What is summed over the features; `cosine` sums both squared norms beside the product.
enum class Combine : int { squared_difference, product, absolute_difference, cosine };

FM_HD Combine combine_of(Metric metric) {
  return metric == Metric::cosine      ? Combine::cosine
         : metric == Metric::dot       ? Combine::product
         : metric == Metric::manhattan ? Combine::absolute_difference
                                       : Combine::squared_difference;
}

// As torch.nn.functional.cosine_similarity: norms below it count as this constant.
constexpr double kCosineEpsilon = 1e-8;

template <class A>
FM_HD A inverse_norm(A squared) {
  const A norm = sqrt(squared);
  return A(1) / (norm < A(kCosineEpsilon) ? A(kCosineEpsilon) : norm);
}
// 1 / |x|^2, or 0 where the norm is a constant to the gradient
template <class A>
FM_HD A inverse_square(A squared) {
  return sqrt(squared) < A(kCosineEpsilon) ? A(0) : A(1) / squared;
}

template <class A>
FM_HD A absolute(A v) {
  return v < 0 ? -v : v;
}
template <class A>
FM_HD A sign(A v) {
  return A((v > 0) - (v < 0));  // as in torch, of NaN 0
}

}  // namespace fastmeta
