// The native extension: schemas of all ops. Its kernels are registered where they are written.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastmeta_native, m) {
  m.def("fast_weight_update(Tensor[] params, Tensor[] grads, Tensor[] lrs, float lr) -> Tensor[]");
  m.def(
      "fast_weight_update_shaped(Tensor[] params, Tensor[] grads, Tensor[] lrs, float lr, int tasks, int[] columns) "
      "-> Tensor[]");
  m.def(
      "fast_weight_update_bwd(Tensor[] grad_outs, Tensor[] grads, Tensor[] lrs, float lr, int needs) "
      "-> (Tensor[], Tensor[])");
  m.def(
      "sgd_step(Tensor[] params, Tensor[] grads, Tensor[] buffers, Tensor[] rates, Tensor[] momenta, Tensor[] shares, "
      "Tensor[] decays, float rate, float momentum, float share, float decay, bool nesterov, bool keeps) "
      "-> (Tensor[], Tensor[])");
  m.def(
      "sgd_step_bwd(Tensor[] grad_0, Tensor[] grad_1, Tensor[] params, Tensor[] grads, Tensor[] buffers, "
      "Tensor[] rates, Tensor[] momenta, Tensor[] shares, Tensor[] decays, float rate, float momentum, float share, "
      "float decay, bool nesterov, bool keeps, int needs) "
      "-> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])");
  m.def(
      "adam_step(Tensor[] params, Tensor[] grads, Tensor[] means, Tensor[] squares, Tensor[] maxima, Tensor[] rates, "
      "Tensor[] shares1, Tensor[] shares2, Tensor[] epsilons, Tensor[] decays, float rate, float share1, "
      "float share2, float eps, float decay, bool decoupled, bool amsgrad) "
      "-> (Tensor[], Tensor[], Tensor[], Tensor[])");
  m.def(
      "adam_step_bwd(Tensor[] grad_0, Tensor[] grad_1, Tensor[] grad_2, Tensor[] grad_3, Tensor[] params, "
      "Tensor[] grads, Tensor[] means, Tensor[] squares, Tensor[] maxima, Tensor[] rates, Tensor[] shares1, "
      "Tensor[] shares2, Tensor[] epsilons, Tensor[] decays, float rate, float share1, float share2, float eps, "
      "float decay, bool decoupled, bool amsgrad, int needs) -> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], "
      "Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])");
  m.def("class_prototypes(Tensor embeddings, Tensor labels, int num_classes) -> Tensor");
  m.def("class_prototypes_bwd(Tensor grad, Tensor labels) -> Tensor");
  m.def("pairwise_distance(Tensor query, Tensor prototypes, int metric) -> Tensor");
  m.def(
      "pairwise_distance_bwd(Tensor grad, Tensor query, Tensor prototypes, int metric, int needs) "
      "-> (Tensor, Tensor)");
  m.def(
      "prototypical_loss(Tensor support, Tensor support_labels, Tensor query, Tensor query_labels, int num_classes, "
      "int metric) -> (Tensor, Tensor)");
  m.def(
      "prototypical_loss_bwd(Tensor grad_loss, Tensor support, Tensor support_labels, Tensor query, "
      "Tensor query_labels, int num_classes, int metric, int needs) -> (Tensor, Tensor)");
  // ops `_with_gradient`: outputs, and the gradients of the sum of `scale`, [1] or [tasks], times the losses
  m.def(
      "prototypical_loss_with_gradient(Tensor support, Tensor support_labels, Tensor query, Tensor query_labels, "
      "int num_classes, int metric, Tensor scale, int needs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("functional_mlp(Tensor x, Tensor[] weights, Tensor[] biases, int activation) -> Tensor");
  m.def(
      "functional_mlp_bwd(Tensor grad, Tensor x, Tensor[] weights, Tensor[] biases, int activation, int needs) "
      "-> (Tensor, Tensor[], Tensor[])");
  m.def("contrastive_loss(Tensor embeddings, float temperature) -> Tensor");
  m.def("contrastive_loss_bwd(Tensor grad, Tensor embeddings, float temperature, int needs) -> Tensor");
  m.def(
      "contrastive_loss_with_gradient(Tensor embeddings, float temperature, Tensor scale, int needs) "
      "-> (Tensor, Tensor)");
  m.def(
      "task_conv2d(Tensor x, Tensor weight, Tensor[] bias, int stride_h, int stride_w, int pad_h, int pad_w, "
      "int dilation_h, int dilation_w, int groups) -> Tensor");
  m.def(
      "task_conv2d_bwd_data(Tensor grad, Tensor weight, int height, int width, int stride_h, int stride_w, int pad_h, "
      "int pad_w, int dilation_h, int dilation_w, int groups) -> Tensor");
  m.def(
      "task_conv2d_bwd_weight(Tensor grad, Tensor x, int kernel_h, int kernel_w, int stride_h, int stride_w, "
      "int pad_h, int pad_w, int dilation_h, int dilation_w, int groups) -> Tensor");
  m.def("norm_moments(Tensor x, int norm, int groups) -> (Tensor, Tensor)");
  m.def(
      "norm_act_pool(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] moments, int norm, int groups, float eps, "
      "int activation, float slope, int pool) -> Tensor");
  m.def(
      "norm_act_pool_bwd(Tensor grad, Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] moments, int norm, "
      "int groups, float eps, int activation, float slope, int pool, int needs) -> (Tensor, Tensor[], Tensor[])");
  m.def(
      "norm_act_pool_bwd_bwd(Tensor grad_0, Tensor[] grad_1, Tensor[] grad_2, Tensor grad, Tensor x, Tensor[] weight, "
      "Tensor[] bias, Tensor[] moments, int norm, int groups, float eps, int activation, float slope, int pool, "
      "int needs, int second_needs) -> (Tensor, Tensor, Tensor[], Tensor[])");
  m.def(
      "adapt_mlp(Tensor support_x, Tensor support_y, Tensor support_weight, Tensor gram_support, Tensor[] weights, "
      "Tensor[] biases, Tensor rates, Tensor[] element_rates, int loss, int activation, float delta, float momentum, "
      "float weight_decay, bool first_order) -> (Tensor[], Tensor[], Tensor)");
  m.def(
      "adapt_mlp_bwd(Tensor[] grad_0, Tensor[] grad_1, Tensor grad_2, Tensor support_x, Tensor support_y, "
      "Tensor support_weight, Tensor gram_support, Tensor[] weights, Tensor[] biases, Tensor rates, "
      "Tensor[] element_rates, int loss, int activation, float delta, float momentum, float weight_decay, "
      "bool first_order, int needs) -> (Tensor, Tensor, Tensor[], Tensor[], Tensor, Tensor[])");
  m.def(
      "meta_loss_mlp(Tensor support_x, Tensor support_y, Tensor support_weight, Tensor query_x, Tensor query_y, "
      "Tensor query_weight, Tensor gram_support, Tensor gram_query, Tensor[] weights, Tensor[] biases, Tensor rates, "
      "Tensor[] element_rates, int loss, int activation, float delta, float momentum, float weight_decay, "
      "bool first_order) -> (Tensor, Tensor)");
  m.def(
      "meta_loss_mlp_bwd(Tensor grad_0, Tensor grad_1, Tensor support_x, Tensor support_y, Tensor support_weight, "
      "Tensor query_x, Tensor query_y, Tensor query_weight, Tensor gram_support, Tensor gram_query, Tensor[] weights, "
      "Tensor[] biases, Tensor rates, Tensor[] element_rates, int loss, int activation, float delta, float momentum, "
      "float weight_decay, bool first_order, int needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[], Tensor, Tensor[])");
  m.def(
      "meta_loss_mlp_with_gradient(Tensor support_x, Tensor support_y, Tensor support_weight, Tensor query_x, "
      "Tensor query_y, Tensor query_weight, Tensor gram_support, Tensor gram_query, Tensor[] weights, Tensor[] biases, "
      "Tensor rates, Tensor[] element_rates, int loss, int activation, float delta, float momentum, "
      "float weight_decay, bool first_order, Tensor scale, int needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[], Tensor, Tensor[])");
}
