// functional_mlp on CUDA tensors.
#include "bridge.h"

namespace fastmeta::cuda {
namespace {

constexpr const char* kOp = "functional_mlp";

// Checks the arguments and holds the arrays that a launch points to.
struct Arguments {
  std::vector<int64_t> widths, weight_task, bias_task;
  std::vector<const void*> weights, biases;
  FunctionalMlp mlp{};
  int64_t widest = 0;  // hidden layer

  Arguments(const Tensor& x, const std::vector<Tensor>& w, const std::vector<Tensor>& b, int64_t activation) {
    STD_TORCH_CHECK(!w.empty(), kOp, ": needs one layer at least");
    STD_TORCH_CHECK(b.empty() || b.size() == w.size(), kOp, ": needs one bias per layer, or none");
    STD_TORCH_CHECK(activation >= 0 && activation < kActivationCount, kOp, ": activation ", activation,
                    " is not one of 0 to ", kActivationCount - 1);
    check_tensor(kOp, x, x, 3);
    int64_t tasks = 1;
    const auto lead = [&](const Tensor& t, int64_t dims, int64_t size) {
      check_tensor(kOp, x, t, dims);
      const int64_t own = t.size(0);
      STD_TORCH_CHECK(own == 1 || tasks == 1 || own == tasks, kOp, ": tensors of ", tasks, " and of ", own, " tasks");
      if (own != 1) tasks = own;
      return own == 1 ? 0 : size;
    };
    mlp.x_task = lead(x, 3, x.size(1) * x.size(2));
    widths.push_back(x.size(2));
    for (size_t l = 0; l < w.size(); ++l) {
      weight_task.push_back(lead(w[l], 3, w[l].size(1) * w[l].size(2)));
      weights.push_back(w[l].const_data_ptr());
      STD_TORCH_CHECK(w[l].size(2) == widths.back(), kOp, ": weights[", l, "] takes ", w[l].size(2), " features, gets ",
                      widths.back());
      widths.push_back(w[l].size(1));
      if (l + 1 < w.size()) widest = std::max(widest, widths.back());
      if (b.empty()) continue;
      bias_task.push_back(lead(b[l], 2, b[l].size(1)));
      biases.push_back(b[l].const_data_ptr());
      STD_TORCH_CHECK(b[l].size(1) == widths.back(), kOp, ": biases[", l, "] is of width ", b[l].size(1), ", not ",
                      widths.back());
    }
    mlp.tasks = tasks;
    mlp.rows = x.size(1);
    mlp.layers = int64_t(w.size());
    mlp.activation = Activation(activation);
    mlp.x = x.const_data_ptr();
    mlp.widths = widths.data();
    mlp.weights = weights.data();
    mlp.weight_task = weight_task.data();
    mlp.biases = b.empty() ? nullptr : biases.data();
    mlp.bias_task = bias_task.data();
  }
  Arguments(const Arguments&) = delete;
  int64_t rows() const { return mlp.tasks * mlp.rows; }
};

Tensor functional_mlp(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, int64_t activation) {
  const Arguments a(x, weights, biases, activation);
  const OnDevice device(x);
  Tensor out = new_tensor(x, {a.mlp.tasks, a.mlp.rows, a.widths.back()});
  Tensor scratch = new_tensor(x, {2 * a.rows() * a.widest});
  launch_functional_mlp(dtype_of(kOp, x), a.mlp, out.mutable_data_ptr(), scratch.mutable_data_ptr(), device.stream);
  device.check(kOp);
  return out;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> functional_mlp_bwd(Tensor grad, Tensor x,
                                                                                std::vector<Tensor> weights,
                                                                                std::vector<Tensor> biases,
                                                                                int64_t activation, int64_t needs) {
  const Arguments a(x, weights, biases, activation);
  check_tensor(kOp, x, grad, 3);
  STD_TORCH_CHECK(grad.size(0) == a.mlp.tasks && grad.size(1) == a.mlp.rows && grad.size(2) == a.widths.back(), kOp,
                  ": the gradient is not of the output's shape");
  const OnDevice device(x);
  std::vector<Tensor> kept;  // alive until the kernels are launched
  const auto scratch = [&](int64_t size) {
    kept.push_back(new_tensor(x, {size}));
    return kept.back().mutable_data_ptr();
  };
  std::vector<void*> hidden, pre, d_weight_data, d_bias_data;
  for (size_t l = 1; l + 1 < a.widths.size(); ++l) {
    hidden.push_back(scratch(a.rows() * a.widths[l]));
    pre.push_back(derivative_needs_input(a.mlp.activation) ? scratch(a.rows() * a.widths[l]) : nullptr);
  }
  Tensor dx = new_like(x, needs & 1);
  std::vector<Tensor> d_weights, d_biases;
  int64_t sums = needs & 1 && a.mlp.x_task == 0 ? split_scratch(dx.numel()) : 0;
  const auto gradients = [&](const std::vector<Tensor>& inputs, bool needed, std::vector<Tensor>& outs,
                             std::vector<void*>& pointers) {
    for (const Tensor& t : inputs) {
      outs.push_back(new_like(t, needed));
      pointers.push_back(outs.back().mutable_data_ptr());
      // a single task's too is split; so are those of tasks that share all weights
      if (needed && t.size(0) == 1) sums = std::max(sums, split_scratch(t.numel()));
    }
  };
  gradients(weights, needs & 2, d_weights, d_weight_data);
  gradients(biases, needs & 4, d_biases, d_bias_data);
  FunctionalMlpBwd b{};
  b.forward = a.mlp;
  b.grad = grad.const_data_ptr();
  b.hidden = hidden.data();
  b.pre = pre.data();
  b.deltas = scratch(2 * a.rows() * a.widest);
  Tensor partial = new_sums(x, sums);
  b.sums = partial.mutable_data_ptr();
  b.dx = needs & 1 ? dx.mutable_data_ptr() : nullptr;
  b.d_weights = needs & 2 ? d_weight_data.data() : nullptr;
  b.d_biases = needs & 4 && !biases.empty() ? d_bias_data.data() : nullptr;
  launch_functional_mlp_bwd(dtype_of(kOp, x), b, device.stream);
  device.check(kOp);
  return {dx, d_weights, d_biases};
}

}  // namespace

FM_LIBRARY {
  m.impl("functional_mlp", TORCH_BOX(&functional_mlp));
  m.impl("functional_mlp_bwd", TORCH_BOX(&functional_mlp_bwd));
}

}  // namespace fastmeta::cuda
