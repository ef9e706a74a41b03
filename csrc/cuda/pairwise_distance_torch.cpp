// pairwise_distance on CUDA tensors.
#include "bridge.h"

namespace fastmeta::cuda {
namespace {

constexpr const char* kOp = "pairwise_distance";

PairwiseDistance problem(const Tensor& query, const Tensor& prototypes, int64_t metric) {
  check_tensor(kOp, query, query, 3);
  check_tensor(kOp, query, prototypes, 3);
  STD_TORCH_CHECK(query.size(0) == prototypes.size(0) && query.size(2) == prototypes.size(2), kOp,
                  ": query and prototypes differ in tasks or width");
  STD_TORCH_CHECK(metric >= 0 && metric < kMetricCount, kOp, ": metric ", metric, " is not one of 0 to ",
                  kMetricCount - 1);
  return {query.const_data_ptr(), prototypes.const_data_ptr(), nullptr,       query.size(0),
          query.size(1),          prototypes.size(1),          query.size(2), Metric(metric)};
}

Tensor pairwise_distance(Tensor query, Tensor prototypes, int64_t metric) {
  PairwiseDistance p = problem(query, prototypes, metric);
  const OnDevice device(query);
  Tensor out = new_tensor(query, {p.tasks, p.rows, p.classes});
  p.out = out.mutable_data_ptr();
  launch_pairwise_distance(dtype_of(kOp, query), p, device.stream);
  device.check(kOp);
  return out;
}

std::tuple<Tensor, Tensor> pairwise_distance_bwd(Tensor grad, Tensor query, Tensor prototypes, int64_t metric,
                                                 int64_t needs) {
  PairwiseDistanceBwd b{};
  b.forward = problem(query, prototypes, metric);
  const PairwiseDistance& p = b.forward;
  check_tensor(kOp, query, grad, 3);
  STD_TORCH_CHECK(grad.size(0) == p.tasks && grad.size(1) == p.rows && grad.size(2) == p.classes, kOp,
                  ": the gradient is not of the distances' shape");
  const OnDevice device(query);
  Tensor d_query = new_like(query, needs & 1), d_prototypes = new_like(prototypes, needs & 2);
  const bool cosine = p.metric == Metric::cosine;
  const int64_t pairs = needs_coefficients(p.metric) ? p.tasks * p.rows * p.classes : 0;
  Tensor pair = new_sums(query, pairs), self = new_sums(query, cosine ? pairs : 0);
  Tensor query_norms = new_sums(query, cosine ? p.tasks * p.rows : 0);
  Tensor prototype_norms = new_sums(query, cosine ? p.tasks * p.classes : 0);
  b.grad = grad.const_data_ptr();
  b.coefficients = {pair.mutable_data_ptr(), self.mutable_data_ptr(), query_norms.mutable_data_ptr(),
                    prototype_norms.mutable_data_ptr()};
  b.d_query = needs & 1 ? d_query.mutable_data_ptr() : nullptr;
  b.d_prototypes = needs & 2 ? d_prototypes.mutable_data_ptr() : nullptr;
  launch_pairwise_distance_bwd(dtype_of(kOp, query), b, device.stream);
  device.check(kOp);
  return {d_query, d_prototypes};
}

}  // namespace

FM_LIBRARY {
  m.impl("pairwise_distance", TORCH_BOX(&pairwise_distance));
  m.impl("pairwise_distance_bwd", TORCH_BOX(&pairwise_distance_bwd));
}

}  // namespace fastmeta::cuda
