// fast_weight_update on CUDA tensors: every tensor of the lists becomes one product, all launched together.
#include "bridge.h"

namespace fastmeta::cuda {
namespace {

constexpr const char* kOp = "fast_weight_update";

int64_t leading_size(std::initializer_list<const std::vector<Tensor>*> lists, const Tensor& like) {
  int64_t tasks = 1;
  for (const auto* list : lists)
    for (const Tensor& t : *list) {
      check_tensor(kOp, like, t, 2);
      if (t.size(0) != 1) tasks = t.size(0);  // 0 too wins over 1
    }
  return tasks;
}

Strided strided(const Tensor& t, int64_t tasks, int64_t columns) {
  STD_TORCH_CHECK((t.size(0) == tasks || t.size(0) == 1) && (t.size(1) == columns || t.size(1) == 1), kOp, ": shape [",
                  t.size(0), ", ", t.size(1), "] does not fit [", tasks, ", ", columns, "]");
  return {t.const_data_ptr(), t.size(0) == 1 ? 0 : t.size(1), t.size(1) == 1 && columns != 1 ? 0 : 1};
}

void launch_all(const std::vector<Product>& products, const Tensor& like, double lr) {
  const OnDevice device(like);
  int64_t scratch = 0;
  for (const Product& p : products) scratch = std::max(scratch, product_scratch(p));
  Tensor sums = new_sums(like, scratch);
  launch_products(dtype_of(kOp, like), products.data(), int64_t(products.size()), lr, sums.mutable_data_ptr(),
                  device.stream);
  device.check(kOp);
}

std::vector<Tensor> fast_weight_update(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> lrs,
                                       double lr) {
  STD_TORCH_CHECK(params.size() == grads.size() && (lrs.empty() || lrs.size() == params.size()), kOp,
                  ": needs as many gradients as parameters, and as many learning rates or none");
  std::vector<Tensor> outs;
  if (params.empty()) return outs;
  const int64_t tasks = leading_size({&params, &grads, &lrs}, params[0]);
  std::vector<Product> products;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t columns = params[i].size(1);
    STD_TORCH_CHECK(grads[i].size(1) == columns, kOp, ": grads[", i, "] is not of the size of its parameter");
    outs.push_back(new_tensor(params[i], {tasks, columns}));
    const Strided rate = lrs.empty() ? Strided{} : strided(lrs[i], tasks, columns);
    products.push_back({strided(params[i], tasks, columns), strided(grads[i], tasks, columns), rate,
                        outs.back().mutable_data_ptr(), tasks, columns, Reduce::none});
  }
  launch_all(products, params[0], lr);
  return outs;
}

// The gradient of `input`, -sum(grad_out * factor) over whatever `input` repeats along.
Tensor gradient(const Tensor& input, const Tensor& grad_out, const Strided& factor, std::vector<Product>& products) {
  Tensor out = torch::stable::new_empty(input, input.sizes());
  const int64_t tasks = grad_out.size(0), columns = grad_out.size(1);
  const int over_rows = input.size(0) != tasks, over_columns = input.size(1) != columns;
  products.push_back({Strided{}, strided(grad_out, tasks, columns), factor, out.mutable_data_ptr(), tasks, columns,
                      Reduce(over_rows + 2 * over_columns)});
  return out;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> fast_weight_update_bwd(std::vector<Tensor> grad_outs,
                                                                            std::vector<Tensor> grads,
                                                                            std::vector<Tensor> lrs, double lr,
                                                                            int64_t needs) {
  STD_TORCH_CHECK(grad_outs.size() == grads.size() && (lrs.empty() || lrs.size() == grads.size()), kOp,
                  ": needs as many gradients as outputs, and as many learning rates or none");
  std::vector<Tensor> d_grads, d_lrs;
  if (grads.empty()) return {d_grads, d_lrs};
  leading_size({&grad_outs, &grads, &lrs}, grads[0]);
  std::vector<Product> products;
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t tasks = grad_outs[i].size(0), columns = grad_outs[i].size(1);
    const Strided grad = strided(grads[i], tasks, columns);
    const Strided rate = lrs.empty() ? Strided{} : strided(lrs[i], tasks, columns);
    d_grads.push_back(needs & 1 ? gradient(grads[i], grad_outs[i], rate, products) : new_tensor(grads[i], {0}));
    if (!lrs.empty())
      d_lrs.push_back(needs & 2 ? gradient(lrs[i], grad_outs[i], grad, products) : new_tensor(lrs[i], {0}));
  }
  launch_all(products, grads[0], lr);
  return {d_grads, d_lrs};
}

}  // namespace

FM_LIBRARY {
  m.impl("fast_weight_update", TORCH_BOX(&fast_weight_update));
  m.impl("fast_weight_update_bwd", TORCH_BOX(&fast_weight_update_bwd));
}

}  // namespace fastmeta::cuda
