// functional_mlp on CPU tensors. Tasks that share all weights are one task with the rows of all; otherwise split over
// tasks, and over ranges of rows where tasks are few.
#include "tensors.h"

#include <algorithm>
#include <array>

namespace fastmeta::cpu {
namespace {

constexpr const char* kOp = "functional_mlp";

// A tensor whose tasks each have `size` elements, or share them.
template <class T>
struct PerTask {
  T* base = nullptr;
  int64_t size = 0;
  bool shared = false;
  T* at(int64_t task) const { return base == nullptr ? nullptr : base + (shared ? 0 : task * size); }
};

struct Problem {
  int64_t tasks = 1, rows, layers, flops = 0, activation;
  bool merged = false;  // the tasks' rows are those of one task
  std::vector<int64_t> widths;

  Problem(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, int64_t activation)
      : rows(x.size(1)), layers(int64_t(weights.size())), activation(activation) {
    check_dims(kOp, x, 3);
    STD_TORCH_CHECK(layers > 0 && layers <= kMaxLayers, kOp, ": takes 1 to ", kMaxLayers, " layers, got ", layers);
    STD_TORCH_CHECK(biases.empty() || biases.size() == weights.size(), kOp, ": needs one bias per layer, or none");
    STD_TORCH_CHECK(activation >= 0 && activation < kActivations, kOp, ": activation ", activation,
                    " is not one of 0 to ", kActivations - 1);
    widths.push_back(x.size(2));
    bool all_shared = true;
    const auto lead = [&](const Tensor& t) {
      const int64_t size = t.size(0);
      STD_TORCH_CHECK(size == 1 || tasks == 1 || size == tasks, kOp, ": tensors of ", tasks, " and of ", size, " tasks");
      if (size != 1) tasks = size;
      return size;
    };
    lead(x);
    for (int64_t l = 0; l < layers; ++l) {
      const Tensor& w = weights[size_t(l)];
      check_dims(kOp, w, 3);
      STD_TORCH_CHECK(w.size(2) == widths.back(), kOp, ": weights[", l, "] takes ", w.size(2), " features, gets ",
                      widths.back());
      widths.push_back(w.size(1));
      all_shared = lead(w) == 1 && all_shared;
      flops += 2 * w.size(1) * w.size(2);
      if (biases.empty()) continue;
      const Tensor& b = biases[size_t(l)];
      check_dims(kOp, b, 2);
      STD_TORCH_CHECK(b.size(1) == w.size(1), kOp, ": biases[", l, "] is of width ", b.size(1), ", not ", w.size(1));
      all_shared = lead(b) == 1 && all_shared;
    }
    outputs = {tasks, rows, widths.back()};
    if (all_shared && tasks != 1 && x.size(0) == tasks) {
      merged = true;
      rows *= tasks;
      tasks = 1;
    }
  }
  std::array<int64_t, 3> outputs;
  Tensor new_output(const Tensor& like) const { return new_tensor(like, {outputs[0], outputs[1], outputs[2]}); }

  template <class T>
  PerTask<const T> operand(const Tensor& t) const {
    return {data<T>(t), size(t), shared(t)};
  }
  bool shared(const Tensor& t) const { return !merged && t.size(0) == 1; }
  int64_t size(const Tensor& t) const {
    int64_t n = 1;
    for (int64_t d = 1; d < t.dim(); ++d) n *= t.size(d);
    return n;
  }
};

template <class T>
struct Net {
  std::vector<PerTask<const T>> weights, biases;

  Net(const Problem& problem, const std::vector<Tensor>& w, const std::vector<Tensor>& b) {
    for (const Tensor& t : w) weights.push_back(problem.operand<T>(t));
    for (const Tensor& t : b) biases.push_back(problem.operand<T>(t));
  }
};

// The pointers of one item, all on the stack of its worker.
template <class T>
struct Pointers {
  const T* weights[kMaxLayers];
  const T* biases[kMaxLayers];
  T* d_weights[kMaxLayers];
  T* d_biases[kMaxLayers];
  bool add_weights[kMaxLayers];
  bool add_biases[kMaxLayers];

  MlpItem<T> item(const Problem& problem, const Net<T>& net, const PerTask<const T>& x, int64_t task, Range range) {
    for (size_t l = 0; l < net.weights.size(); ++l) weights[l] = net.weights[l].at(task);
    for (size_t l = 0; l < net.biases.size(); ++l) biases[l] = net.biases[l].at(task);
    MlpItem<T> item{};
    item.layers = problem.layers;
    item.widths = problem.widths.data();
    item.activation = problem.activation;
    item.rows = range.end - range.begin;
    item.x = x.at(task) + range.begin * problem.widths[0];
    item.weights = weights;
    item.biases = net.biases.empty() ? nullptr : biases;
    return item;
  }
};

// Tasks [begin, end), a pack.
template <class T>
void run_pack(const Problem& problem, const Net<T>& net, const PerTask<const T>& x, T* out, Range tasks,
              const Kernels<T>& kernels) {
  MlpPack<T> pack{problem.layers, problem.widths.data(), problem.activation, problem.rows, tasks.end - tasks.begin};
  const auto operand = [&](const PerTask<const T>& t) {
    return Operand<T>{t.at(tasks.begin), t.shared || t.base == nullptr ? 0 : t.size};
  };
  pack.x = operand(x);
  for (size_t l = 0; l < net.weights.size(); ++l) pack.weights[l] = operand(net.weights[l]);
  for (size_t l = 0; l < net.biases.size(); ++l) pack.biases[l] = operand(net.biases[l]);
  pack.out_step = problem.rows * problem.widths.back();
  pack.out = out + tasks.begin * pack.out_step;
  kernels.mlp_pack(pack);
}

Tensor functional_mlp(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases, int64_t activation) {
  const Problem problem(x, weights, biases, activation);
  Tensor out = problem.new_output(x);
  by_dtype(kOp, x, [&](auto zero) {
    using T = decltype(zero);
    const Net<T> net(problem, weights, biases);
    const PerTask<const T> input = problem.operand<T>(x);
    const int64_t parts = row_parts(problem.tasks, problem.rows, 32), outputs = problem.widths.back();
    T* to = mutable_data<T>(out);
    const Kernels<T>& best = kernels_for<T>(problem.widths.data(), problem.layers);
    const int64_t lanes = best.mlp_lanes(problem.widths.data(), problem.layers, problem.rows);
    if (lanes > 0 && 4 * (problem.tasks / torch::stable::get_num_threads()) >= 3 * lanes) {
      const int64_t packs = (problem.tasks + lanes - 1) / lanes;
      return parallel(packs, lanes * problem.rows * problem.flops, [&](int64_t i) {
        run_pack<T>(problem, net, input, to, part(problem.tasks, packs, i), best);
      });
    }
    parallel(problem.tasks * parts, problem.rows * problem.flops / parts, [&](int64_t i) {
      const int64_t t = i / parts;
      const Range range = part(problem.rows, parts, i % parts);
      Pointers<T> pointers;
      MlpItem<T> item = pointers.item(problem, net, input, t, range);
      item.out = to + (t * problem.rows + range.begin) * outputs;
      best.mlp(item);
    });
  });
  return out;
}

// One gradient to be formed. Straight into its tensor where one item has all of it; else a partial sum per item (tasks
// split into parts) or per group of items (summed over tasks), added up afterwards in order.
template <class T>
struct Target {
  Tensor tensor, partials;
  T* out = nullptr;
  int64_t size = 0, copies = 0;
  enum { direct, per_item, per_group } mode = direct;
  bool zeroed = false;  // a group may write only some rows of its partial sum, or, without tasks, nothing

  Target(const Problem& problem, const Tensor& like, bool needed, int64_t parts, int64_t groups, bool rows_apart) {
    tensor = new_like(like, needed);
    if (!needed) return;
    const bool over_tasks = problem.shared(like) && problem.tasks != 1;
    size = rows_apart ? problem.size(like) : like.numel() / (over_tasks || problem.tasks == 0 ? 1 : problem.tasks);
    mode = over_tasks ? per_group : parts > 1 && !rows_apart ? per_item : direct;
    copies = mode == per_group ? groups : problem.tasks * parts;
    if (mode == direct) {
      out = mutable_data<T>(tensor);
      return;
    }
    partials = new_tensor(like, {copies * size});
    out = mutable_data<T>(partials);
    zeroed = mode == per_group && (parts > 1 || problem.tasks == 0);
    if (zeroed) std::fill_n(out, copies * size, T(0));
  }
  bool needed() const { return out != nullptr; }
  bool adds(bool later) const { return zeroed || (later && mode == per_group); }
  T* at(int64_t task, int64_t item, int64_t group) const {
    return out + (mode == direct ? task : mode == per_item ? item : group) * size;
  }
  void finish(int64_t tasks, int64_t parts) const {
    if (mode == direct) return;
    const int64_t sums = mode == per_group ? 1 : tasks, each = mode == per_group ? copies : parts;
    constexpr int64_t kColumns = 1024;
    const int64_t blocks = (size + kColumns - 1) / kColumns;
    T* to = mutable_data<T>(tensor);
    parallel(sums * blocks, each * kColumns, [&](int64_t i) {
      const int64_t sum = i / blocks, start = i % blocks * kColumns;
      kernels<T>().sum_partials(out + sum * each * size + start, each, size, to + sum * size + start,
                                std::min(kColumns, size - start));
    });
  }
};

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> functional_mlp_bwd(Tensor grad, Tensor x,
                                                                                std::vector<Tensor> weights,
                                                                                std::vector<Tensor> biases,
                                                                                int64_t activation, int64_t needs) {
  const Problem problem(x, weights, biases, activation);
  check_dims(kOp, grad, 3);
  Tensor dx;
  std::vector<Tensor> d_weights, d_biases;
  by_dtype(kOp, x, [&](auto zero) {
    using T = decltype(zero);
    const Net<T> net(problem, weights, biases);
    const PerTask<const T> input = problem.operand<T>(x);
    const int64_t parts = row_parts(problem.tasks, problem.rows, 32), items = problem.tasks * parts;
    const int64_t groups = std::max<int64_t>(1, std::min<int64_t>(items, torch::stable::get_num_threads()));

    const Target<T> x_target(problem, x, needs & 1, parts, groups, true);
    std::vector<Target<T>> w_targets, b_targets;
    for (const Tensor& t : weights) w_targets.emplace_back(problem, t, needs & 2, parts, groups, false);
    for (const Tensor& t : biases) b_targets.emplace_back(problem, t, needs & 4, parts, groups, false);

    const int64_t outputs = problem.widths.back();
    const T* g = data<T>(grad);
    const Kernels<T>& best = kernels_for<T>(problem.widths.data(), problem.layers);
    parallel(groups, 3 * problem.rows * problem.flops / parts * (items / groups), [&](int64_t group) {
      const Range mine = part(items, groups, group);
      Pointers<T> pointers;
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t t = i / parts;
        const Range range = part(problem.rows, parts, i % parts);
        MlpItem<T> item = pointers.item(problem, net, input, t, range);
        item.grad = g + (t * problem.rows + range.begin) * outputs;
        const bool later = i != mine.begin;
        if (x_target.needed()) {
          item.dx = x_target.at(t, i, group) + range.begin * problem.widths[0];
          item.add_dx = x_target.adds(later);
        }
        for (size_t l = 0; l < weights.size(); ++l) {
          if (w_targets[l].needed()) pointers.d_weights[l] = w_targets[l].at(t, i, group);
          pointers.add_weights[l] = w_targets[l].adds(later);
        }
        for (size_t l = 0; l < biases.size(); ++l) {
          if (b_targets[l].needed()) pointers.d_biases[l] = b_targets[l].at(t, i, group);
          pointers.add_biases[l] = b_targets[l].adds(later);
        }
        item.d_weights = needs & 2 ? pointers.d_weights : nullptr;
        item.d_biases = (needs & 4) && !biases.empty() ? pointers.d_biases : nullptr;
        item.add_weights = pointers.add_weights;
        item.add_biases = pointers.add_biases;
        best.mlp_gradient(item);
      }
    });

    x_target.finish(problem.tasks, parts);
    dx = x_target.tensor;
    for (const auto& target : w_targets) target.finish(problem.tasks, parts), d_weights.push_back(target.tensor);
    for (const auto& target : b_targets) target.finish(problem.tasks, parts), d_biases.push_back(target.tensor);
  });
  return {dx, d_weights, d_biases};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta_native, CPU, m) {
  m.impl("functional_mlp", TORCH_BOX(&functional_mlp));
  m.impl("functional_mlp_bwd", TORCH_BOX(&functional_mlp_bwd));
}

}  // namespace fastmeta::cpu
