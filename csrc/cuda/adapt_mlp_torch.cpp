// adapt_mlp on CUDA tensors.
#include "inner_loop/bridge.h"

namespace fastmeta::cuda {
namespace {

constexpr const char* kOp = "adapt_mlp";

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> adapt_mlp(
    Tensor support_x, Tensor support_y, Tensor support_weight, Tensor gram_support, std::vector<Tensor> weights,
    std::vector<Tensor> biases, Tensor rates, std::vector<Tensor> element_rates, int64_t loss, int64_t activation,
    double delta, double momentum, double weight_decay, bool first_order) {
  const InnerArguments arguments{support_x, support_y,     support_weight, gram_support, weights,
                                 biases,    rates,         element_rates,  loss,         activation,
                                 delta,     momentum,      weight_decay,   first_order};
  InnerProblem problem(kOp, arguments);
  InnerLoop& p = problem.loop;
  const OnDevice device(support_x);
  std::vector<Tensor> fast_weights, fast_biases;
  for (size_t i = 0; i < weights.size(); ++i) {
    fast_weights.push_back(problem.per_task(weights[i]));
    p.layer[p.first + int(i)].fast_weight = fast_weights.back().mutable_data_ptr();
  }
  for (size_t i = 0; i < biases.size(); ++i) {
    fast_biases.push_back(problem.per_task(biases[i]));
    p.layer[p.first + int(i)].fast_bias = fast_biases.back().mutable_data_ptr();
  }
  Tensor coefficients = p.first ? problem.per_task(support_x) : new_tensor(support_x, {p.tasks, 0, 0});
  p.coefficients = coefficients.mutable_data_ptr();
  problem.run(false, plan_adapt_mlp, launch_adapt_mlp, device.stream);
  return {fast_weights, fast_biases, coefficients};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, std::vector<Tensor>> adapt_mlp_bwd(
    std::vector<Tensor> grad_weights, std::vector<Tensor> grad_biases, Tensor grad_coefficients, Tensor support_x,
    Tensor support_y, Tensor support_weight, Tensor gram_support, std::vector<Tensor> weights,
    std::vector<Tensor> biases, Tensor rates, std::vector<Tensor> element_rates, int64_t loss, int64_t activation,
    double delta, double momentum, double weight_decay, bool first_order, int64_t needs) {
  const InnerArguments arguments{support_x, support_y,     support_weight, gram_support, weights,
                                 biases,    rates,         element_rates,  loss,         activation,
                                 delta,     momentum,      weight_decay,   first_order};
  InnerProblem problem(kOp, arguments);
  InnerLoop& p = problem.loop;
  STD_TORCH_CHECK(grad_weights.size() == weights.size() && grad_biases.size() == biases.size(), kOp,
                  ": needs a gradient for every weight and bias");
  const OnDevice device(support_x);
  for (size_t i = 0; i < weights.size(); ++i)
    p.layer[p.first + int(i)].fast_weight = problem.incoming(grad_weights[i], weights[i]);
  for (size_t i = 0; i < biases.size(); ++i)
    p.layer[p.first + int(i)].fast_bias = problem.incoming(grad_biases[i], biases[i]);
  const bool gram = p.first;
  if (gram) p.coefficients = problem.incoming(grad_coefficients, support_x);
  Tensor d_support_x = new_like(support_x, needs & 1), d_gram_support = new_like(gram_support, needs & 2);
  p.d_support_x = problem.data(d_support_x, needs & 1);
  p.d_gram_support = problem.data(d_gram_support, gram && needs & 2);
  std::vector<Tensor> d_weights = problem.d_weights(needs & 4), d_biases = problem.d_biases(needs & 8);
  Tensor d_rates = problem.d_rates(needs & 16);
  std::vector<Tensor> d_element_rates = problem.d_element_rates(needs & 32);
  problem.run(true, plan_adapt_mlp, launch_adapt_mlp, device.stream);
  return {d_support_x, d_gram_support, d_weights, d_biases, d_rates, d_element_rates};
}

}  // namespace

FM_LIBRARY {
  m.impl("adapt_mlp", TORCH_BOX(&adapt_mlp));
  m.impl("adapt_mlp_bwd", TORCH_BOX(&adapt_mlp_bwd));
}

}  // namespace fastmeta::cuda
