// adapt_mlp on CPU tensors, split over tasks.
#include "inner_loop/torch.h"

namespace fastmeta::cpu {
namespace {

constexpr const char* kOp = "adapt_mlp";

// An output of all tasks, as large for each as one task's part of `like`.
template <class T>
Target<T> per_task(const Tensor& out) {
  Target<T> target;
  target.base = mutable_data<T>(out);
  target.step = InnerProblem<T>::size(out);
  return target;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> adapt_mlp(
    Tensor support_x, Tensor support_y, Tensor support_weight, Tensor gram_support, std::vector<Tensor> weights,
    std::vector<Tensor> biases, Tensor rates, std::vector<Tensor> element_rates, int64_t loss, int64_t activation,
    double delta, double momentum, double weight_decay, bool first_order) {
  const InnerArguments arguments{support_x,     support_y, support_weight, gram_support, weights,      biases,
                                 rates,         element_rates, loss, activation, delta, momentum, weight_decay,
                                 first_order};
  std::vector<Tensor> fast_weights, fast_biases;
  Tensor coefficients;
  by_dtype(kOp, support_x, [&](auto zero) {
    using T = decltype(zero);
    InnerProblem<T> problem(kOp, arguments);
    InnerLoop<T>& p = *problem.loop;
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor& w = weights[i];
      fast_weights.push_back(new_tensor(w, {problem.tasks, w.size(1), w.size(2)}));
      p.fast_weights[problem.first + i] = per_task<T>(fast_weights.back());
    }
    for (size_t i = 0; i < biases.size(); ++i) {
      fast_biases.push_back(new_tensor(biases[i], {problem.tasks, biases[i].size(1)}));
      p.fast_biases[problem.first + i] = per_task<T>(fast_biases.back());
    }
    const int64_t support = problem.gram ? support_x.size(1) : 0, features = problem.gram ? support_x.size(2) : 0;
    coefficients = new_tensor(support_x, {problem.tasks, support, features});
    p.coefficients = per_task<T>(coefficients);
    problem.run(false, problem.kernels().inner_loop);
  });
  return {fast_weights, fast_biases, coefficients};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, std::vector<Tensor>> adapt_mlp_bwd(
    std::vector<Tensor> grad_weights, std::vector<Tensor> grad_biases, Tensor grad_coefficients, Tensor support_x,
    Tensor support_y, Tensor support_weight, Tensor gram_support, std::vector<Tensor> weights,
    std::vector<Tensor> biases, Tensor rates, std::vector<Tensor> element_rates, int64_t loss, int64_t activation,
    double delta, double momentum, double weight_decay, bool first_order, int64_t needs) {
  const InnerArguments arguments{support_x,     support_y, support_weight, gram_support, weights,      biases,
                                 rates,         element_rates, loss, activation, delta, momentum, weight_decay,
                                 first_order};
  std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, std::vector<Tensor>> out;
  by_dtype(kOp, support_x, [&](auto zero) {
    using T = decltype(zero);
    InnerProblem<T> problem(kOp, arguments);
    InnerLoop<T>& p = *problem.loop;
    const auto incoming = [&](const Tensor& g, const Tensor& like) -> Operand<T> {
      STD_TORCH_CHECK(g.is_contiguous() && g.size(0) == problem.tasks && problem.size(g) == problem.size(like), kOp,
                      ": incoming gradients are of the wrong size");
      return {data<T>(g), problem.size(g)};
    };
    STD_TORCH_CHECK(grad_weights.size() == weights.size() && grad_biases.size() == biases.size(), kOp,
                    ": needs a gradient for every weight and bias");
    for (size_t i = 0; i < weights.size(); ++i)
      p.grad_weights[problem.first + i] = incoming(grad_weights[i], weights[i]);
    for (size_t i = 0; i < biases.size(); ++i) p.grad_biases[problem.first + i] = incoming(grad_biases[i], biases[i]);
    if (problem.gram) p.grad_coefficients = incoming(grad_coefficients, support_x);
    SharedGradients<T> gradients;
    out = {gradients.one(problem, support_x, needs & 1, p.d_support_x),
           gradients.one(problem, gram_support, needs & 2, p.d_gram_support),
           gradients.list(problem, weights, needs & 4, p.d_weights + problem.first),
           gradients.list(problem, biases, needs & 8, p.d_biases + problem.first),
           gradients.one(problem, rates, needs & 16, p.d_rates),
           gradients.element_rates(problem, element_rates, needs & 32)};
    if (!problem.gram) p.d_gram_support = {};
    problem.run(true, problem.kernels().inner_loop_gradient);
    gradients.finish();
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta_native, CPU, m) {
  m.impl("adapt_mlp", TORCH_BOX(&adapt_mlp));
  m.impl("adapt_mlp_bwd", TORCH_BOX(&adapt_mlp_bwd));
}

}  // namespace fastmeta::cpu
