// meta_loss_mlp on CUDA tensors.
#include "inner_loop/bridge.h"

namespace fastmeta::cuda {
namespace {

constexpr const char* kOp = "meta_loss_mlp";

using Outputs = std::tuple<Tensor, Tensor>;
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, std::vector<Tensor>>;

Outputs new_outputs(InnerProblem& problem, const Tensor& query_x) {
  InnerLoop& p = problem.loop;
  Tensor losses = new_tensor(query_x, {p.tasks});
  Tensor logits = new_tensor(query_x, {p.tasks, query_x.size(1), problem.outputs()});
  p.losses = losses.mutable_data_ptr();
  p.logits = logits.mutable_data_ptr();
  return {losses, logits};
}

Gradients run_gradient(InnerProblem& problem, const InnerArguments& a, const Tensor& query_x, const Tensor& gram_query,
                       int64_t needs, void* stream) {
  InnerLoop& p = problem.loop;
  const bool gram = p.first;
  Tensor d_support_x = new_like(a.support_x, needs & 1), d_query_x = new_like(query_x, needs & 2);
  Tensor d_gram_support = new_like(a.gram_support, needs & 4), d_gram_query = new_like(gram_query, needs & 8);
  p.d_support_x = problem.data(d_support_x, needs & 1);
  p.d_query_x = problem.data(d_query_x, needs & 2);
  p.d_gram_support = problem.data(d_gram_support, gram && needs & 4);
  p.d_gram_query = problem.data(d_gram_query, gram && needs & 8);
  std::vector<Tensor> d_weights = problem.d_weights(needs & 16), d_biases = problem.d_biases(needs & 32);
  Tensor d_rates = problem.d_rates(needs & 64);
  std::vector<Tensor> d_element_rates = problem.d_element_rates(needs & 128);
  problem.run(true, plan_meta_loss_mlp, launch_meta_loss_mlp, stream);
  return {d_support_x, d_query_x, d_gram_support, d_gram_query, d_weights, d_biases, d_rates, d_element_rates};
}

Outputs meta_loss_mlp(Tensor support_x, Tensor support_y, Tensor support_weight, Tensor query_x, Tensor query_y,
                      Tensor query_weight, Tensor gram_support, Tensor gram_query, std::vector<Tensor> weights,
                      std::vector<Tensor> biases, Tensor rates, std::vector<Tensor> element_rates, int64_t loss,
                      int64_t activation, double delta, double momentum, double weight_decay, bool first_order) {
  const InnerArguments arguments{support_x, support_y,     support_weight, gram_support, weights,
                                 biases,    rates,         element_rates,  loss,         activation,
                                 delta,     momentum,      weight_decay,   first_order};
  InnerProblem problem(kOp, arguments);
  problem.rows(problem.loop.query, query_x, query_y, query_weight, gram_query);
  const OnDevice device(support_x);
  Outputs outputs = new_outputs(problem, query_x);
  problem.run(false, plan_meta_loss_mlp, launch_meta_loss_mlp, device.stream);
  return outputs;
}

Gradients meta_loss_mlp_bwd(Tensor grad_loss, Tensor grad_logits, Tensor support_x, Tensor support_y,
                            Tensor support_weight, Tensor query_x, Tensor query_y, Tensor query_weight,
                            Tensor gram_support, Tensor gram_query, std::vector<Tensor> weights,
                            std::vector<Tensor> biases, Tensor rates, std::vector<Tensor> element_rates, int64_t loss,
                            int64_t activation, double delta, double momentum, double weight_decay, bool first_order,
                            int64_t needs) {
  const InnerArguments arguments{support_x, support_y,     support_weight, gram_support, weights,
                                 biases,    rates,         element_rates,  loss,         activation,
                                 delta,     momentum,      weight_decay,   first_order};
  InnerProblem problem(kOp, arguments);
  InnerLoop& p = problem.loop;
  problem.rows(p.query, query_x, query_y, query_weight, gram_query);
  problem.check(grad_loss, 1);
  problem.check(grad_logits, 3);
  STD_TORCH_CHECK(grad_loss.size(0) == p.tasks && grad_logits.size(0) == p.tasks &&
                      grad_logits.size(1) == query_x.size(1) && grad_logits.size(2) == problem.outputs(),
                  kOp, ": incoming gradients are of the wrong size");
  const OnDevice device(support_x);
  p.losses = const_cast<void*>(grad_loss.const_data_ptr());
  p.logits = const_cast<void*>(grad_logits.const_data_ptr());
  return run_gradient(problem, arguments, query_x, gram_query, needs, device.stream);
}

// Outputs, and the gradients of the sum of `scale` times the losses: one launch in place of two.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor,
           std::vector<Tensor>>
meta_loss_mlp_with_gradient(Tensor support_x, Tensor support_y, Tensor support_weight, Tensor query_x, Tensor query_y,
                            Tensor query_weight, Tensor gram_support, Tensor gram_query, std::vector<Tensor> weights,
                            std::vector<Tensor> biases, Tensor rates, std::vector<Tensor> element_rates, int64_t loss,
                            int64_t activation, double delta, double momentum, double weight_decay, bool first_order,
                            Tensor scale, int64_t needs) {
  const InnerArguments arguments{support_x, support_y,     support_weight, gram_support, weights,
                                 biases,    rates,         element_rates,  loss,         activation,
                                 delta,     momentum,      weight_decay,   first_order};
  InnerProblem problem(kOp, arguments);
  problem.rows(problem.loop.query, query_x, query_y, query_weight, gram_query);
  const OnDevice device(support_x);
  Outputs outputs = new_outputs(problem, query_x);
  problem.loop.grad_losses = problem.numbers(scale);
  return std::tuple_cat(std::move(outputs),
                        run_gradient(problem, arguments, query_x, gram_query, needs, device.stream));
}

}  // namespace

FM_LIBRARY {
  m.impl("meta_loss_mlp", TORCH_BOX(&meta_loss_mlp));
  m.impl("meta_loss_mlp_bwd", TORCH_BOX(&meta_loss_mlp_bwd));
  m.impl("meta_loss_mlp_with_gradient", TORCH_BOX(&meta_loss_mlp_with_gradient));
}

}  // namespace fastmeta::cuda
