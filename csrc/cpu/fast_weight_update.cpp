// fast_weight_update on CPU tensors: all tensors cut into blocks of like size, one parallel loop over the blocks.
#include "blocks.h"

namespace fastmeta::cpu {
namespace {

constexpr const char* kOp = "fast_weight_update";

// The update of one tensor, cut into items.
template <class T>
void add_items(std::vector<UpdateItem<T>>& items, int64_t tasks, int64_t n, const T* param, Matrix p, const T* grad,
               Matrix g, const T* rates, Matrix l, double lr, T* to) {
  const Grid grid(kOp, tasks, n, {p, g, l});
  const Shape ps = grid.shape(p), gs = grid.shape(g), ls = rates ? grid.shape(l) : Shape{};
  for (int64_t r = 0; grid.columns && r < grid.rows; r += grid.row_block)
    for (int64_t c = 0; c < grid.columns; c += grid.column_block)
      items.push_back({param + r * ps.row + (ps.columns ? c : 0), grad + r * gs.row + (gs.columns ? c : 0),
                       rates ? rates + r * ls.row + (ls.columns ? c : 0) : nullptr, T(lr), ps.row, gs.row, ls.row,
                       ps.columns, gs.columns, ls.columns, to + r * grid.columns + c, grid.columns,
                       std::min(grid.row_block, grid.rows - r), std::min(grid.column_block, grid.columns - c)});
}
template <class T>
void run_items(const std::vector<UpdateItem<T>>& items) {
  parallel(int64_t(items.size()), items.empty() ? 0 : items[0].rows * items[0].columns,
           [&](int64_t i) { kernels<T>().update(items[size_t(i)]); });
}

void check_lists(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& lrs) {
  STD_TORCH_CHECK(params.size() == grads.size() && (lrs.empty() || lrs.size() == params.size()), kOp,
                  ": needs one gradient, and one rate or none, per parameter");
}

std::vector<Tensor> fast_weight_update(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> lrs,
                                       double lr) {
  check_lists(params, grads, lrs);
  const int64_t tasks = leading_size(kOp, {&params, &grads, &lrs});
  std::vector<Tensor> out;
  out.reserve(params.size());
  if (params.empty()) return out;
  by_dtype(kOp, params[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<UpdateItem<T>> items;
    for (size_t i = 0; i < params.size(); ++i) {
      const Matrix p = matrix(params[i]);
      out.push_back(new_tensor(params[i], {tasks, p.columns}));
      add_items<T>(items, tasks, p.columns, data<T>(params[i]), p, data<T>(grads[i]), matrix(grads[i]),
                   lrs.empty() ? nullptr : data<T>(lrs[i]), lrs.empty() ? p : matrix(lrs[i]), lr,
                   mutable_data<T>(out[i]));
    }
    run_items(items);
  });
  return out;
}

// The same of tensors as they are, contiguous and of any shape: tensor i is read as [tasks, columns[i]], or by its number
// of elements as what is shared by tasks or by columns. Results have the shape of the whole one of parameter and gradient.
std::vector<Tensor> fast_weight_update_shaped(std::vector<Tensor> params, std::vector<Tensor> grads,
                                              std::vector<Tensor> lrs, double lr, int64_t tasks,
                                              std::vector<int64_t> columns) {
  check_lists(params, grads, lrs);
  STD_TORCH_CHECK(columns.size() == params.size(), kOp, ": needs a number of columns per parameter");
  std::vector<Tensor> out;
  out.reserve(params.size());
  if (params.empty()) return out;
  by_dtype(kOp, params[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<UpdateItem<T>> items;
    for (size_t i = 0; i < params.size(); ++i) {
      const int64_t n = columns[i];
      const auto read = [&](const Tensor& t) -> Matrix {
        const int64_t size = t.numel();
        STD_TORCH_CHECK(t.is_contiguous() && (size == tasks * n || size == n || size == tasks || size == 1), kOp,
                        ": a tensor of ", size, " elements for ", tasks, " tasks of ", n);
        if (size == tasks * n) return {tasks, n};
        return size == n ? Matrix{1, n} : Matrix{size, 1};
      };
      const Matrix p = read(params[i]);
      const Tensor& like = p.numel() == tasks * n ? params[i] : grads[i];
      STD_TORCH_CHECK(like.numel() == tasks * n, kOp, ": needs a parameter or a gradient per task");
      out.push_back(new_like(like, true));
      add_items<T>(items, tasks, n, data<T>(params[i]), p, data<T>(grads[i]), read(grads[i]),
                   lrs.empty() ? nullptr : data<T>(lrs[i]), lrs.empty() ? p : read(lrs[i]), lr, mutable_data<T>(out[i]));
    }
    run_items(items);
  });
  return out;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> fast_weight_update_bwd(std::vector<Tensor> grad_outs,
                                                                            std::vector<Tensor> grads,
                                                                            std::vector<Tensor> lrs, double lr,
                                                                            int64_t needs) {
  STD_TORCH_CHECK(grad_outs.size() == grads.size() && (lrs.empty() || lrs.size() == grads.size()), kOp,
                  ": needs one gradient, and one rate or none, per output gradient");
  const int64_t tasks = leading_size(kOp, {&grad_outs, &grads, &lrs});
  std::vector<Tensor> d_grads, d_lrs;
  if (grads.empty()) return {d_grads, d_lrs};
  by_dtype(kOp, grads[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<UpdateGradientItem<T>> items;
    std::vector<Destination<T>> targets;
    for (size_t i = 0; i < grads.size(); ++i) {
      const int64_t n = grads[i].size(1);
      const Tensor& rate = lrs.empty() ? grads[i] : lrs[i];
      const Grid grid(kOp, tasks, n, {matrix(grad_outs[i]), matrix(grads[i]), matrix(rate)});
      const Shape g = grid.shape(matrix(grads[i])), l = lrs.empty() ? Shape{} : grid.shape(matrix(rate));
      const Destination<T> d_grad = needs & 1 ? Destination<T>(new_like(grads[i], true), grid) : Destination<T>();
      const Destination<T> d_lr = (needs & 2) && !lrs.empty() ? Destination<T>(new_like(rate, true), grid) : Destination<T>();
      d_grads.push_back(needs & 1 ? d_grad.tensor : new_tensor(grads[i], {0}));
      if (!lrs.empty()) d_lrs.push_back(needs & 2 ? d_lr.tensor : new_tensor(rate, {0}));
      const T* out = data<T>(grad_outs[i]);
      const T* grad = data<T>(grads[i]);
      const T* rates = lrs.empty() ? nullptr : data<T>(rate);
      for (int64_t r = 0; grid.columns && r < grid.rows; r += grid.row_block)
        for (int64_t c = 0; c < grid.columns; c += grid.column_block)
          items.push_back({out + r * grid.columns + c, grid.columns, grad + r * g.row + (g.columns ? c : 0),
                           rates ? rates + r * l.row + (l.columns ? c : 0) : nullptr, T(lr), g.row, l.row, g.columns,
                           l.columns, d_grad.at(grid, r, c), d_lr.at(grid, r, c), d_grad.shape.row, d_lr.shape.row,
                           std::min(grid.row_block, grid.rows - r), std::min(grid.column_block, grid.columns - c)});
      if (d_grad.parts > 1) targets.push_back(d_grad);
      if (d_lr.parts > 1) targets.push_back(d_lr);
    }
    parallel(int64_t(items.size()), items.empty() ? 0 : items[0].rows * items[0].columns,
             [&](int64_t i) { kernels<T>().update_gradient(items[size_t(i)]); });
    add_partials(targets);
  });
  return {d_grads, d_lrs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta_native, CPU, m) {
  m.impl("fast_weight_update", TORCH_BOX(&fast_weight_update));
  m.impl("fast_weight_update_shaped", TORCH_BOX(&fast_weight_update_shaped));
  m.impl("fast_weight_update_bwd", TORCH_BOX(&fast_weight_update_bwd));
}

}  // namespace fastmeta::cpu
