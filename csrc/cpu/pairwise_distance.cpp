// pairwise_distance on CPU tensors. Split over tasks, and over ranges of queries where tasks are few.
#include "tensors.h"

namespace fastmeta::cpu {
namespace {

constexpr const char* kOp = "pairwise_distance";

void check(const Tensor& query, const Tensor& prototypes, int64_t metric) {
  check_dims(kOp, query, 3);
  check_dims(kOp, prototypes, 3);
  STD_TORCH_CHECK(query.size(0) == prototypes.size(0) && query.size(2) == prototypes.size(2), kOp,
                  ": query and prototypes differ in tasks or width");
  STD_TORCH_CHECK(metric >= 0 && metric < kMetrics, kOp, ": metric ", metric, " is not one of 0 to ", kMetrics - 1);
}

Tensor pairwise_distance(Tensor query, Tensor prototypes, int64_t metric) {
  check(query, prototypes, metric);
  const int64_t tasks = query.size(0), rows = query.size(1), width = query.size(2), classes = prototypes.size(1);
  Tensor out = new_tensor(query, {tasks, rows, classes});
  by_dtype(kOp, query, [&](auto zero) {
    using T = decltype(zero);
    const int64_t parts = row_parts(tasks, rows, 64);
    const T* q = data<T>(query);
    const T* p = data<T>(prototypes);
    T* to = mutable_data<T>(out);
    const int64_t widths[] = {width, classes};
    const Kernels<T>& best = kernels_for<T>(widths, 1);
    parallel(tasks * parts, rows * classes * (width + 1) / parts, [&](int64_t i) {
      const int64_t t = i / parts;
      const Range range = part(rows, parts, i % parts);
      DistanceItem<T> item{};
      item.query = q + (t * rows + range.begin) * width;
      item.prototypes = p + t * classes * width;
      item.rows = range.end - range.begin;
      item.classes = classes;
      item.width = width;
      item.metric = metric;
      item.out = to + (t * rows + range.begin) * classes;
      best.distances(item);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> pairwise_distance_bwd(Tensor grad, Tensor query, Tensor prototypes, int64_t metric,
                                                 int64_t needs) {
  check(query, prototypes, metric);
  check_dims(kOp, grad, 3);
  const int64_t tasks = query.size(0), rows = query.size(1), width = query.size(2), classes = prototypes.size(1);
  Tensor d_query = new_like(query, needs & 1), d_prototypes = new_like(prototypes, needs & 2);
  by_dtype(kOp, query, [&](auto zero) {
    using T = decltype(zero);
    const int64_t parts = row_parts(tasks, rows, 64), size = classes * width;
    const T* g = data<T>(grad);
    const T* q = data<T>(query);
    const T* p = data<T>(prototypes);
    T* dq = mutable_data<T>(d_query);
    T* dp = mutable_data<T>(d_prototypes);
    const bool split = (needs & 2) && parts > 1;
    Tensor partials = new_tensor(query, {split ? tasks * parts * size : 0});
    T* partial = mutable_data<T>(partials);
    parallel(tasks * parts, rows * classes * (width + 1) / parts, [&](int64_t i) {
      const int64_t t = i / parts;
      const Range range = part(rows, parts, i % parts);
      DistanceItem<T> item{};
      item.query = q + (t * rows + range.begin) * width;
      item.prototypes = p + t * size;
      item.rows = range.end - range.begin;
      item.classes = classes;
      item.width = width;
      item.metric = metric;
      item.grad = g + (t * rows + range.begin) * classes;
      if (needs & 1) item.d_query = dq + (t * rows + range.begin) * width;
      if (needs & 2) item.d_prototypes = split ? partial + i * size : dp + t * size;
      kernels<T>().distances_gradient(item);
    });
    if (split)
      parallel(tasks, parts * size, [&](int64_t t) {
        kernels<T>().sum_partials(partial + t * parts * size, parts, size, dp + t * size, size);
      });
  });
  return {d_query, d_prototypes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta_native, CPU, m) {
  m.impl("pairwise_distance", TORCH_BOX(&pairwise_distance));
  m.impl("pairwise_distance_bwd", TORCH_BOX(&pairwise_distance_bwd));
}

}  // namespace fastmeta::cpu
