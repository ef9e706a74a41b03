// meta_loss_mlp on CPU tensors, split over tasks.
#include "inner_loop_torch.h"

namespace fastmeta::cpu {
namespace {

constexpr const char* kOp = "meta_loss_mlp";

std::tuple<Tensor, Tensor> meta_loss_mlp(Tensor support_x, Tensor support_y, Tensor support_weight, Tensor query_x,
                                         Tensor query_y, Tensor query_weight, Tensor gram_support, Tensor gram_query,
                                         std::vector<Tensor> weights, std::vector<Tensor> biases, Tensor rates,
                                         std::vector<Tensor> element_rates, int64_t loss, int64_t activation,
                                         double delta, double momentum, double weight_decay, bool first_order) {
  const InnerArguments arguments{support_x,     support_y, support_weight, gram_support, weights,      biases,
                                 rates,         element_rates, loss, activation, delta, momentum, weight_decay,
                                 first_order};
  Tensor losses, logits;
  by_dtype(kOp, support_x, [&](auto zero) {
    using T = decltype(zero);
    InnerProblem<T> problem(kOp, arguments);
    InnerLoop<T>& p = *problem.loop;
    problem.rows(p.query, query_x, query_y, query_weight, gram_query);
    p.query_pass = true;
    losses = new_tensor(support_x, {problem.tasks});
    logits = new_tensor(support_x, {problem.tasks, query_x.size(1), problem.outputs()});
    p.loss_out = mutable_data<T>(losses);
    p.logits_out = mutable_data<T>(logits);
    problem.run(false, kernels<T>().inner_loop);
  });
  return {losses, logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, std::vector<Tensor>>
meta_loss_mlp_bwd(Tensor grad_loss, Tensor grad_logits, Tensor support_x, Tensor support_y, Tensor support_weight,
                  Tensor query_x, Tensor query_y, Tensor query_weight, Tensor gram_support, Tensor gram_query,
                  std::vector<Tensor> weights, std::vector<Tensor> biases, Tensor rates,
                  std::vector<Tensor> element_rates, int64_t loss, int64_t activation, double delta, double momentum,
                  double weight_decay, bool first_order, int64_t needs) {
  const InnerArguments arguments{support_x,     support_y, support_weight, gram_support, weights,      biases,
                                 rates,         element_rates, loss, activation, delta, momentum, weight_decay,
                                 first_order};
  check_dims(kOp, grad_loss, 1);
  check_dims(kOp, grad_logits, 3);
  std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, std::vector<Tensor>> out;
  by_dtype(kOp, support_x, [&](auto zero) {
    using T = decltype(zero);
    InnerProblem<T> problem(kOp, arguments);
    InnerLoop<T>& p = *problem.loop;
    problem.rows(p.query, query_x, query_y, query_weight, gram_query);
    STD_TORCH_CHECK(grad_loss.size(0) == problem.tasks && grad_logits.size(0) == problem.tasks &&
                        grad_logits.size(1) == p.query.count && grad_logits.size(2) == problem.outputs(),
                    kOp, ": incoming gradients are of the wrong size");
    p.query_pass = true;
    p.grad_loss = data<T>(grad_loss);
    p.grad_logits = data<T>(grad_logits);
    SharedGradients<T> gradients;
    const bool gram = problem.gram;
    out = {gradients.one(problem, support_x, needs & 1, p.d_support_x),
           gradients.one(problem, query_x, needs & 2, p.d_query_x),
           gradients.one(problem, gram_support, (needs & 4), p.d_gram_support),
           gradients.one(problem, gram_query, (needs & 8), p.d_gram_query),
           gradients.list(problem, weights, needs & 16, p.d_weights + problem.first),
           gradients.list(problem, biases, needs & 32, p.d_biases + problem.first),
           gradients.one(problem, rates, needs & 64, p.d_rates),
           gradients.element_rates(problem, element_rates, needs & 128)};
    if (!gram) p.d_gram_support = p.d_gram_query = {};
    problem.run(true, kernels<T>().inner_loop_gradient);
    gradients.finish();
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta_native, CPU, m) {
  m.impl("meta_loss_mlp", TORCH_BOX(&meta_loss_mlp));
  m.impl("meta_loss_mlp_bwd", TORCH_BOX(&meta_loss_mlp_bwd));
}

}  // namespace fastmeta::cpu
