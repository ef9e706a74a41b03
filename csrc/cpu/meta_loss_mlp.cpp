// meta_loss_mlp on CPU tensors, split over tasks.
#include "inner_loop/torch.h"

namespace fastmeta::cpu {
namespace {

constexpr const char* kOp = "meta_loss_mlp";

using Outputs = std::tuple<Tensor, Tensor>;
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor, std::vector<Tensor>>;

template <class T>
void set_outputs(InnerProblem<T>& problem, const Tensor& query_x, Outputs& out) {
  out = {new_tensor(query_x, {problem.tasks}),
         new_tensor(query_x, {problem.tasks, query_x.size(1), problem.outputs()})};
  problem.loop->loss_out = mutable_data<T>(std::get<0>(out));
  problem.loop->logits_out = mutable_data<T>(std::get<1>(out));
}

template <class T>
Gradients run_gradient(InnerProblem<T>& problem, const InnerArguments& a, const Tensor& query_x,
                       const Tensor& gram_query, int64_t needs) {
  InnerLoop<T>& p = *problem.loop;
  SharedGradients<T> gradients;
  Gradients out = {gradients.one(problem, a.support_x, needs & 1, p.d_support_x),
                   gradients.one(problem, query_x, needs & 2, p.d_query_x),
                   gradients.one(problem, a.gram_support, needs & 4, p.d_gram_support),
                   gradients.one(problem, gram_query, needs & 8, p.d_gram_query),
                   gradients.list(problem, a.weights, needs & 16, p.d_weights + problem.first, needs & 256),
                   gradients.list(problem, a.biases, needs & 32, p.d_biases + problem.first, needs & 256),
                   gradients.one(problem, a.rates, needs & 64, p.d_rates),
                   gradients.element_rates(problem, a.element_rates, needs & 128)};
  if (!problem.gram) p.d_gram_support = p.d_gram_query = {};
  problem.run(true, problem.kernels().inner_loop_gradient);
  gradients.finish();
  return out;
}

Outputs meta_loss_mlp(Tensor support_x, Tensor support_y, Tensor support_weight, Tensor query_x, Tensor query_y,
                      Tensor query_weight, Tensor gram_support, Tensor gram_query, std::vector<Tensor> weights,
                      std::vector<Tensor> biases, Tensor rates, std::vector<Tensor> element_rates, int64_t loss,
                      int64_t activation, double delta, double momentum, double weight_decay, bool first_order) {
  const InnerArguments arguments{support_x,     support_y, support_weight, gram_support, weights,      biases,
                                 rates,         element_rates, loss, activation, delta, momentum, weight_decay,
                                 first_order};
  Outputs out;
  by_dtype(kOp, support_x, [&](auto zero) {
    using T = decltype(zero);
    InnerProblem<T> problem(kOp, arguments);
    problem.rows(problem.loop->query, query_x, query_y, query_weight, gram_query);
    problem.loop->query_pass = true;
    set_outputs(problem, query_x, out);
    problem.run(false, problem.kernels().inner_loop);
  });
  return out;
}

Gradients meta_loss_mlp_bwd(Tensor grad_loss, Tensor grad_logits, Tensor support_x, Tensor support_y,
                            Tensor support_weight, Tensor query_x, Tensor query_y, Tensor query_weight,
                            Tensor gram_support, Tensor gram_query, std::vector<Tensor> weights,
                            std::vector<Tensor> biases, Tensor rates, std::vector<Tensor> element_rates, int64_t loss,
                            int64_t activation, double delta, double momentum, double weight_decay, bool first_order,
                            int64_t needs) {
  const InnerArguments arguments{support_x,     support_y, support_weight, gram_support, weights,      biases,
                                 rates,         element_rates, loss, activation, delta, momentum, weight_decay,
                                 first_order};
  check_dims(kOp, grad_logits, 3);
  Gradients out;
  by_dtype(kOp, support_x, [&](auto zero) {
    using T = decltype(zero);
    InnerProblem<T> problem(kOp, arguments);
    InnerLoop<T>& p = *problem.loop;
    problem.rows(p.query, query_x, query_y, query_weight, gram_query);
    STD_TORCH_CHECK(grad_logits.size(0) == problem.tasks && grad_logits.size(1) == p.query.count &&
                        grad_logits.size(2) == problem.outputs(),
                    kOp, ": incoming gradients are of the wrong size");
    p.query_pass = true;
    p.grad_loss = of_tasks<T>(kOp, grad_loss, problem.tasks, support_x);
    p.grad_logits = data<T>(grad_logits);
    out = run_gradient(problem, arguments, query_x, gram_query, needs);
  });
  return out;
}

// Outputs, and the gradients of the sum of `scale` times the losses: one pass instead of two.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor,
           std::vector<Tensor>>
meta_loss_mlp_with_gradient(Tensor support_x, Tensor support_y, Tensor support_weight, Tensor query_x, Tensor query_y,
                            Tensor query_weight, Tensor gram_support, Tensor gram_query, std::vector<Tensor> weights,
                            std::vector<Tensor> biases, Tensor rates, std::vector<Tensor> element_rates, int64_t loss,
                            int64_t activation, double delta, double momentum, double weight_decay, bool first_order,
                            Tensor scale, int64_t needs) {
  const InnerArguments arguments{support_x,     support_y, support_weight, gram_support, weights,      biases,
                                 rates,         element_rates, loss, activation, delta, momentum, weight_decay,
                                 first_order};
  Outputs outputs;
  Gradients gradients;
  by_dtype(kOp, support_x, [&](auto zero) {
    using T = decltype(zero);
    InnerProblem<T> problem(kOp, arguments);
    problem.rows(problem.loop->query, query_x, query_y, query_weight, gram_query);
    problem.loop->query_pass = true;
    problem.loop->grad_loss = of_tasks<T>(kOp, scale, problem.tasks, support_x);
    set_outputs(problem, query_x, outputs);
    gradients = run_gradient(problem, arguments, query_x, gram_query, needs);
  });
  return std::tuple_cat(std::move(outputs), std::move(gradients));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta_native, CPU, m) {
  m.impl("meta_loss_mlp", TORCH_BOX(&meta_loss_mlp));
  m.impl("meta_loss_mlp_bwd", TORCH_BOX(&meta_loss_mlp_bwd));
  m.impl("meta_loss_mlp_with_gradient", TORCH_BOX(&meta_loss_mlp_with_gradient));
}

}  // namespace fastmeta::cpu
