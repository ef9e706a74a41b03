// The torch side that adapt_mlp and meta_loss_mlp share: tensors to plain pointers, checked.
#pragma once

#include "../bridge.h"

#include <limits>

#include <fastmeta/launch_inner_loop.h>

namespace fastmeta::cuda {

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

class InnerProblem {
 public:
  InnerLoop loop{};
  Dtype dtype;

  InnerProblem(const char* op, const InnerArguments& a) : op_(op), a_(a) {
    check(a.support_x, 3);
    check(a.rates, 3);
    dtype = dtype_of(op, a.support_x);
    STD_TORCH_CHECK(dtype == Dtype::f32 || dtype == Dtype::f64, op, ": the CUDA kernels take float32 and float64");
    InnerLoop& p = loop;
    p.tasks = small(a.support_x.size(0));
    const int64_t layers = a.rates.size(2), given = int64_t(a.weights.size());
    STD_TORCH_CHECK(layers >= 1 && layers <= kInnerLayers, op, ": the CUDA kernels take 1 to ", kInnerLayers,
                    " layers, got ", layers);
    STD_TORCH_CHECK(given == layers || given + 1 == layers, op, ": got ", given, " weights and rates for ", layers,
                    " layers");
    STD_TORCH_CHECK(a.biases.empty() || a.biases.size() == a.weights.size(), op, ": needs one bias per layer, or none");
    STD_TORCH_CHECK(a.loss >= 0 && a.loss < kLossCount, op, ": loss ", a.loss, " is not one of 0 to ", kLossCount - 1);
    STD_TORCH_CHECK(a.activation >= 0 && a.activation < kActivationCount, op, ": activation ", a.activation,
                    " is not one of 0 to ", kActivationCount - 1);
    p.layers = int(layers);
    p.steps = small(a.rates.size(1));
    p.first = given < layers;
    p.biased = !a.biases.empty();
    STD_TORCH_CHECK(!p.first || (a.weight_decay == 0 && a.element_rates.empty()), op,
                    ": no weight decay and no rates per element in the Gram form");
    STD_TORCH_CHECK(a.element_rates.empty() || a.element_rates.size() == a.weights.size() + a.biases.size(), op,
                    ": needs a rate per element for every weight and bias, or none");
    p.elementwise = !a.element_rates.empty();
    p.first_order = a.first_order;
    p.loss = Loss(a.loss);
    p.activation = Activation(a.activation);
    p.delta = a.delta;
    p.momentum = a.momentum;
    p.weight_decay = a.weight_decay;
    p.rates = input(a.rates);
    int64_t width = a.support_x.size(2);
    if (p.first) p.layer[0].out = small(width);
    for (int l = p.first; l < p.layers; ++l) {
      InnerLayer& layer = p.layer[l];
      const Tensor& w = a.weights[l - p.first];
      check(w, 3);
      STD_TORCH_CHECK(w.size(2) == width, op, ": weights[", l - p.first, "] takes ", w.size(2), " features, gets ",
                      width);
      layer.in = small(width);
      width = w.size(1);
      layer.out = small(width);
      layer.weight = input(w);
      if (p.elementwise) layer.weight_rate = element_rate(a.element_rates[l], w);
      if (!p.biased) continue;
      const Tensor& b = a.biases[l - p.first];
      check(b, 2);
      STD_TORCH_CHECK(b.size(1) == width, op, ": biases[", l - p.first, "] is of width ", b.size(1), ", not ", width);
      layer.bias = input(b);
      if (p.elementwise) layer.bias_rate = element_rate(a.element_rates[layers + l], b);
    }
    rows(p.support, a.support_x, a.support_y, a.support_weight, a.gram_support);
  }
  InnerProblem(const InnerProblem&) = delete;

  int64_t outputs() const { return loop.layer[loop.layers - 1].out; }

  void rows(InnerRows& to, const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& gram) const {
    check(x, 3);
    check(weight, 2);
    const int64_t n = x.size(1);
    STD_TORCH_CHECK(x.size(0) == loop.tasks && x.size(2) == a_.support_x.size(2) && weight.size(0) == loop.tasks &&
                        weight.size(1) == n,
                    op_, ": rows of ", loop.tasks, " tasks and their weights differ in size");
    to.rows = small(n);
    to.x = x.const_data_ptr();
    to.weight = weight.const_data_ptr();
    if (loop.loss == Loss::cross_entropy) {
      to.labels = labels_of(op_, x, y, loop.tasks);
      STD_TORCH_CHECK(y.size(1) == n, op_, ": needs one label per row");
    } else if (loop.loss == Loss::maximum_entropy) {
      const bool visits = y.dim() == 4;
      check(y, visits ? 4 : 3);
      const int64_t demonstrations = y.size(y.dim() - 2), members = y.size(y.dim() - 1);
      to.paths = {small(demonstrations), small(members), small(demonstrations * members), visits};
      STD_TORCH_CHECK(outputs() == 1 && to.paths.demonstrations > 0 && to.paths.members > 1 &&
                          y.size(0) == loop.tasks && n > 0 &&
                          (visits ? y.size(1) == n : n % to.paths.count == 0),
                      op_, ": rows, outputs and trajectories do not fit together");
      to.target = y.const_data_ptr();
    } else {
      check(y, 3);
      STD_TORCH_CHECK(y.size(0) == loop.tasks && y.size(1) == n && y.size(2) == outputs(), op_,
                      ": targets are not of the size of the predictions");
      to.target = y.const_data_ptr();
    }
    if (!loop.first) return;
    check(gram, 3);
    STD_TORCH_CHECK(gram.size(0) == loop.tasks && gram.size(1) == n && gram.size(2) == a_.support_x.size(1), op_,
                    ": the inner products with the support rows are of the wrong size");
    to.gram = gram.const_data_ptr();
  }

  void check(const Tensor& t, int64_t dims) const { check_tensor(op_, a_.support_x, t, dims); }

  // A number for each task, or one for all of them.
  InnerInput numbers(const Tensor& t) const {
    check(t, 1);
    return input(t);
  }

  // An output of all tasks, of the size of one task's part of `like` for each.
  Tensor per_task(const Tensor& like) const {
    return like.dim() == 3 ? new_tensor(like, {loop.tasks, like.size(1), like.size(2)})
                           : new_tensor(like, {loop.tasks, like.size(1)});
  }
  // An incoming gradient of such an output; read only.
  void* incoming(const Tensor& gradient, const Tensor& like) const {
    check(gradient, like.dim());
    STD_TORCH_CHECK(gradient.size(0) == loop.tasks && size(gradient) == size(like), op_,
                    ": incoming gradients are of the wrong size");
    return const_cast<void*>(gradient.const_data_ptr());
  }

  InnerOutput output(const Tensor& t, bool needed) const {
    if (!needed || t.numel() == 0) return {nullptr, 0};
    return {t.mutable_data_ptr(), t.size(0) == 1 && loop.tasks != 1 ? 0 : size(t)};
  }
  static void* data(const Tensor& t, bool needed) { return needed && t.numel() > 0 ? t.mutable_data_ptr() : nullptr; }

  // Gradients of one kind of tensor, layer by layer from `first` on.
  std::vector<Tensor> gradients(const std::vector<Tensor>& like, size_t begin, size_t end, int first, bool needed,
                                InnerOutput InnerLayer::*member) {
    std::vector<Tensor> out;
    for (size_t i = begin; i < end; ++i) {
      out.push_back(new_like(like[i], needed));
      loop.layer[first + int(i - begin)].*member = output(out.back(), needed);
    }
    return out;
  }
  std::vector<Tensor> d_weights(bool needed) {
    return gradients(a_.weights, 0, a_.weights.size(), loop.first, needed, &InnerLayer::d_weight);
  }
  std::vector<Tensor> d_biases(bool needed) {
    return gradients(a_.biases, 0, a_.biases.size(), loop.first, needed, &InnerLayer::d_bias);
  }
  std::vector<Tensor> d_element_rates(bool needed) {
    const size_t layers = size_t(loop.layers), count = a_.element_rates.size();
    std::vector<Tensor> out = gradients(a_.element_rates, 0, std::min(layers, count), 0, needed,
                                        &InnerLayer::d_weight_rate);
    if (count <= layers) return out;
    for (Tensor& t : gradients(a_.element_rates, layers, count, 0, needed, &InnerLayer::d_bias_rate))
      out.push_back(t);
    return out;
  }
  Tensor d_rates(bool needed) {
    Tensor out = new_like(a_.rates, needed);
    loop.d_rates = output(out, needed);
    return out;
  }

  // plan_* and launch_* of the op, with the scratch that the plan asks for.
  template <class Plan, class Launch>
  void run(bool backward, const Plan& plan_op, const Launch& launch_op, void* stream) {
    const InnerPlan plan = plan_op(dtype, loop, backward);
    STD_TORCH_CHECK(plan.block_elements < std::numeric_limits<int>::max(), op_, ": a task's weights and rows, ",
                    plan.block_elements, " elements, are more than the CUDA kernels count");
    Tensor scratch = new_tensor(a_.support_x, {plan.scratch});
    launch_op(dtype, loop, plan, backward, scratch.mutable_data_ptr(), stream);
    OnDevice::check(op_);
  }

 private:
  static int64_t size(const Tensor& t) {
    int64_t n = 1;
    for (int64_t d = 1; d < t.dim(); ++d) n *= t.size(d);
    return n;
  }
  int small(int64_t n) const {
    STD_TORCH_CHECK(n <= std::numeric_limits<int>::max() / 8, op_, ": a dimension of ", n,
                    " is more than the CUDA kernels count");
    return int(n);
  }
  InnerInput input(const Tensor& t) const {
    check(t, t.dim());
    STD_TORCH_CHECK(t.size(0) == loop.tasks || t.size(0) == 1, op_, ": tensors of ", loop.tasks, " and of ",
                    t.size(0), " tasks");
    return {t.const_data_ptr(), t.size(0) == 1 && loop.tasks != 1 ? 0 : size(t)};
  }
  InnerInput element_rate(const Tensor& t, const Tensor& of) const {
    check(t, of.dim());
    STD_TORCH_CHECK(size(t) == size(of), op_, ": rates per element are not of their tensor's size");
    return input(t);
  }

  const char* op_;
  const InnerArguments& a_;
};

}  // namespace fastmeta::cuda
