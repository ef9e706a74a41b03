// prototypical_loss on CPU tensors. Split over tasks, and over ranges of queries where tasks are few: every range forms
// the prototypes again, which costs less than to wait for them.
#include "tensors.h"

#include <limits>

namespace fastmeta::cpu {
namespace {

constexpr const char* kOp = "prototypical_loss";

struct Problem {
  int64_t tasks, support, queries, classes, width, metric, parts;

  Problem(const Tensor& s, const Tensor& support_labels, const Tensor& q, const Tensor& query_labels,
          int64_t num_classes, int64_t metric)
      : metric(metric) {
    check_dims(kOp, s, 3);
    check_dims(kOp, q, 3);
    check_dims(kOp, support_labels, 2);
    check_dims(kOp, query_labels, 2);
    STD_TORCH_CHECK(s.size(0) == q.size(0) && s.size(2) == q.size(2), kOp,
                    ": support and query differ in tasks or width");
    STD_TORCH_CHECK(metric >= 0 && metric < kMetrics, kOp, ": metric ", metric, " is not one of 0 to ", kMetrics - 1);
    tasks = s.size(0);
    support = s.size(1);
    queries = q.size(1);
    classes = num_classes;
    width = s.size(2);
    parts = row_parts(tasks, queries, 64);
  }

  int64_t cost() const { return (queries * classes / parts + support) * (width + 1); }

  template <class T>
  LossItem<T> item(int64_t i, const Tensor& s, const Tensor& support_labels, const Tensor& q,
                   const Tensor& query_labels) const {
    const int64_t t = i / parts;
    const Range range = part(queries, parts, i % parts);
    LossItem<T> item{};
    item.support = data<T>(s) + t * support * width;
    item.support_labels = data<int64_t>(support_labels) + t * support;
    item.query = data<T>(q) + (t * queries + range.begin) * width;
    item.query_labels = data<int64_t>(query_labels) + t * queries + range.begin;
    item.support_rows = support;
    item.query_rows = range.end - range.begin;
    item.classes = classes;
    item.width = width;
    item.metric = metric;
    return item;
  }
};

template <class T>
void write_means(const Problem& problem, const std::vector<T>& sums, const Tensor& loss, const Tensor& accuracy) {
  T* means[2] = {mutable_data<T>(loss), mutable_data<T>(accuracy)};
  for (int64_t t = 0; t < problem.tasks; ++t) {
    for (int which = 0; which < 2; ++which) {
      T sum = 0;
      for (int64_t i = t * problem.parts; i < (t + 1) * problem.parts; ++i) sum += sums[size_t(2 * i + which)];
      means[which][t] = problem.queries ? sum / T(problem.queries) : std::numeric_limits<T>::quiet_NaN();
    }
  }
}

std::tuple<Tensor, Tensor> prototypical_loss(Tensor support, Tensor support_labels, Tensor query, Tensor query_labels,
                                             int64_t num_classes, int64_t metric) {
  const Problem problem(support, support_labels, query, query_labels, num_classes, metric);
  Tensor loss = new_tensor(support, {problem.tasks}), accuracy = new_tensor(support, {problem.tasks});
  by_dtype(kOp, support, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> sums(size_t(2 * problem.tasks * problem.parts));
    parallel(problem.tasks * problem.parts, problem.cost(), [&](int64_t i) {
      LossItem<T> item = problem.item<T>(i, support, support_labels, query, query_labels);
      item.loss = &sums[size_t(2 * i)];
      item.accuracy = &sums[size_t(2 * i + 1)];
      kernels<T>().loss(item);
    });
    write_means(problem, sums, loss, accuracy);
  });
  return {loss, accuracy};
}

// d_support and d_query for the incoming gradient of each task; if wanted with each part's sums of losses and hits
template <class T>
void run_gradient(const Problem& problem, const Tensor& grad_loss, const Tensor& support, const Tensor& support_labels,
                  const Tensor& query, const Tensor& query_labels, int64_t needs, const Tensor& d_support,
                  const Tensor& d_query, std::vector<T>* sums) {
  const int64_t parts = problem.parts, size = problem.classes * problem.width;
  const int64_t support_size = problem.support * problem.width;
  const Operand<T> g = of_tasks<T>(kOp, grad_loss, problem.tasks, support);
  T* ds = mutable_data<T>(d_support);
  T* dq = mutable_data<T>(d_query);
  const bool split = (needs & 1) && parts > 1;
  Tensor partials = new_tensor(support, {split ? problem.tasks * (parts + 1) * size : 0});
  T* partial = mutable_data<T>(partials);
  parallel(problem.tasks * parts, 3 * problem.cost(), [&](int64_t i) {
    const int64_t t = i / parts;
    LossItem<T> item = problem.item<T>(i, support, support_labels, query, query_labels);
    item.grad = g.base[t * g.step] / T(problem.queries ? problem.queries : 1);
    if (sums) {
      item.loss = &(*sums)[size_t(2 * i)];
      item.accuracy = &(*sums)[size_t(2 * i + 1)];
    }
    if (needs & 2) item.d_query = dq + (item.query - data<T>(query));
    if (split)
      item.d_prototypes = partial + i * size;
    else if (needs & 1)
      item.d_support = ds + t * support_size;
    kernels<T>().loss_gradient(item);
  });
  if (split)
    parallel(problem.tasks, parts * size + support_size, [&](int64_t t) {
      T* whole = partial + (problem.tasks * parts + t) * size;
      kernels<T>().sum_partials(partial + t * parts * size, parts, size, whole, size);
      kernels<T>().prototypes_gradient({whole, data<int64_t>(support_labels) + t * problem.support, problem.support,
                                        problem.classes, problem.width, problem.width, ds + t * support_size});
    });
}

std::tuple<Tensor, Tensor> prototypical_loss_bwd(Tensor grad_loss, Tensor support, Tensor support_labels, Tensor query,
                                                 Tensor query_labels, int64_t num_classes, int64_t metric,
                                                 int64_t needs) {
  const Problem problem(support, support_labels, query, query_labels, num_classes, metric);
  Tensor d_support = new_like(support, needs & 1), d_query = new_like(query, needs & 2);
  by_dtype(kOp, support, [&](auto zero) {
    using T = decltype(zero);
    run_gradient<T>(problem, grad_loss, support, support_labels, query, query_labels, needs, d_support, d_query,
                    nullptr);
  });
  return {d_support, d_query};
}

// Outputs, and the gradients of the sum of `scale` times the losses: the distances once instead of twice.
std::tuple<Tensor, Tensor, Tensor, Tensor> prototypical_loss_with_gradient(Tensor support, Tensor support_labels,
                                                                           Tensor query, Tensor query_labels,
                                                                           int64_t num_classes, int64_t metric,
                                                                           Tensor scale, int64_t needs) {
  const Problem problem(support, support_labels, query, query_labels, num_classes, metric);
  Tensor loss = new_tensor(support, {problem.tasks}), accuracy = new_tensor(support, {problem.tasks});
  Tensor d_support = new_like(support, needs & 1), d_query = new_like(query, needs & 2);
  by_dtype(kOp, support, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> sums(size_t(2 * problem.tasks * problem.parts));
    run_gradient<T>(problem, scale, support, support_labels, query, query_labels, needs, d_support, d_query, &sums);
    write_means(problem, sums, loss, accuracy);
  });
  return {loss, accuracy, d_support, d_query};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta_native, CPU, m) {
  m.impl("prototypical_loss", TORCH_BOX(&prototypical_loss));
  m.impl("prototypical_loss_bwd", TORCH_BOX(&prototypical_loss_bwd));
  m.impl("prototypical_loss_with_gradient", TORCH_BOX(&prototypical_loss_with_gradient));
}

}  // namespace fastmeta::cpu
