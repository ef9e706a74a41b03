// prototypical_loss on CUDA tensors.
#include "bridge.h"

namespace fastmeta::cuda {
namespace {

constexpr const char* kOp = "prototypical_loss";
constexpr int64_t kWorkspace = int64_t(1) << 22;  // elements of a gradient's scratch, as long as a task needs no more

PrototypicalLoss problem(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                         const Tensor& query_labels, int64_t num_classes, int64_t metric) {
  check_tensor(kOp, support, support, 3);
  check_tensor(kOp, support, query, 3);
  STD_TORCH_CHECK(support.size(0) == query.size(0) && support.size(2) == query.size(2), kOp,
                  ": support and query differ in tasks or width");
  STD_TORCH_CHECK(metric >= 0 && metric < kMetricCount, kOp, ": metric ", metric, " is not one of 0 to ",
                  kMetricCount - 1);
  PrototypicalLoss p{};
  p.tasks = support.size(0);
  p.support_rows = support.size(1);
  p.rows = query.size(1);
  p.classes = num_classes;
  p.width = support.size(2);
  p.metric = Metric(metric);
  p.support = support.const_data_ptr();
  p.query = query.const_data_ptr();
  p.support_labels = labels_of(kOp, support, support_labels, p.tasks);
  p.query_labels = labels_of(kOp, support, query_labels, p.tasks);
  STD_TORCH_CHECK(support_labels.size(1) == p.support_rows && query_labels.size(1) == p.rows, kOp,
                  ": needs one label per row");
  return p;
}

std::tuple<Tensor, Tensor> prototypical_loss(Tensor support, Tensor support_labels, Tensor query, Tensor query_labels,
                                             int64_t num_classes, int64_t metric) {
  PrototypicalLoss p = problem(support, support_labels, query, query_labels, num_classes, metric);
  const OnDevice device(support);
  Tensor loss = new_tensor(support, {p.tasks}), accuracy = new_tensor(support, {p.tasks});
  Tensor prototypes = new_tensor(support, {p.tasks * p.classes * p.width});
  Tensor sums = new_sums(support, 2 * p.tasks * query_tiles(p.rows));
  p.prototypes = prototypes.mutable_data_ptr();
  p.sums = sums.mutable_data_ptr();
  p.loss = loss.mutable_data_ptr();
  p.accuracy = accuracy.mutable_data_ptr();
  launch_prototypical_loss(dtype_of(kOp, support), p, device.stream);
  device.check(kOp);
  return {loss, accuracy};
}

std::tuple<Tensor, Tensor> prototypical_loss_bwd(Tensor grad_loss, Tensor support, Tensor support_labels, Tensor query,
                                                 Tensor query_labels, int64_t num_classes, int64_t metric,
                                                 int64_t needs) {
  PrototypicalLossBwd b{};
  b.forward = problem(support, support_labels, query, query_labels, num_classes, metric);
  PrototypicalLoss& p = b.forward;
  check_tensor(kOp, support, grad_loss, 1);
  STD_TORCH_CHECK(grad_loss.size(0) == p.tasks, kOp, ": one gradient per task is needed");
  const OnDevice device(support);
  Tensor d_support = new_like(support, needs & 1), d_query = new_like(query, needs & 2);
  const bool cosine = p.metric == Metric::cosine;
  const int64_t pairs = p.rows * p.classes;
  b.chunk = std::max<int64_t>(1, std::min(p.tasks, kWorkspace / std::max<int64_t>(1, pairs)));
  Tensor prototypes = new_tensor(support, {p.tasks * p.classes * p.width});
  Tensor d_prototypes = new_tensor(support, {needs & 1 ? p.tasks * p.classes * p.width : 0});
  Tensor log_sums = new_sums(support, 2 * p.tasks * p.rows);
  Tensor pair = new_sums(support, b.chunk * pairs), self = new_sums(support, cosine ? b.chunk * pairs : 0);
  Tensor query_norms = new_sums(support, cosine ? b.chunk * p.rows : 0);
  Tensor prototype_norms = new_sums(support, cosine ? b.chunk * p.classes : 0);
  p.prototypes = prototypes.mutable_data_ptr();
  b.grad_loss = grad_loss.const_data_ptr();
  b.log_sums = log_sums.mutable_data_ptr();
  b.coefficients = {pair.mutable_data_ptr(), self.mutable_data_ptr(), query_norms.mutable_data_ptr(),
                    prototype_norms.mutable_data_ptr()};
  b.d_prototypes = needs & 1 ? d_prototypes.mutable_data_ptr() : nullptr;
  b.d_support = needs & 1 ? d_support.mutable_data_ptr() : nullptr;
  b.d_query = needs & 2 ? d_query.mutable_data_ptr() : nullptr;
  launch_prototypical_loss_bwd(dtype_of(kOp, support), b, device.stream);
  device.check(kOp);
  return {d_support, d_query};
}

}  // namespace

FM_LIBRARY {
  m.impl("prototypical_loss", TORCH_BOX(&prototypical_loss));
  m.impl("prototypical_loss_bwd", TORCH_BOX(&prototypical_loss_bwd));
}

}  // namespace fastmeta::cuda
