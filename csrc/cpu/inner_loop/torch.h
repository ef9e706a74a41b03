// The torch side that adapt_mlp and meta_loss_mlp share: tensors to plain pointers, and gradients of shared inputs.
#pragma once

#include "../tensors.h"

#include <algorithm>
#include <memory>

namespace fastmeta::cpu {

// The arguments that both ops have.
struct InnerArguments {
  Tensor support_x, support_y, support_weight, gram_support;
  std::vector<Tensor> weights, biases;
  Tensor rates;
  std::vector<Tensor> element_rates;
  int64_t loss, activation;
  double delta, momentum, weight_decay;
  bool first_order;
};

template <class T>
class InnerProblem {
 public:
  int64_t tasks, groups;
  bool gram;
  size_t layers, first;  // layers with weights: [first, layers)
  std::unique_ptr<InnerLoop<T>> loop = std::make_unique<InnerLoop<T>>();

  InnerProblem(const char* op, const InnerArguments& a) : op_(op), arguments_(a) {
    check_dims(op, a.support_x, 3);
    check_dims(op, a.rates, 3);
    tasks = a.support_x.size(0);
    groups = std::max<int64_t>(1, std::min<int64_t>(tasks, torch::stable::get_num_threads()));
    layers = size_t(a.rates.size(2));
    STD_TORCH_CHECK(layers >= 1 && layers <= size_t(kMostInnerLayers), op, ": takes 1 to ", kMostInnerLayers,
                    " layers, got ", layers);
    STD_TORCH_CHECK(a.weights.size() == layers || a.weights.size() + 1 == layers, op, ": got ", a.weights.size(),
                    " weights and rates for ", layers, " layers");
    STD_TORCH_CHECK(a.biases.empty() || a.biases.size() == a.weights.size(), op, ": needs one bias per layer, or none");
    STD_TORCH_CHECK(a.loss >= 0 && a.loss < kLosses, op, ": loss ", a.loss, " is not one of 0 to ", kLosses - 1);
    STD_TORCH_CHECK(a.activation >= 0 && a.activation < kActivations, op, ": activation ", a.activation,
                    " is not one of 0 to ", kActivations - 1);
    gram = a.weights.size() < layers;
    first = gram;
    STD_TORCH_CHECK(!gram || (a.weight_decay == 0 && a.element_rates.empty()), op,
                    ": no weight decay and no rates per element in the Gram form");
    STD_TORCH_CHECK(a.element_rates.empty() || a.element_rates.size() == a.weights.size() + a.biases.size(), op,
                    ": needs a rate per element for every weight and bias, or none");
    InnerLoop<T>& p = *loop;
    p.layers = int64_t(layers);
    p.gram = gram;
    p.biased = !a.biases.empty();
    p.first_order = a.first_order;
    p.steps = a.rates.size(1);
    p.loss = a.loss;
    p.activation = a.activation;
    p.delta = T(a.delta);
    p.momentum = T(a.momentum);
    p.weight_decay = T(a.weight_decay);
    p.elementwise = !a.element_rates.empty();
    p.widths[0] = gram ? 0 : a.support_x.size(2);
    if (gram) p.widths[1] = a.support_x.size(2);
    for (size_t l = first; l < layers; ++l) {
      const Tensor& w = a.weights[l - first];
      check_dims(op, w, 3);
      STD_TORCH_CHECK(w.size(2) == p.widths[l], op, ": weights[", l - first, "] takes ", w.size(2), " features, gets ",
                      p.widths[l]);
      p.widths[l + 1] = w.size(1);
      p.weights[l] = operand(w);
      if (p.biased) {
        const Tensor& b = a.biases[l - first];
        check_dims(op, b, 2);
        STD_TORCH_CHECK(b.size(1) == w.size(1), op, ": biases[", l - first, "] is of width ", b.size(1), ", not ",
                        w.size(1));
        p.biases[l] = operand(b);
      }
      if (!p.elementwise) continue;
      check_same(a.element_rates[l], w);
      p.weight_rates[l] = operand(a.element_rates[l]);
      if (!p.biased) continue;
      check_same(a.element_rates[layers + l], a.biases[l]);
      p.bias_rates[l] = operand(a.element_rates[layers + l]);
    }
    p.rates = operand(a.rates);
    rows(p.support, a.support_x, a.support_y, a.support_weight, a.gram_support);
  }

  void rows(Rows<T>& to, const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& gram_rows) {
    const int64_t support = arguments_.support_x.size(1);
    check_dims(op_, x, 3);
    check_dims(op_, weight, 2);
    const int64_t n = x.size(1);
    STD_TORCH_CHECK(x.size(0) == tasks && x.size(2) == arguments_.support_x.size(2) && weight.size(0) == tasks &&
                        weight.size(1) == n,
                    op_, ": rows of ", tasks, " tasks and their weights differ in size");
    to.count = n;
    to.x = operand(x);
    to.weight = operand(weight);
    if (loop->loss == kCrossEntropy) {
      check_dims(op_, y, 2);
      STD_TORCH_CHECK(y.size(0) == tasks && y.size(1) == n &&
                          y.scalar_type() == torch::headeronly::ScalarType::Long,
                      op_, ": needs one int64 label per row");
      to.labels = {data<int64_t>(y), n};
    } else if (loop->loss == kMaximumEntropy) {
      to.target = operand(y);
      to.paths = paths(y, n);
    } else {
      check_dims(op_, y, 3);
      STD_TORCH_CHECK(y.size(0) == tasks && y.size(1) == n && y.size(2) == outputs(), op_,
                      ": targets are not of the size of the predictions");
      to.target = operand(y);
    }
    if (!gram) return;
    check_dims(op_, gram_rows, 3);
    STD_TORCH_CHECK(gram_rows.size(0) == tasks && gram_rows.size(1) == n && gram_rows.size(2) == support, op_,
                    ": the inner products with the support rows are of the wrong size");
    to.gram = operand(gram_rows);
  }

  Paths paths(const Tensor& y, int64_t rows) const {
    const bool visits = y.dim() == 4;
    STD_TORCH_CHECK(visits || y.dim() == 3, op_, ": needs targets of 3 or 4 dimensions");
    const Paths paths{y.size(y.dim() - 2), y.size(y.dim() - 1), visits};
    STD_TORCH_CHECK(outputs() == 1 && paths.demonstrations > 0 && paths.members > 1 && y.size(0) == tasks && rows > 0 &&
                        (visits ? y.size(1) == rows : rows % paths.count() == 0),
                    op_, ": rows, outputs and trajectories do not fit together");
    return paths;
  }

  int64_t outputs() const { return loop->widths[layers]; }

  Operand<T> operand(const Tensor& t) const {
    STD_TORCH_CHECK(t.is_contiguous() && (t.size(0) == tasks || t.size(0) == 1), op_, ": tensors of ", tasks,
                    " and of ", t.size(0), " tasks");
    STD_TORCH_CHECK(t.scalar_type() == arguments_.support_x.scalar_type(), op_, ": tensors differ in dtype");
    return {data<T>(t), t.size(0) == 1 && tasks != 1 ? 0 : size(t)};
  }

  // Floating point operations of one task, roughly.
  int64_t cost(bool backward) const {
    const InnerLoop<T>& p = *loop;
    int64_t products = gram ? p.support.count * p.widths[1] : 0;
    for (size_t l = first; l < layers; ++l) products += p.widths[l] * p.widths[l + 1];
    const int64_t rows = 3 * p.steps * p.support.count + p.query.count;
    return 2 * products * (backward ? 3 * rows : rows);
  }

  const Kernels<T>& kernels() const {
    const int64_t* widths = loop->widths;
    return kernels_for<T>(widths + first, int64_t(layers - first));
  }

  // Runs `kernel` on all tasks, a range for each thread.
  template <class F>
  void run(bool backward, const F& kernel) const {
    if (tasks == 0) return;
    loop->tasks_each = tasks / groups;
    parallel(groups, cost(backward) * (tasks / groups), [&](int64_t g) {
      const Range range = part(tasks, groups, g);
      kernel(*loop, range.begin, range.end, g);
    });
  }

  static int64_t size(const Tensor& t) {
    int64_t n = 1;
    for (int64_t d = 1; d < t.dim(); ++d) n *= t.size(d);
    return n;
  }

 private:
  void check_same(const Tensor& rate, const Tensor& of) const {
    STD_TORCH_CHECK(rate.dim() == of.dim() && size(rate) == size(of), op_,
                    ": rates per element are not of their tensor's size");
  }

  const char* op_;
  const InnerArguments& arguments_;
};

// A gradient to be formed: straight into its tensor, or, of a shared input, a sum per group first.
template <class T>
class InnerGradient {
 public:
  Tensor tensor;

  // `bare`: of what all tasks share without the dimension of tasks
  InnerGradient(const InnerProblem<T>& problem, const Tensor& like, bool needed, Target<T>& target, bool bare = false)
      : tensor(new_like(like, needed, bare && like.size(0) == 1)), groups_(problem.groups), size_(InnerProblem<T>::size(like)) {
    target = {};
    if (!needed) return;
    summed_ = like.size(0) == 1 && problem.tasks != 1;
    target.base = mutable_data<T>(tensor);
    target.sum = summed_;
    if (!summed_) {
      target.step = size_;
    } else if (groups_ > 1) {
      partials_ = std::make_unique_for_overwrite<T[]>(size_t(groups_ * size_));
      target.base = partials_.get();
      target.group_step = size_;
    }
    if (summed_) std::fill_n(target.base, groups_ * size_, T(0));
    base_ = target.base;
    if (target.base == nullptr) target.base = &nothing_;  // of no elements, yet asked for
  }
  void finish() const {
    if (summed_ && groups_ > 1) kernels<T>().sum_partials(base_, groups_, size_, mutable_data<T>(tensor), size_);
  }

 private:
  static inline T nothing_ = 0;
  std::unique_ptr<T[]> partials_;
  int64_t groups_, size_;
  bool summed_ = false;
  T* base_ = nullptr;
};

template <class T>
using InnerGradients = std::vector<std::unique_ptr<InnerGradient<T>>>;

// The gradients that both ops have.
template <class T>
struct SharedGradients {
  InnerGradients<T> all;

  Tensor one(const InnerProblem<T>& problem, const Tensor& like, bool needed, Target<T>& target, bool bare = false) {
    all.push_back(std::make_unique<InnerGradient<T>>(problem, like, needed, target, bare));
    return all.back()->tensor;
  }
  std::vector<Tensor> list(const InnerProblem<T>& problem, const std::vector<Tensor>& like, bool needed,
                           Target<T>* targets, bool bare = false) {
    std::vector<Tensor> out;
    for (size_t i = 0; i < like.size(); ++i) out.push_back(one(problem, like[i], needed, targets[i], bare));
    return out;
  }
  std::vector<Tensor> element_rates(const InnerProblem<T>& problem, const std::vector<Tensor>& like, bool needed) {
    std::vector<Tensor> out;
    for (size_t i = 0; i < like.size(); ++i) {
      Target<T>& target = i < problem.layers ? problem.loop->d_weight_rates[i]
                                             : problem.loop->d_bias_rates[i - problem.layers];
      out.push_back(one(problem, like[i], needed, target));
    }
    return out;
  }
  void finish() const {
    for (const auto& gradient : all) gradient->finish();
  }
};

}  // namespace fastmeta::cpu
