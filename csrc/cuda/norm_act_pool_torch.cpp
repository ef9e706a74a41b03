// norm_act_pool, norm_moments and their gradients on CUDA tensors.
#include "bridge.h"

#include <fastmeta/launch_conv.h>

namespace fastmeta::cuda {
namespace {

constexpr const char* kOp = "norm_act_pool";

using Tensors = std::vector<Tensor>;

Norm norm_of(int64_t norm) {
  STD_TORCH_CHECK(norm >= 0 && norm <= int64_t(Norm::given), kOp, ": norm ", norm, " is not one of 0 to 3");
  return Norm(norm);
}

// A list of one tensor [tasks or 1, ...], or of none.
ConvInput one_of(const Tensor& like, const Tensors& list, const char* name, int64_t tasks,
                 std::initializer_list<int64_t> sizes) {
  if (list.empty()) return {};
  const Tensor& t = list[0];
  bool fits = list.size() == 1;
  int64_t each = 1, axis = 1;
  check_tensor(kOp, like, t, int64_t(sizes.size()) + 1);
  for (const int64_t size : sizes) {
    fits = fits && t.size(axis++) == size;
    each *= size;
  }
  STD_TORCH_CHECK(fits && (t.size(0) == 1 || t.size(0) == tasks), kOp, ": ", name, " does not fit ", tasks,
                  " tasks' images");
  return {t.const_data_ptr(), t.size(0) == 1 ? 0 : each};
}

NormActPool arguments(const Tensor& x, const Tensors& weight, const Tensors& bias, const Tensors& moments, int64_t norm,
                      double eps, int64_t activation, double slope, int64_t pool) {
  check_tensor(kOp, x, x, 5);
  const Activation known[] = {Activation::identity, Activation::relu, Activation::silu, Activation::gelu};
  STD_TORCH_CHECK(std::find(std::begin(known), std::end(known), Activation(activation)) != std::end(known), kOp,
                  ": activation ", activation, " is not identity, relu, silu or gelu");
  STD_TORCH_CHECK(pool >= 0 && pool <= int64_t(Pool::average), kOp, ": pool ", pool, " is not one of 0 to 2");
  NormActPool p{};
  p.x = x.const_data_ptr();
  p.tasks = x.size(0);
  p.rows = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.channels = x.size(4);
  STD_TORCH_CHECK(p.height < 1 << 30 && p.width < 1 << 30, kOp, ": images of 2^30 pixels");
  p.units_each = 1;
  p.groups = p.channels;
  p.norm = norm_of(norm);
  p.activation = Activation(activation);
  p.pool = Pool(pool);
  p.eps = eps;
  p.slope = slope;
  p.weight = one_of(x, weight, "weight", p.tasks, {p.channels});
  p.bias = one_of(x, bias, "bias", p.tasks, {p.channels});
  if (p.norm == Norm::none) return p;
  STD_TORCH_CHECK(moments.size() == 2 && moments[0].dim() == 3, kOp, ": expects a mean and a variance of 3 dimensions");
  p.units_each = moments[0].size(1);
  p.groups = moments[0].size(2);
  const bool fits = p.norm == Norm::batch ? p.units_each == 1 && p.groups == p.channels
                                          : p.units_each == p.rows || (p.norm == Norm::given && p.units_each == 1);
  STD_TORCH_CHECK(fits && (p.groups > 0 ? p.channels % p.groups == 0 : p.channels == 0), kOp, ": moments of ",
                  p.units_each, " rows and ", p.groups, " groups do not fit the images");
  const Tensor sums = new_sums(x, 0);
  p.mean = one_of(sums, {moments[0]}, "mean", p.tasks, {p.units_each, p.groups});
  p.var = one_of(sums, {moments[1]}, "variance", p.tasks, {p.units_each, p.groups});
  return p;
}

void check_grad(const Tensor& x, const Tensor& grad, const NormActPool& p) {
  check_tensor(kOp, x, grad, 5);
  const int64_t size = p.pool_size();
  STD_TORCH_CHECK(grad.size(0) == p.tasks && grad.size(1) == p.rows && grad.size(2) == p.height / size &&
                      grad.size(3) == p.width / size && grad.size(4) == p.channels,
                  kOp, ": the gradient is not of the output's shape");
}

Tensors new_list(const Tensors& like, bool needed) {
  Tensors list;
  for (const Tensor& t : like) list.push_back(new_like(t, needed));
  return list;
}
ConvOutput output(const Tensors& list, bool needed) {
  if (list.empty() || !needed) return {nullptr, false};
  return {list[0].mutable_data_ptr(), list[0].size(0) == 1};
}

std::tuple<Tensor, Tensor> norm_moments(Tensor x, int64_t norm, int64_t groups) {
  check_tensor(kOp, x, x, 5);
  const int64_t tasks = x.size(0), rows = x.size(1), pixels = x.size(2) * x.size(3), channels = x.size(4);
  const bool batch = norm_of(norm) == Norm::batch;
  if (batch) groups = channels;
  STD_TORCH_CHECK(groups > 0 ? channels % groups == 0 : channels == 0, kOp, ": ", channels, " channels in ", groups,
                  " groups");
  const OnDevice device(x);
  const Tensor sums = new_sums(x, 0);
  Tensor mean = new_tensor(sums, {tasks, batch ? 1 : rows, groups}), var = new_like(mean, true);
  NormMoments p{x.const_data_ptr(), batch ? tasks : tasks * rows, batch ? rows * pixels : pixels, channels, groups};
  Tensor scratch = new_sums(x, p.scratch_size());
  p.scratch = scratch.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.var = var.mutable_data_ptr();
  launch_norm_moments(dtype_of(kOp, x), p, device.stream);
  device.check(kOp);
  return {mean, var};
}

Tensor norm_act_pool(Tensor x, Tensors weight, Tensors bias, Tensors moments, int64_t norm, int64_t, double eps,
                     int64_t activation, double slope, int64_t pool) {
  const NormActPool p = arguments(x, weight, bias, moments, norm, eps, activation, slope, pool);
  const OnDevice device(x);
  Tensor out = new_tensor(x, {p.tasks, p.rows, p.height / p.pool_size(), p.width / p.pool_size(), p.channels});
  launch_norm_act_pool(dtype_of(kOp, x), p, out.mutable_data_ptr(), device.stream);
  device.check(kOp);
  return out;
}

std::tuple<Tensor, Tensors, Tensors> norm_act_pool_bwd(Tensor grad, Tensor x, Tensors weight, Tensors bias,
                                                       Tensors moments, int64_t norm, int64_t, double eps,
                                                       int64_t activation, double slope, int64_t pool, int64_t needs) {
  NormActPoolBwd b{arguments(x, weight, bias, moments, norm, eps, activation, slope, pool)};
  check_grad(x, grad, b.forward);
  const OnDevice device(x);
  Tensor d_x = new_like(x, needs & 1), scratch = new_sums(x, b.forward.scratch_size(kBwdSums));
  Tensors d_weight = new_list(weight, needs & 2), d_bias = new_list(bias, needs & 4);
  b.grad = grad.const_data_ptr();
  b.d_x = needs & 1 ? d_x.mutable_data_ptr() : nullptr;
  b.d_weight = output(d_weight, needs & 2);
  b.d_bias = output(d_bias, needs & 4);
  b.scratch = scratch.mutable_data_ptr();
  launch_norm_act_pool_bwd(dtype_of(kOp, x), b, device.stream);
  device.check(kOp);
  return {d_x, d_weight, d_bias};
}

std::tuple<Tensor, Tensor, Tensors, Tensors> norm_act_pool_bwd_bwd(Tensor outer, Tensors outer_weight,
                                                                   Tensors outer_bias, Tensor grad, Tensor x,
                                                                   Tensors weight, Tensors bias, Tensors moments,
                                                                   int64_t norm, int64_t, double eps,
                                                                   int64_t activation, double slope, int64_t pool,
                                                                   int64_t needs, int64_t second_needs) {
  NormActPoolBwdBwd b{arguments(x, weight, bias, moments, norm, eps, activation, slope, pool)};
  const NormActPool& p = b.forward;
  check_grad(x, grad, p);
  if (needs & 1) {
    check_tensor(kOp, x, outer, 5);
    STD_TORCH_CHECK(outer.numel() == x.numel() && outer.size(4) == p.channels, kOp,
                    ": a cotangent is not of x's shape");
    b.outer = outer.const_data_ptr();
  }
  if (needs & 2) b.outer_weight = one_of(x, outer_weight, "weight's cotangent", p.tasks, {p.channels});
  if (needs & 4) b.outer_bias = one_of(x, outer_bias, "bias's cotangent", p.tasks, {p.channels});
  const OnDevice device(x);
  Tensor d_grad = new_like(grad, second_needs & 1), d_x = new_like(x, second_needs & 2);
  Tensors d_weight = new_list(weight, second_needs & 4), d_bias = new_list(bias, second_needs & 8);
  Tensor scratch = new_sums(x, p.scratch_size(kBwdBwdSums));
  b.grad = grad.const_data_ptr();
  b.d_grad = second_needs & 1 ? d_grad.mutable_data_ptr() : nullptr;
  b.d_x = second_needs & 2 ? d_x.mutable_data_ptr() : nullptr;
  b.d_weight = output(d_weight, second_needs & 4);
  b.d_bias = output(d_bias, second_needs & 8);
  b.scratch = scratch.mutable_data_ptr();
  launch_norm_act_pool_bwd_bwd(dtype_of(kOp, x), b, device.stream);
  device.check(kOp);
  return {d_grad, d_x, d_weight, d_bias};
}

}  // namespace

FM_LIBRARY {
  m.impl("norm_moments", TORCH_BOX(&norm_moments));
  m.impl("norm_act_pool", TORCH_BOX(&norm_act_pool));
  m.impl("norm_act_pool_bwd", TORCH_BOX(&norm_act_pool_bwd));
  m.impl("norm_act_pool_bwd_bwd", TORCH_BOX(&norm_act_pool_bwd_bwd));
}

}  // namespace fastmeta::cuda
